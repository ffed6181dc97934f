"""One rank's part of one save: describe, agree, stage, write, vote, commit.

The steps match the protocol at the top of `csrc/store/staging.cc`. A rank that fails at any of them votes its error,
so that its peers raise RankFailedError instead of waiting.
"""

from __future__ import annotations

import json
import os
import threading
import uuid
from collections.abc import Callable
from concurrent.futures import CancelledError
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from . import _native, devices, garbage, manifest, state, status, tensors, values
from .agreement import assign
from .base import Memory, Stored, choose, link, sharing_stats
from .collective import Channel, Deadline, Group
from .config import SaveOptions
from .errors import CheckpointError, RankFailedError
from .manifest import Manifest
from .outcome import Outcome
from .progress import Progress
from .read_back import read_back
from .share import Share
from .staleness import heed_unchanged, owned_unchanged
from .structure import Structure, StructureCache, StructureKeys, describe_all, make_structure, without_derived
from .target import Target
from .tensors import LocalShard
from .trace import Trace

__all__ = ["VOTES", "Writer"]

# Of one save, in this order; "assign" only for a new structure, "shared" only with a base.
VOTES = ("plan", "assign", "open", "shared", "written")

_cache = StructureCache()
_keys = StructureKeys()
_memory = Memory()


class Writer:
    """Runs the steps `take`, `open`, `start`, `wait_snapshot`, `wait_staged`, `finish`, `close`, in this order, from
    one thread at a time. `fence` is for any thread.
    """

    def __init__(self, target: Target, options: SaveOptions, group: Group, channel: Channel, trace: Trace) -> None:
        self.target = target
        self.options = options
        self.group = group
        self.channel = channel
        self.trace = trace
        self.deadline = Deadline(options.timeout_seconds)
        self._share: Share | None = None
        self._staging: Any = None
        self._structure: Structure | None = None
        self._base: manifest.Base | None = None  # with one every rank votes "shared"
        self._base_path = ""
        self._used_bytes: dict[str, int] = {}  # of shared files, by all ranks
        self._stored: Stored | None = None
        self._known: dict[str, Structure] = {}
        self._flattened = state.Flattened()
        self._marked: devices.Marked | None = None
        self._error: BaseException | None = None
        self._objects: dict[str, Any] = {}
        self._committed_bytes: int | None = None  # on the rank that committed
        self._ties: list[int] = []
        self._shards: list[LocalShard] = []
        self._commit_lock = threading.Lock()
        self._state = "open"  # -> "committing" or "cancelled"
        self._announced = False
        self._status = status.begin(target, group.rank, group.world_size, trace)
        self.save_id = ""
        self.rung = ""

    # Describe and agree -----------------------------------------------------------------------------------------------

    def mark(self) -> None:
        """What this thread's current streams have been given by now is in the snapshot, on whatever thread the next
        steps run. A failure is kept for the vote in `open`.
        """
        try:
            self._marked = devices.Marked()
        except BaseException as failure:
            self._error = self._error or failure

    def beside(self) -> AbstractContextManager[None]:
        """For the steps until `start`, on another thread: their copies follow the mark."""
        return nullcontext() if self._marked is None else self._marked.beside()

    def take(self, make: Callable[[], state.Flattened]) -> None:
        """Takes the state and encodes its Python values, which may change after this. A failure is kept for the vote
        in `open`.
        """
        try:
            with self.trace.span("plan"), garbage.paused():
                self._flattened = make()
                self._objects = encode_objects(self._flattened, self.options.allow_pickle)
        except BaseException as failure:
            self._error = failure

    @property
    def failed(self) -> bool:
        return self._error is not None

    def open(self, *, keep_staged: bool, deferred: bool = False) -> None:
        """Agrees with all ranks on who writes what, opens the staging directory and prepares the data file.

        With `keep_staged` the whole state gets staging memory if the budget allows; `deferred`: see `Share`.
        """
        hello = b""
        try:
            if self._error is None:
                with self.trace.span("plan"), garbage.paused():
                    hello = self._describe()
        except BaseException as failure:
            self._error = failure
        hellos = [json.loads(one) for one in self._vote("plan", self._error, hello)]
        self._check_same_target(hellos)
        self._agree_on_structure(hellos)
        self._open_staging(hellos)
        if self.group.rank != 0:
            # Rank 0 stores its values; the others only those that differ from rank 0's, such as RNG states.
            common, mine = hellos[0]["objects"], hellos[self.group.rank]["objects"]
            self._objects = {name: entry for name, entry in self._objects.items() if common.get(name) != mine[name]}
        try:
            self._prepare(keep_staged, deferred)
        except BaseException as failure:
            # From here on the others write, and hear of this in the vote of `finish`; alone there is nobody to tell.
            self._error = failure
            if self.group.world_size == 1:
                raise

    def _prepare(self, keep_staged: bool, deferred: bool) -> None:
        if self._staging is None:
            self._staging = self.target.join_staging(self.save_id, self.deadline, self._check_joinable)
            self.rung, self.trace.stats["passed_over"] = _native.choose_rung(self.target.parent)
        assert self._structure is not None
        if self.options.derive:
            with self.trace.span("derive"), garbage.paused():
                self._structure, self.trace.stats["derived_bytes"] = without_derived(
                    self._structure, self._shards, self._flattened.paths, self._ties, self.options.chunk_bytes
                )
        comparison = None
        if self._base is not None:
            with self.trace.span("compare"):
                comparison = link(
                    self._base_path,
                    self._base.save_id,
                    self._structure,
                    self._staging,
                    self.group.rank,
                    _memory,
                    self.trace.stats,
                )
        self._share = Share(
            self._structure,
            self._shards,
            self._staging,
            self.group.rank,
            self.rung,
            self.options,
            self.trace,
            keep_staged=keep_staged,
            comparison=comparison,
            deferred=deferred,
        )
        self._status.save_id = self.save_id
        self._status.writes(self._share)

    def _check_joinable(self) -> None:
        """Raises why there will be no staging directory any more."""
        self.channel.raise_if_failed("written" if self._base is None else "shared", self.deadline)
        if (withdrawn := self._outcome().withdrawal()) is not None:
            raise withdrawn

    def _describe(self) -> bytes:
        self._shards = describe_all(self._flattened)
        self._ties = tensors.tie_positions(self._shards)
        self._known = _cache.known(self.group.rank)
        return _json(
            {
                "key": _keys.of(self._shards, self._flattened.paths, self._ties, self.options.chunk_bytes),
                "known": list(self._known),
                "boot": _native.boot_id(),
                "target": [
                    self.target.path,
                    self.target.step,
                    self.options.overwrite,
                    self.options.base,
                    self.options.on_unchanged,
                ],
                "objects": {name: _native.digest_hex(_json(entry)) for name, entry in self._objects.items()},
            }
        )

    def _agree_on_structure(self, hellos: list[Any]) -> None:
        key = _native.digest_hex("/".join(hello["key"] for hello in hellos).encode())
        if all(key in hello["known"] for hello in hellos):
            self._structure = self._known[key]
        else:
            with self.trace.span("plan"), garbage.paused():
                items = [shard.item for shard in self._shards]
                positions, payload_bytes = assign(self.channel, self.deadline, items, self._ties)
                self._structure = make_structure(
                    items, self._flattened.paths, self._ties, positions, payload_bytes, self.options.chunk_bytes
                )
        _cache.put(self.group.rank, key, self._structure)

    def _open_staging(self, hellos: list[Any]) -> None:
        """Step 1 of the protocol; every rank ends with the staging directory open."""
        error: BaseException | None = None
        answer = b""
        if self.group.rank == 0:
            try:
                self.target.check(overwrite=self.options.overwrite)
                self.target.make_parents()
                _native.reap(self.target.parent)
                self.save_id = uuid.uuid4().hex
                self.rung, self.trace.stats["passed_over"] = _native.choose_rung(self.target.parent)
                base = choose(self.options.base, self.target.parent, self.options.full_every)
                boots = sorted({hello["boot"] for hello in hellos})
                self._staging = _native.Staging.create(self.target.parent, self.save_id, boots)
                facts = None if base is None else {"path": base.path, **base.facts().to_json()}
                answer = _json({"save_id": self.save_id, "base": facts})
            except BaseException as failure:
                error = failure
        opened = json.loads(self._vote("open", error, answer)[0])
        self.save_id = opened["save_id"]
        if opened["base"] is not None:
            self._base_path = opened["base"].pop("path")
            self._base = manifest.Base(**opened["base"])

    def _check_same_target(self, hellos: list[Any]) -> None:
        """The same answer on every rank, so there is nothing to vote on."""
        (first, *others), wanted = self.group.ranks, hellos[0]["target"]
        for rank, hello in zip(others, hellos[1:], strict=True):
            if hello["target"] != wanted:
                raise ValueError(
                    f"ranks {first} and {rank} save different checkpoints: (path, step, overwrite, base, on_unchanged) "
                    f"is {wanted} on one and {hello['target']} on the other; give the same everywhere"
                )

    # Bytes ------------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        if self._error is None:
            assert self._share is not None
            self._share.start()

    def wait_snapshot(self) -> None:
        """Returns when streams that `fence` was called for may change the state. Errors surface in `finish`."""
        if self._error is None:
            assert self._share is not None
            if not self._share.wait_snapshot(self.deadline):
                self._error = self._outcome().too_late()

    def fence(self) -> None:
        """What this thread's current streams are given from now on may change the state; after `wait_snapshot`."""
        share = self._share
        if share is not None:
            share.fence()

    def wait_staged(self) -> None:
        """Returns when the state may change, and lets go of it. Errors surface in `finish`."""
        if self._error is None:
            assert self._share is not None
            if not self._share.wait_staged(self.deadline):
                self._error = self._outcome().too_late()
        if self.staged:
            assert self._share is not None
            self._share.release()
            self.trace.tell("staged", self.target.path, self._structure.payload_bytes if self._structure else 0)
            self._shards = []
            self._flattened = state.Flattened(paths=self._flattened.paths)
            self._marked = None

    @property
    def staged(self) -> bool:
        return self._share is not None and self._share.staged

    @property
    def payload_bytes(self) -> int:
        """Of this rank's share."""
        return self._structure.layout.payload_bytes if self._structure else 0

    def _wait_written(self, share: Share, progress: Progress) -> None:
        try:
            share.wait_written(self.deadline, progress)
        except CancelledError:
            raise self._cancelled() if self._state == "cancelled" else self._outcome().too_late() from None
        except CheckpointError:
            if not self.deadline.expired:
                raise
            raise self._outcome().too_late() from None

    # Vote and commit --------------------------------------------------------------------------------------------------

    def finish(self, progress: Progress) -> Manifest:
        """Steps 2 to 8: waits for the data file, writes the index, votes, commits. The manifest of the committed
        checkpoint.
        """
        error = self._error
        entry = b""
        try:
            if error is not None:
                raise error
            assert self._share is not None
            self._wait_written(self._share, progress)
        except BaseException as failure:
            error = failure
        if self._base is not None:
            self._agree_on_shared(error)
        try:
            if error is not None:
                raise error
            entry = self._write_rest()
            if self.group.rank != 0:
                self._enter_commit()  # by its vote a rank gives the decision to rank 0
        except BaseException as failure:
            error = failure
        try:
            votes = self._vote_bytes("written", error, entry)
        except RankFailedError:
            if self.channel.lost and error is None and (committed := self._outcome().on_disk()):
                return committed
            raise
        with self.trace.span("commit"):
            document = self._commit([json.loads(vote) for vote in votes])
        if self._stored is not None:
            _memory.put(self.group.rank, self.save_id, self._stored)
        return document

    def _agree_on_shared(self, error: BaseException | None) -> None:
        """How much of each shared file all ranks together use."""
        used = {} if error is not None or self._share is None else self._share.used_bytes()
        for vote in self._vote_bytes("shared", error, _json(used)):
            for name, nbytes in json.loads(vote).items():
                self._used_bytes[name] = self._used_bytes.get(name, 0) + nbytes

    def _write_rest(self) -> bytes:
        """What is left to write once the data file is there; what this rank's vote says."""
        share, step = self._share, self.target.step
        assert share is not None
        assert self._structure is not None
        before = share.before(_memory)
        unchanged = owned_unchanged(self._structure, self._flattened.paths, before, step, share.digests)
        share.drop_sparse_files(self._used_bytes, self._check_wanted)
        entry, self._stored = share.write_index(self.save_id, self.group.world_size, step, self._objects)
        with self.trace.span("sync"):
            self._staging.sync([os.path.basename(one.name) for one in self._stored.shared])
        if self.options.verify_after_save:
            self._read_back(entry, tuple(self._stored.shared))
        return _json(
            {
                "writer": entry.to_json(),
                "shared": [one.to_json() for one in self._stored.shared],
                "unchanged": unchanged,
            }
        )

    def _read_back(self, entry: manifest.Writer, shared: tuple[manifest.FileEntry, ...]) -> None:
        read_back(
            self._staging.path,
            entry,
            shared,
            save_id=self.save_id,
            world_size=self.group.world_size,
            deadline=self.deadline,
            trace=self.trace,
        )

    def _vote_bytes(self, label: str, error: BaseException | None, payload: bytes) -> list[bytes]:
        error = self._outcome().explain_removal(error, label)
        with self.trace.span("vote"):
            return self._vote(label, error, payload)

    def _commit(self, entries: list[Any]) -> Manifest:
        heed_unchanged(
            [entry["unchanged"] for entry in entries],
            self.options.on_unchanged,
            self.target.step,
            self.target.path,
            warn=self.group.rank == 0,
        )
        shared = manifest.shared_of(entry["shared"] for entry in entries)
        document = Manifest(
            save_id=self.save_id,
            step=self.target.step,
            world_size=self.group.world_size,
            nbytes=self._structure.payload_bytes if self._structure else 0,
            writers=tuple(manifest.writer_of(entry["writer"]) for entry in entries),
            metadata=self.target.metadata,
            environment={},
            base=self._base if shared else None,
            shared=shared,
        )
        if self._base is not None:
            self.trace.stats |= sharing_stats(document, self._used_bytes)
        if self.group.rank != 0:
            self._outcome().hear()
            return document
        error: BaseException | None = None
        try:
            self._enter_commit()
            options = self.options
            self._outcome().commit(
                document,
                overwrite=options.overwrite,
                dcp_marker=options.dcp_marker,
                read_back=options.verify_after_save,
            )
            self._committed_bytes = document.nbytes
        except BaseException as failure:
            error = self._outcome().explain_withdrawal(failure)
        self._announced = True
        self._outcome().announce(error)
        if error is not None:
            raise error
        return document

    def _outcome(self) -> Outcome:
        return Outcome(self.target, self.save_id, self._staging, self.group, self.channel, self.deadline)

    def _enter_commit(self) -> None:
        with self._commit_lock:
            self._check_wanted()
            self._state = "committing"

    def _check_wanted(self) -> None:
        if self._state == "cancelled":
            raise self._cancelled()
        if self.deadline.expired:
            raise self._outcome().too_late()

    def _cancelled(self) -> CheckpointError:
        return CheckpointError("cancelled before the commit", path=self.target.path, rank=self.group.rank)

    def cancel(self) -> bool:
        with self._commit_lock:
            if self._state == "committing":
                return False
            self._state = "cancelled"
        share = self._share
        if share is not None:
            share.cancel()
        return True

    def close(self, error: BaseException | None) -> None:
        """Lets go of everything. After an error every rank hears of it that has not, and rank 0 removes the staging
        directory, under those who may still write into it.
        """
        self._status.end(error, cancelled=self._state == "cancelled", nbytes=self._committed_bytes)
        if error is not None:
            self._tell(error)
        share, self._share = self._share, None
        if share is not None:
            share.close()
        self._shards = []
        self._flattened = state.Flattened()
        if self._staging is not None:
            if error is not None and self.group.rank == 0:
                self._staging.discard()
            self._staging.close()
        self._staging = None
        self.channel.close()
        self.trace.close()

    def _tell(self, error: BaseException) -> None:
        """The other ranks hear of an error that was in no vote, Ctrl-C above all."""
        if not self.channel.failed:
            self.channel.abort(VOTES, error)
            if self.group.rank == 0 and not self._announced:  # the last vote may be won, and they wait for the outcome
                self._outcome().announce(error)

    def _vote(self, label: str, error: BaseException | None, payload: bytes) -> list[bytes]:
        with self.trace.within("vote"):
            return self.channel.vote(label, error, payload, self.deadline)


def _json(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


def encode_objects(flattened: state.Flattened, allow_pickle: bool) -> dict[str, Any]:
    return {
        name: {
            "path": state.encode_path(flattened.paths[name]),
            "value": values.encode(value, name=name, allow_pickle=allow_pickle),
        }
        for name, value in flattened.objects.items()
    }
