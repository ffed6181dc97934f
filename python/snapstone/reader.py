"""A committed checkpoint opened for reading: its manifest, its indexes, and the bytes of any box of any tensor.

Everything that reads (`load`, `Checkpoint`, `verify`) goes through here, so there is one place where saved shards meet
wanted ones.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch

from . import _native, devices, garbage, index, manifest, orphans, plan, tensors
from .catalog import Catalog, Listing
from .config import PIPELINE_SLOTS, DeviceOptions
from .errors import (
    CheckpointError,
    CorruptCheckpointError,
    IncompatibleCheckpointError,
    IncompleteCheckpointError,
)
from .index import Index
from .index_file import files_of, not_regular, open_index
from .manifest import Manifest
from .plan import Box
from .progress import Progress
from .reads import Part, Reads, SavedShard, view_of
from .tensors import LocalShard
from .trace import Trace

__all__ = ["Reader", "run_job"]

_DRAIN_SECONDS = 1.0  # after a failure, for requests that the kernel still has
_CPU = torch.device("cpu")
_POLL_SECONDS = 0.1  # between looks at Ctrl-C, the deadline and the progress callback


def run_job(
    job: Any, targets: Any, *, timeout_seconds: float, what: str, path: str, on_progress: Callable[[int], None]
) -> None:
    """Waits for a started job, awake for Ctrl-C; raises its error, or CheckpointError at the deadline.

    The job writes into `targets`. If kernel or devices do not give up its memory soon after a failure, both are kept
    until they do: leaking memory is better than freeing what is still written to.
    """
    deadline = time.monotonic() + timeout_seconds
    try:
        orphans.sweep()
        while not job.wait(_POLL_SECONDS):
            on_progress(job.bytes_done)
            if time.monotonic() >= deadline:
                raise CheckpointError(f"{what} did not end within {timeout_seconds:g} s", path=path)
        on_progress(job.bytes_done)
        job.rethrow()
    except BaseException:
        _let_go(job, targets)
        del targets  # which the error's traceback would keep
        raise


def _let_go(job: Any, targets: Any) -> None:
    job.cancel()
    orphans.let_go(job, targets, _is_free, _DRAIN_SECONDS)


def _is_free(job: Any) -> bool:
    return _native.fault_skipped("keep", "load/hung_targets") or bool(job.finished and job.settled)


class Reader:
    """A checkpoint whose manifest and indexes are open and checked; payload is read by `fill`.

    Alone it opens all indexes itself. With a `catalog` others have opened them: `indexes` have no tensors then.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        document: Manifest | None = None,
        indexes: Sequence[Index] | None = None,
        catalog: Catalog | None = None,
    ) -> None:
        self.path = os.path.normpath(os.fspath(path))
        self.manifest: Manifest = document or manifest.read(self.path)
        if indexes is None:
            indexes = [open_index(self.path, self.manifest, writer) for writer in self.manifest.writers]
        self.indexes: list[Index] = list(indexes)
        self.is_shared = catalog is not None
        self.shards: Catalog | Listing = catalog or Listing(self.path, self.indexes)
        self._identity: tuple[int, ...] = ()  # of the manifest's file
        self._files: list[tuple[str, str, int]] = []
        self._tables: list[tuple[bytes, int, str]] = []
        self._records: dict[int, Any] = {}  # of tables that were read through
        for writer, parsed in zip(self.manifest.writers, self.indexes, strict=True):
            self._tables.append((parsed.table, len(self._files), os.path.join(self.path, writer.index.name)))
            entries = files_of(self.manifest, writer, parsed)
            self._files.extend((self.path, entry.name, entry.nbytes) for entry in entries)

    def describe(self, name: str) -> plan.TensorItem:
        """dtype and global shape of a stored tensor (offsets and sizes are those of its first shard)."""
        return self.shards.describe(name)

    def objects(self, rank: int) -> dict[str, tuple[Any, Any]]:
        """name -> (path, typed JSON) as `rank` saved it; what only other ranks saved comes from the lowest of them."""
        order = [i for i in self.indexes if i.rank == rank] + [i for i in self.indexes if i.rank != rank]
        found: dict[str, tuple[Any, Any]] = {}
        for one in order:
            for name, entry in one.objects.items():
                if type(entry) is not dict or "value" not in entry:
                    raise CorruptCheckpointError(f"object {name[:80]!r} has no value", path=self.path, rank=one.rank)
                found.setdefault(name, (entry.get("path"), entry["value"]))
        return found

    def fill(
        self,
        targets: Iterable[LocalShard],
        *,
        cast: bool = False,
        verify: bool = True,
        timeout_seconds: float = math.inf,
        progress: Progress | None = None,
        trace: Trace | None = None,
    ) -> dict[str, Any]:
        """Reads what `targets` need, each chunk once, into their memory. Returns statistics of the read.

        Raises:
            IncompleteCheckpointError: the saved shards do not cover a target.
            IncompatibleCheckpointError: dtypes differ and `cast` is False.
            CorruptCheckpointError: a digest does not match; nothing of that chunk reached a tensor.
        """
        reads = Reads()
        targets = list(targets)
        with garbage.paused():
            for target in self.masters_first(targets):
                self._add_target(reads, target, cast)
        job = self.start(reads, verify=verify, trace=trace)
        try:
            self.wait(job, (targets, reads), timeout_seconds=timeout_seconds, progress=progress)
        finally:
            if job.finished:  # well or not: what was written of targets comes before what these streams do next
                for ordinal, stream in devices.current_streams(job.devices).items():
                    job.fence(ordinal, stream)
        reads.finish()
        if trace is not None:
            trace.add_job(job)
        return {
            **({"devices": job.devices} if job.devices else {}),
            "rung": self.rung,
            "bytes_read": job.bytes_read,
            "bytes_needed": job.bytes_needed,
            "chunks": job.chunk_count,
        }

    def start(self, reads: Reads, *, verify: bool = True, trace: Trace | None = None) -> Any:
        """A job that has begun to read. Whatever it fills must stay alive until `wait` returns. What is on devices is
        filled after what this thread's current streams have been given, and there for those that its `fence` is called
        for then.
        """
        tables = reads.tables()
        job = self._make_job(tables, *reads.arguments(tables), verify=verify, scrub=False, trace=trace)
        if not verify:
            self._check_identity()
        for ordinal, stream in devices.current_streams(job.devices).items():
            job.mark(ordinal, stream)
        job.start()
        return job

    def wait(
        self, job: Any, targets: Any, *, timeout_seconds: float = math.inf, progress: Progress | None = None
    ) -> None:
        """Until `job` has read all; raises as `fill` does. `targets` is kept alive if the kernel still writes there."""
        try:
            run_job(
                job,
                targets,
                timeout_seconds=timeout_seconds,
                what="load",
                path=self.path,
                on_progress=progress.at if progress else lambda done: None,
            )
        except CorruptCheckpointError as error:
            self._check_identity()
            raise self._name_tensor(error, job) from None
        finally:
            del targets  # as in run_job

    def _check_identity(self) -> None:
        """Raises CheckpointError if another checkpoint stands in the place of this one, so that files which were just
        opened by name may be the other's.
        """
        try:
            stat = os.stat(os.path.join(self.path, manifest.MANIFEST_NAME))
        except FileNotFoundError:
            raise CheckpointError("the checkpoint was removed while it was read", path=self.path) from None
        identity = stat.st_dev, stat.st_ino, stat.st_mtime_ns
        if identity == self._identity:
            return
        if manifest.read(self.path).save_id != self.manifest.save_id:
            raise CheckpointError("the checkpoint was replaced while it was read", path=self.path)
        self._identity = identity

    def abandon(self, job: Any, targets: Any) -> None:
        """Ends a job whose bytes nobody wants any more."""
        _let_go(job, targets)

    def raw_bytes(self, table: int) -> Any:
        """Of each chunk of an index, decoded."""
        return np.frombuffer(self.indexes[table].table, index.CHUNK_DTYPE)["raw_bytes"]

    def stored_nbytes(self, target: LocalShard) -> int:
        """Of a target's elements in the saved dtype; where it is derived, the most that may be read for it."""
        item = target.item
        saved = index.MASTER_DTYPE if self._is_derived(item.name) else self.describe(item.name).dtype
        return math.prod(item.sizes) * tensors.dtype_bytes(saved)

    def probe(self, scratch: torch.Tensor, names: Iterable[str], *, timeout_seconds: float = math.inf) -> int:
        """Reads chunks of one of the tensors into `scratch` (uint8), to see how fast that goes; returns the bytes."""
        for name in names:
            for shard in self.shards[name]:
                place = shard.stored.place
                raw = self.raw_bytes(shard.table)[place.first_chunk : place.first_chunk + place.chunk_count]
                count = int(np.searchsorted(np.cumsum(raw, dtype=np.int64), scratch.numel(), side="right"))
                if count > 1:
                    reads = Reads()
                    reads.add_whole(shard, scratch.data_ptr(), (place.first_chunk, count))
                    job = self.start(reads)
                    self.wait(job, (scratch, reads), timeout_seconds=timeout_seconds)
                    return int(job.bytes_needed)
        return 0

    def start_scrub(self, read_back_files: int | None = None) -> Any:
        """A job that reads every chunk that this checkpoint uses, for `scrub`; `bytes_read` says how much that is. With
        `read_back_files` only those in so many first files of each writer, and from the device.
        """
        every = list(range(len(self._tables)))
        nothing = np.empty((0, 8), np.uint64)
        job = self._make_job(
            every, nothing, [], None, verify=True, scrub=True, trace=None, read_back_files=read_back_files
        )
        job.start()
        return job

    def scrub(
        self, job: Any, *, timeout_seconds: float = math.inf, progress: Progress | None = None
    ) -> list[CorruptCheckpointError]:
        """Waits until `job` has checked digests and padding of all chunks; what is wrong, named."""
        run_job(
            job,
            None,
            timeout_seconds=timeout_seconds,
            what="verify",
            path=self.path,
            on_progress=progress.at if progress else lambda done: None,
        )
        numbers = self._table_numbers
        return [
            CorruptCheckpointError(
                reason,
                path=path,
                chunk=chunk,
                tensor=self._tensor_of(numbers[index_path], chunk),
                rank=self.indexes[numbers[index_path]].rank,
                expected=expected or None,
                actual=actual or None,
            )
            for index_path, path, chunk, reason, expected, actual in job.problems()
        ]

    def file_of(self, shard: SavedShard) -> str:
        """The name of the file in which a shard begins, from the checkpoint's directory on; of one without bytes, that
        of its index.
        """
        first_chunk, chunk_count, _ = shard.stored.place
        if chunk_count == 0:
            return self.manifest.writers[shard.table].index.name
        record = np.frombuffer(self.indexes[shard.table].table, index.CHUNK_DTYPE)[first_chunk]
        return self.indexes[shard.table].files[int(record["file"])]

    @cached_property
    def rung(self) -> str:
        """The kind of I/O that the file system takes."""
        return read_rung(self.path)

    def _make_job(
        self,
        tables: list[int],
        rows: Any,
        boxes: list[Any],
        targets_on: Any,
        *,
        verify: bool,
        scrub: bool,
        trace: Trace | None,
        read_back_files: int | None = None,
    ) -> Any:
        """`tables`: those that rows and boxes number; of their files the job opens those that its chunks are in.
        `targets_on`: the devices of rows and boxes.
        """
        files: list[tuple[str, str, int]] = []
        used = []
        for table in tables:
            data, first_file, path = self._tables[table]
            if table not in self._records:
                self._records[table] = _native.ChunkRecords(data, self.indexes[table].references)
            used.append((self._records[table], len(files), path))
            files += self._files[first_file : first_file + len(self.indexes[table].files)]
        try:
            detailed = trace is not None and trace.detailed
            return _native.LoadJob(
                used,
                files,
                rows,
                boxes,
                self.rung,
                verify,
                scrub,
                PIPELINE_SLOTS,
                detailed,
                targets_on,
                targets_on is None or DeviceOptions.of().digest != "host",
                read_back_files,
            )
        except FileNotFoundError as error:
            raise IncompleteCheckpointError(
                "data file is missing", path=error.filename, rank=self._rank_of(error.filename, tables)
            ) from None
        except CorruptCheckpointError as error:
            if error.rank is None:
                error.rank = self._rank_of(error.path, tables)
            raise
        except OSError as error:
            refusal = not_regular(error, "data file")
            if refusal is None:
                raise
            refusal.rank = self._rank_of(error.filename, tables)
            raise refusal from None

    @cached_property
    def _table_numbers(self) -> dict[str, int]:
        """By the path of the index."""
        return {path: table for table, (_, _, path) in enumerate(self._tables)}

    def _add_target(self, reads: Reads, target: LocalShard, cast: bool) -> None:
        item, tensor = target
        first = self.shards.first(item.name)
        same = first.stored.item == item and item.nbytes and first.stored.derived_from is None
        if same and tensor.is_contiguous() and not self._needs_buffer(tensor, on_device=True):
            # The same shard in plain memory, which is nearly every tensor of a resumed run.
            reads.add_whole(first, tensor.data_ptr(), device=tensor.get_device())
            self._keep_master(reads, item.name, first.box, tensor)
            return
        for part, view in self.parts_of(target, reads, cast=cast, on_device=True):
            reads.add(part, tensors.memory_of(view))

    @staticmethod
    def _needs_buffer(tensor: torch.Tensor, *, on_device: bool) -> bool:
        """Whether what is read cannot go straight into the tensor's memory."""
        return tensors.needs_copy(tensor) and not (
            on_device and devices.is_reached(tensor) and not tensors.is_lazy(tensor)
        )

    def parts_of(
        self, target: LocalShard, reads: Reads, *, cast: bool, on_device: bool = False
    ) -> list[tuple[Part, torch.Tensor]]:
        """What a target consists of: parts of saved shards, and the memory for each in the saved dtype, which may be a
        buffer on the host that `reads` converts at its end; with `on_device` not for what jobs fill on its device. Of a
        derived shard these are parts of its master. Raises as `fill` does.
        """
        item, tensor = target
        if item.nbytes == 0 and 0 in item.sizes:
            return []
        saved = self.describe(item.name)
        tensors.check_target(item.name, tensor)
        if saved.dtype != item.dtype and not cast:
            raise IncompatibleCheckpointError(
                f"saved as {saved.dtype}, wanted as {item.dtype}; pass cast=True to convert",
                path=self.path,
                tensor=item.name,
            )
        wanted = Box(item.offsets, item.sizes)
        memory = target_memory = tensor.detach()
        if saved.dtype != item.dtype or self._needs_buffer(tensor, on_device=on_device):
            memory = torch.empty(item.sizes, dtype=tensors.dtype_named(saved.dtype))
        self._keep_master(reads, item.name, wanted, memory)
        parts = []
        for part in self.locate(item.name, wanted):
            view = view_of(memory, wanted, part.box)
            master = part.shard.stored.derived_from
            if master is None:
                parts.append((part, view))
                continue
            exact = reads.masters.get((master, part.box))
            if exact is None:
                of_master = self.locate(master, part.box)  # before memory is made for what may not be there
                exact = torch.empty(part.box.sizes, dtype=tensors.dtype_named(index.MASTER_DTYPE))
                parts += [(one, view_of(exact, part.box, one.box)) for one in of_master]
            reads.converted.append((view, exact))
        if memory is not target_memory:
            reads.converted.append((target_memory, memory))
        return parts

    def masters_first(self, targets: Sequence[LocalShard]) -> Sequence[LocalShard]:
        """An order in which a derived tensor finds its master's memory, where both are wanted."""
        return sorted(targets, key=lambda one: self._is_derived(one.item.name)) if self.shards.has_derived else targets

    def _is_derived(self, name: str) -> bool:
        """Also of a tensor of which only some shards are."""
        shards = self.shards[name] if self.shards.has_derived else ()
        return any(shard.stored.derived_from is not None for shard in shards)

    def _keep_master(self, reads: Reads, name: str, box: Box, memory: torch.Tensor) -> None:
        """`memory` will hold the box of a tensor, in the saved dtype, when everything is read."""
        if self.shards.has_derived and memory.dtype == tensors.dtype_named(index.MASTER_DTYPE):
            reads.masters[name, box] = memory.detach()

    def empty(self, item: plan.TensorItem, device: torch.device = _CPU) -> torch.Tensor:
        """Memory for a box, on the device if jobs fill it there, else on the host. Raises as `fill` does where that is
        in no saved shard: a header can claim any size.
        """
        if 0 not in item.sizes:
            self.parts_read(item.name, Box(item.offsets, item.sizes))
        at = device if device.type == "cuda" and not devices.absence() else _CPU
        return torch.empty(item.sizes, dtype=tensors.dtype_named(item.dtype), device=at)

    def parts_read(self, name: str, wanted: Box) -> list[Part]:
        """What `locate` finds, with parts of the masters in the place of derived ones."""
        parts: list[Part] = []
        for part in self.locate(name, wanted):
            master = part.shard.stored.derived_from
            parts += [part] if master is None else self.locate(master, part.box)
        return parts

    def locate(self, name: str, wanted: Box) -> list[Part]:
        """The parts of saved shards that make up a box of a tensor, each element once.

        Raises:
            IncompleteCheckpointError: an element is in no shard. CorruptCheckpointError: shards overlap.
        """
        near = self.shards.near(name, wanted)
        for shard in near:
            if shard.box == wanted:
                return [Part(shard, wanted)]
        found: dict[Box, Part] = {}
        for shard in near:
            box = plan.overlap(shard.box, wanted)
            if box is not None:
                found.setdefault(box, Part(shard, box))
        pair = plan.first_overlap(list(found))
        if pair is not None:
            raise CorruptCheckpointError(f"saved shards overlap: {pair}", path=self.path, tensor=name)
        missing = wanted.volume - sum(box.volume for box in found)
        if missing > 0:
            raise IncompleteCheckpointError(
                f"{missing} of {wanted.volume} elements are in no saved shard", path=self.path, tensor=name
            )
        return list(found.values())

    def _tensor_of(self, table: int, chunk: int) -> str | None:
        return self.shards.tensor_of(table, chunk)

    def _name_tensor(self, error: CorruptCheckpointError, job: Any) -> CorruptCheckpointError:
        """Adds tensor and rank to an error of the native half, which knows only file and chunk."""
        for index_path, path, chunk, reason, _, _ in job.problems():
            if (path, chunk, reason) == (error.path, error.chunk, error.args[0]):
                table = self._table_numbers[index_path]
                error.rank = self.indexes[table].rank
                error.tensor = self._tensor_of(table, chunk)
        return error

    def _rank_of(self, path: str | None, tables: Iterable[int]) -> int | None:
        """The first of the ranks with these tables that uses a file, or a file in a directory, or has an index."""
        for table in tables:
            _, first_file, index_path = self._tables[table]
            files = self._files[first_file : first_file + len(self.indexes[table].files)]
            paths = {os.path.join(directory, name) for directory, name, _ in files}
            if path == index_path or path in paths or path in {os.path.dirname(one) for one in paths} - {self.path}:
                return self.indexes[table].rank
        return None


def read_rung(path: str) -> str:
    """The I/O rung for a checkpoint directory; where nothing may be written beside it, the probe of its own directory
    decides.
    """
    for directory in (os.path.dirname(os.path.abspath(path)), path):
        try:
            rung: str = _native.choose_rung(directory)[0]
            return rung
        except OSError:
            continue
    return "buffered"
