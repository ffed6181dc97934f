"""StorageWriter: what `dcp.save` and `dcp.async_save` write through."""

from __future__ import annotations

import os
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import FileSystem, SerializationFormat
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import StorageWriter as StorageWriterInterface
from torch.futures import Future

from .. import _native, garbage, manifest, state, status, tensors, values
from ..base import Memory, choose, link
from ..collective import Deadline
from ..config import SaveOptions
from ..errors import CheckpointError
from ..manifest import Manifest
from ..progress import Progress
from ..read_back import read_back
from ..share import Share
from ..staleness import heed_unchanged, owned_unchanged
from ..status import SaveWatch
from ..structure import StructureCache, StructureKeys, make_structure, without_derived
from ..target import Target
from ..trace import Trace
from .metadata import VERSION, pickled
from .planned_entries import PlannedEntries
from .rendezvous import Note
from .taken import Taken

__all__ = ["StorageWriter"]

_cache = StructureCache()
_keys = StructureKeys()
_memory = Memory()


@dataclass(slots=True)
class _Saving:
    """One save from `prepare_global_plan` (on the coordinator) or `write_data` (elsewhere) to its end."""

    target: Target
    deadline: Deadline
    note: Note
    staging: Any
    leads: bool
    process: int = field(default_factory=os.getpid)
    status: SaveWatch | None = None  # from `write_data` on

    def check_deadline(self) -> None:
        if self.deadline.expired:
            raise CheckpointError("the data file was not written in time", path=self.target.path)

    def read_back(self, entry: manifest.Writer, shared: tuple[manifest.FileEntry, ...], trace: Trace) -> None:
        read_back(
            self.staging.path,
            entry,
            shared,
            save_id=self.note.save_id,
            world_size=self.note.world_size,
            deadline=self.deadline,
            trace=trace,
        )

    def discard(self) -> None:
        if self.leads and self.process == os.getpid():  # a forked child has a copy of the writer, but not the save
            self.staging.discard()
            self.note.remove(self.target)
            if self.status is not None:
                self.status.end(CheckpointError("not committed: another rank failed", path=self.target.path))
        self.staging.close()


class StorageWriter(StorageWriterInterface):
    """Writes a snapstone checkpoint from a `dcp.save`: one directory, atomic, durable and checked, in the format that
    `snapstone.load` and `Checkpoint.open` read. One save at a time goes through a writer: of two at once both fail.

    Args:
        path: the directory that the checkpoint becomes; `checkpoint_id` of a save takes its place.
        overwrite: replace an existing checkpoint, which stays intact until the new one is committed. Stock's default.
        codec, allow_pickle, host_memory_budget, timeout, verify_after_save: as in `snapstone.save`. `timeout` bounds
            the writer's own waits; DCP's collectives have the process group's.
        base, full_every, keyframe_every, on_unchanged, derive: as in `snapstone.save`. Chunks in a shared file move to
            a file of the rank's own when less than half of it is used by that rank, not by all: ranks cannot talk here.
            base="auto" finds nothing without collectives.
        step, metadata: for the manifest.
        dcp_metadata: let the file `.metadata` hold the pickled Metadata that the stock writer would leave, for tools
            that read names, shapes and dtypes there, in the place of a line of text. The engine reads neither. The
            same on every rank.
        single_file_per_rank, sync_files, thread_count, per_thread_copy_ahead, cache_staged_state_dict: accepted for
            compatibility and without effect: files are always one per rank and synced, threads are the engine's.

    Raises:
        ValueError: `_extensions` or another serialization format, which change bytes that snapstone does not write.
        RuntimeError: from the save, "Checkpoint already exists", with overwrite=False.
        CheckpointError, OSError: from the save, inside the CheckpointException that DCP raises on every rank.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] = "",
        single_file_per_rank: bool = True,
        sync_files: bool = True,
        thread_count: int = 1,
        per_thread_copy_ahead: int = 10_000_000,
        cache_staged_state_dict: bool = False,
        overwrite: bool = True,
        _extensions: Sequence[Any] | None = None,
        serialization_format: SerializationFormat = SerializationFormat.TORCH_SAVE,
        *,
        base: str | os.PathLike[str] | None = None,
        codec: str | None = None,
        full_every: int | None = None,
        keyframe_every: int = 8,
        derive: bool = False,
        on_unchanged: str = "warn",
        allow_pickle: bool = False,
        host_memory_budget: int | None = None,
        timeout: timedelta | float | None = None,
        step: int | None = None,
        metadata: Mapping[str, Any] | None = None,
        dcp_metadata: bool = False,
        verify_after_save: bool = False,
    ) -> None:
        super().__init__()
        if _extensions or serialization_format is not SerializationFormat.TORCH_SAVE:
            raise ValueError(
                "snapstone has a format of its own: use codec= instead of _extensions, and no other format"
            )
        self.path: str | os.PathLike[str] = path
        self.single_file_per_rank = single_file_per_rank
        self.sync_files = sync_files
        self.thread_count = thread_count
        self.per_thread_copy_ahead = per_thread_copy_ahead
        self.cache_staged_state_dict = cache_staged_state_dict
        self.overwrite = overwrite
        self.fs = FileSystem()
        self.save_id = uuid.uuid4().hex
        self.rank: int | None = None
        self.use_collectives = True
        self.is_coordinator = True
        self.step = step
        self.metadata = metadata
        self.dcp_metadata = dcp_metadata
        self.verify_after_save = verify_after_save
        self.base = base
        self.codec = codec
        self.full_every = full_every
        self.keyframe_every = keyframe_every
        self.derive = derive
        self.on_unchanged = on_unchanged
        self.allow_pickle = allow_pickle
        self.host_memory_budget = host_memory_budget
        self.timeout = timeout
        self._save_id_used = False
        self._saving: _Saving | None = None
        self._options()  # a wrong option fails here, not in the first save

    def __getstate__(self) -> dict[str, Any]:
        """For the process executor: a save in flight belongs to the process that began it."""
        return self.__dict__ | {"_saving": None}

    def __del__(self) -> None:
        if getattr(self, "_saving", None) is not None:
            self._abandon()

    def _options(self) -> SaveOptions:
        return SaveOptions.of(
            overwrite=self.overwrite,
            base=self.base,
            codec=self.codec,
            full_every=self.full_every,
            keyframe_every=self.keyframe_every,
            derive=self.derive,
            on_unchanged=self.on_unchanged,
            allow_pickle=self.allow_pickle,
            host_memory_budget=self.host_memory_budget,
            timeout=self.timeout,
            verify_after_save=self.verify_after_save,
        )

    @property
    def checkpoint_id(self) -> str | os.PathLike[str]:
        return self.path

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Whether a checkpoint can be written there: a path of a mounted file system with a writable parent."""
        if "://" in str(checkpoint_id):
            return False
        path = os.path.abspath(os.fspath(checkpoint_id))
        while not os.path.lexists(path):
            path = os.path.dirname(path)
        return os.path.isdir(path) and os.access(path, os.W_OK)

    def storage_meta(self) -> StorageMeta:
        return StorageMeta(checkpoint_id=self.path, save_id=self.save_id)

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        self._abandon()
        if checkpoint_id:
            self.path = checkpoint_id
        self._new_save_id()

    def _new_save_id(self) -> None:
        self.save_id = uuid.uuid4().hex
        self._save_id_used = False

    def _abandon(self) -> None:
        """Lets go of a save that DCP ended without calling `finish`: another rank failed."""
        saving, self._saving = self._saving, None
        if saving is not None:
            saving.discard()

    # The literal name `kwargs` is how DCP tells that a writer wants to know its rank.
    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        self._abandon()
        self.is_coordinator = is_coordinator
        self.rank = kwargs.get("rank")
        self.use_collectives = kwargs.get("use_collectives", True)

    def _target(self) -> Target:
        path = os.path.abspath(os.fspath(self.path))
        if not self.use_collectives:
            path = os.path.join(path, rank_directory(self.rank or 0))
        return Target.of(path, self.step, self.metadata)

    # Planning ---------------------------------------------------------------------------------------------------------

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        if manifest.is_checkpoint(self._target().path) and not self.overwrite:
            raise RuntimeError(f"Checkpoint already exists and {self.overwrite=}.")
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Makes the staging directory. The plans pass unchanged: the layout of a file is its rank's own business."""
        target = self._target()
        target.remove_empty()  # many make the directory first, for torch's writer to fill
        target.check(overwrite=self.overwrite)
        target.make_parents()
        _native.reap(target.parent)
        Note.remove_stale(target.parent)
        options = self._options()
        base = choose(self._base_of_rank(options.base), target.parent, options.full_every)
        if self._save_id_used:
            self._new_save_id()
        self._save_id_used = True
        # Ranks on other hosts may write here, whose boots are not known: to a reaper the owners are strangers then.
        boots = [_native.boot_id()] if len(plans) == 1 else [_native.boot_id(), str(uuid.UUID(int=0))]
        staging = _native.Staging.create(target.parent, self.save_id, boots)
        note = Note(self.save_id, len(plans), base.path if base else "", base.facts() if base else None)
        self._saving = _Saving(target, self._deadline(), note, staging, leads=True)
        if len(plans) > 1:
            note.leave(target)
        return plans

    def _base_of_rank(self, base: str | None) -> str | None:
        if base in (None, "auto") or self.use_collectives:
            return base
        return os.path.join(base or "", rank_directory(self.rank or 0))

    def _deadline(self) -> Deadline:
        return Deadline(self._options().timeout_seconds)

    # Bytes ------------------------------------------------------------------------------------------------------------

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[Any]]:
        saving = self._saving or self._join()
        try:
            result = self._write(saving, plan, planner)
            if saving.status is not None and not saving.leads:
                saving.status.end(None)  # whether it is committed the coordinator knows
        except BaseException as error:
            if saving.status is not None:
                saving.status.end(error)
            # The others still write into the staging directory, and must fail with this error and none of their own:
            # it goes with the next use of this writer, or with the writer.
            if saving.note.world_size == 1:
                self._abandon()
            raise
        finally:
            if not saving.leads:
                saving.staging.close()
        future: Future[list[Any]] = Future()
        future.set_result([result])
        return future

    def _join(self) -> _Saving:
        target, deadline = self._target(), self._deadline()
        note, staging = Note.follow(target, deadline)
        self.save_id, self._save_id_used = note.save_id, True
        return _Saving(target, deadline, note, staging, leads=False)

    def _write(self, saving: _Saving, plan: SavePlan, planner: SavePlanner) -> dict[str, Any]:
        rank = (self.rank or 0) if self.use_collectives else 0
        options = self._options()
        trace = Trace("save", rank, saving.note.world_size)
        saving.status = status.begin(saving.target, rank, saving.note.world_size, trace)
        saving.status.save_id = saving.note.save_id
        # Without gradients a DTensor gives its local tensor as it is, and makes no view of it for autograd (8 us each).
        with trace.span("plan"), garbage.paused(), torch.no_grad():
            taken = Taken.of(plan, planner)
            objects = {
                name: {
                    "path": state.encode_path(taken.paths[name]),
                    "value": values.encode(value, name=name, allow_pickle=self.allow_pickle),
                }
                for name, value in taken.objects.items()
            }
            ties = tensors.tie_positions(taken.shards)
            key = _keys.of(taken.shards, taken.paths, ties, options.chunk_bytes)
            structure = _cache.known(rank).get(key)
            if structure is None:
                items = [shard.item for shard in taken.shards]
                structure = make_structure(
                    items, taken.paths, ties, list(range(len(items))), sum(i.nbytes for i in items), options.chunk_bytes
                )
            _cache.put(rank, key, structure)
            if options.derive:
                structure, trace.stats["derived_bytes"] = without_derived(
                    structure, taken.shards, taken.paths, ties, options.chunk_bytes
                )
        rung, trace.stats["passed_over"] = _native.choose_rung(saving.target.parent)
        note, step = saving.note, saving.target.step
        comparison = None
        if note.base is not None:
            base_id = note.base.save_id
            comparison = link(note.base_path, base_id, structure, saving.staging, rank, _memory, trace.stats)
        share = Share(
            structure,
            taken.shards,
            saving.staging,
            rank,
            rung,
            options,
            trace,
            keep_staged=False,
            comparison=comparison,
        )
        saving.status.writes(share)
        try:
            share.start()
            share.wait_written(saving.deadline, Progress(False, "save", 0))
            unchanged = owned_unchanged(structure, taken.paths, share.before(_memory), step, share.digests)
            share.drop_sparse_files(share.used_bytes(), saving.check_deadline)
            entry, stored = share.write_index(note.save_id, note.world_size, step, objects)
            saving.staging.sync([os.path.basename(one.name) for one in stored.shared])
            if options.verify_after_save:
                saving.read_back(entry, tuple(stored.shared), trace)
        finally:
            share.close()
            trace.close()
        _memory.put(rank, note.save_id, stored)
        result = {
            "save_id": note.save_id,
            "writer": entry.to_json(),
            "nbytes": structure.payload_bytes,
            "shared": [one.to_json() for one in stored.shared],
            "unchanged": unchanged,
        }
        if self.dcp_metadata:
            result["stored"] = taken.stored(plan, entry)
        return result

    def finish(self, metadata: Metadata, results: list[list[Any]]) -> None:
        saving = self._saving
        assert saving is not None
        entries = [entry for (entry,) in results]
        for rank, entry in enumerate(entries):
            if entry["save_id"] != saving.note.save_id:
                # An old note on a network file system, or two saves at once through one writer.
                raise CheckpointError("wrote into the directory of another save", path=saving.target.path, rank=rank)
        shared = manifest.shared_of(entry["shared"] for entry in entries)
        document = Manifest(
            save_id=saving.note.save_id,
            step=saving.target.step,
            world_size=len(entries),
            nbytes=sum(entry["nbytes"] for entry in entries),
            writers=tuple(manifest.writer_of(entry["writer"]) for entry in entries),
            metadata=saving.target.metadata,
            environment={},
            base=saving.note.base if shared else None,
            shared=shared,
        )
        try:
            found = [entry["unchanged"] for entry in entries]
            heed_unchanged(found, self.on_unchanged, document.step, saving.target.path, warn=True)
            marker = manifest.DCP_MARKER
            if self.dcp_metadata:
                marker = pickled(metadata, [entry["stored"] for entry in entries], self.storage_meta())
            saving.staging.write_file(manifest.DCP_MARKER_NAME, marker, "marker")
            data = document.to_bytes()
            saving.staging.keep_shared([(os.path.basename(entry.name), entry.nbytes) for entry in shared])
            digest = manifest.digest_line(data)
            saving.staging.commit(data, digest, saving.target.name, self.overwrite, self.verify_after_save)
            saving.note.remove(saving.target)
        except BaseException as error:
            if saving.status is not None:
                saving.status.end(error)
            self._abandon()
            raise
        if saving.status is not None:
            saving.status.end(None, nbytes=document.nbytes)
        saving.staging.close()
        self._saving = None
        if isinstance(metadata.state_dict_metadata, PlannedEntries):
            metadata.state_dict_metadata.compact = True  # DCP broadcasts it now, and no file holds it as a pickle
        metadata.version = VERSION
        metadata.storage_data = {}
        metadata.storage_meta = self.storage_meta()


def rank_directory(rank: int) -> str:
    """Where rank `rank` saves under the checkpoint's path when DCP runs without collectives."""
    return f"rank-{rank:05d}"
