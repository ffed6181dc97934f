"""A committed checkpoint opened for reading: its manifest, its indexes, and the bytes of any box of any tensor.

Everything that reads (`load`, `Checkpoint`, `verify`) goes through here, so there is one place where saved shards meet
wanted ones.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch

from . import _native, garbage, index, manifest, plan, tensors
from .config import PIPELINE_SLOTS
from .errors import (
    CheckpointError,
    CorruptCheckpointError,
    IncompatibleCheckpointError,
    IncompleteCheckpointError,
)
from .index import Index, StoredTensor
from .manifest import Manifest
from .plan import Box
from .progress import Progress
from .tensors import LocalShard
from .trace import Trace

__all__ = ["Reader", "SavedShard", "run_job"]

_DTYPE_BYTES: Mapping[str, int] = {name: tensors.dtype_bytes(name) for name in tensors.dtype_names()}
_DRAIN_SECONDS = 1.0  # after a failure, for requests that the kernel still has
_orphans: list[Any] = []
_POLL_SECONDS = 0.1  # between looks at Ctrl-C, the deadline and the progress callback


class SavedShard(NamedTuple):
    table: int
    stored: StoredTensor

    @property
    def box(self) -> Box:
        return Box(self.stored.item.offsets, self.stored.item.sizes)


class _Read(NamedTuple):
    """Where one overlap of a saved shard and a wanted one goes."""

    shard: SavedShard
    part: Box  # in global coordinates
    view: torch.Tensor  # of the target, exactly the part


@dataclass(slots=True)
class _Requests:
    rows: list[tuple[int, int, int, int, int, int]] = field(default_factory=list)
    boxes: list[Any] = field(default_factory=list)
    converted: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)  # (target, buffer read instead)


def run_job(
    job: Any, targets: Any, *, timeout_seconds: float, what: str, path: str, on_progress: Callable[[int], None]
) -> None:
    """Waits for a started job, awake for Ctrl-C; raises its error, or CheckpointError at the deadline.

    The job writes into `targets`. If the kernel does not give up its buffers soon after a failure, both are kept until
    it does: leaking memory is better than freeing what is still written to.
    """
    _orphans[:] = [orphan for orphan in _orphans if not orphan[0].finished]
    deadline = time.monotonic() + timeout_seconds
    try:
        while not job.wait(_POLL_SECONDS):
            on_progress(job.bytes_done)
            if time.monotonic() >= deadline:
                raise CheckpointError(f"{what} did not end within {timeout_seconds:g} s", path=path)
        on_progress(job.bytes_done)
    except BaseException:
        job.cancel()
        if not job.wait(_DRAIN_SECONDS):
            _orphans.append((job, targets))
        raise
    job.rethrow()


class Reader:
    """Opens and checks the manifest and all indexes at once; payload is read by `fill`."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.path.normpath(os.fspath(path))
        self.manifest: Manifest = manifest.read(self.path)
        self.indexes: list[Index] = []
        self.shards: dict[str, list[SavedShard]] = {}
        self.paths: dict[str, Any] = {}
        self._files: list[tuple[str, str, int]] = []
        self._tables: list[tuple[bytes, int, str]] = []
        for writer in self.manifest.writers:
            self._add_index(writer)

    def _add_index(self, writer: manifest.Writer) -> None:
        path = os.path.join(self.path, writer.index.name)
        parsed = index.parse(self._read_index(writer, path), path=path, dtype_bytes=_DTYPE_BYTES)
        expected = (
            self.manifest.save_id,
            writer.rank,
            self.manifest.world_size,
            tuple(entry.name for entry in writer.data),
        )
        actual = (parsed.save_id, parsed.rank, parsed.world_size, parsed.files)
        if expected != actual:
            raise CorruptCheckpointError(
                "index belongs to another save, rank or file",
                path=path,
                rank=writer.rank,
                expected=expected,
                actual=actual,
            )
        _native.check_chunk_table(parsed.table, [entry.nbytes for entry in writer.data], parsed.chunk_bytes, path)
        self._tables.append((parsed.table, len(self._files), path))
        self._files.extend((self.path, entry.name, entry.nbytes) for entry in writer.data)
        table = len(self.indexes)
        self.indexes.append(parsed)
        for stored in parsed.tensors:
            name = stored.item.name
            others = self.shards.setdefault(name, [])
            if others and (others[0].stored.item.dtype, others[0].stored.item.shape) != (
                stored.item.dtype,
                stored.item.shape,
            ):
                raise CorruptCheckpointError(
                    "shards disagree on dtype or shape", path=path, tensor=name, rank=writer.rank
                )
            others.append(SavedShard(table, stored))
            self.paths.setdefault(name, stored.path)

    def _read_index(self, writer: manifest.Writer, path: str) -> bytes:
        try:
            limit_nbytes = min(writer.index.nbytes, index.FILE_BYTES_MAX)
            data: bytes = _native.read_file(self.path, writer.index.name, limit_nbytes)
        except FileNotFoundError:
            raise IncompleteCheckpointError("index file is missing", path=path, rank=writer.rank) from None
        except OSError as error:
            raise _not_regular(error, "index file") or error from None
        except CorruptCheckpointError as error:
            error.rank = writer.rank
            raise
        actual = _native.digest_hex(data)
        if len(data) != writer.index.nbytes:
            raise CorruptCheckpointError(
                "index file has the wrong size",
                path=path,
                rank=writer.rank,
                expected=writer.index.nbytes,
                actual=len(data),
            )
        if actual != writer.index.xxh128:
            raise CorruptCheckpointError(
                "index digest mismatch", path=path, rank=writer.rank, expected=writer.index.xxh128, actual=actual
            )
        return data

    def describe(self, name: str) -> plan.TensorItem:
        """dtype and global shape of a stored tensor (offsets and sizes are those of its first shard)."""
        return self.shards[name][0].stored.item

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
        requests = _Requests()
        targets = list(targets)
        with garbage.paused():
            for target in targets:
                self._request(requests, target, cast)
        rung = read_rung(self.path)
        rows = np.array(requests.rows, dtype=np.uint64).reshape(-1, 6)
        job = self._make_job(rows, requests.boxes, rung, verify=verify, scrub=False, trace=trace)
        job.start()
        run_job(
            job,
            (targets, requests),
            timeout_seconds=timeout_seconds,
            what="load",
            path=self.path,
            on_progress=progress.at if progress else lambda done: None,
        )
        for target_tensor, buffer in requests.converted:
            target_tensor.copy_(buffer)
        if trace is not None:
            trace.add_job(job)
        return {"rung": rung, "bytes_read": job.bytes_read, "bytes_needed": job.bytes_needed, "chunks": job.chunk_count}

    def scrub(
        self, *, timeout_seconds: float = math.inf, progress: Progress | None = None
    ) -> list[CorruptCheckpointError]:
        """Reads every chunk of every file and checks digests and padding; what is wrong, named."""
        job = self._make_job(np.empty((0, 6), np.uint64), [], read_rung(self.path), verify=True, scrub=True, trace=None)
        job.start()
        run_job(
            job,
            None,
            timeout_seconds=timeout_seconds,
            what="verify",
            path=self.path,
            on_progress=progress.at if progress else lambda done: None,
        )
        problems = []
        for table, chunk, file, reason, expected, actual in job.problems():
            directory, name, _ = self._files[file]
            problems.append(
                CorruptCheckpointError(
                    reason,
                    path=os.path.join(directory, name),
                    chunk=chunk,
                    tensor=self._tensor_of(table, chunk),
                    rank=self.indexes[table].rank,
                    expected=expected or None,
                    actual=actual or None,
                )
            )
        return problems

    @property
    def stored_bytes(self) -> int:
        """Of all data files."""
        return sum(nbytes for _, _, nbytes in self._files)

    def _make_job(
        self, rows: Any, boxes: list[Any], rung: str, *, verify: bool, scrub: bool, trace: Trace | None
    ) -> Any:
        try:
            return _native.LoadJob(
                self._tables,
                self._files,
                rows,
                boxes,
                rung,
                verify,
                scrub,
                PIPELINE_SLOTS,
                trace is not None and trace.detailed,
            )
        except FileNotFoundError as error:
            raise IncompleteCheckpointError("data file is missing", path=error.filename) from None
        except OSError as error:
            raise _not_regular(error, "data file") or error from None

    def _request(self, requests: _Requests, target: LocalShard, cast: bool) -> None:
        item, tensor = target
        shards = self.shards[item.name]
        saved = shards[0].stored.item
        if saved == item and item.nbytes and tensor.is_contiguous() and not tensors.needs_copy(tensor):
            # The same shard in plain memory, which is nearly every tensor of a resumed run.
            requests.rows.append((shards[0].table, *shards[0].stored.place, item.nbytes, tensor.data_ptr()))
            return
        if item.nbytes == 0 and 0 in item.sizes:
            return
        tensors.check_target(item.name, tensor)
        if saved.dtype != item.dtype and not cast:
            raise IncompatibleCheckpointError(
                f"saved as {saved.dtype}, wanted as {item.dtype}; pass cast=True to convert",
                path=self.path,
                tensor=item.name,
            )
        if saved.dtype != item.dtype or tensors.needs_copy(tensor):
            buffer = torch.empty(item.sizes, dtype=tensors.dtype_named(saved.dtype))
            requests.converted.append((tensor.detach(), buffer))
            tensor = buffer
        wanted = Box(item.offsets, item.sizes)
        reads = list(self._overlaps(item.name, wanted, tensor))
        pair = plan.first_overlap([read.part for read in reads])
        if pair is not None:
            raise CorruptCheckpointError(f"saved shards overlap: {pair}", path=self.path, tensor=item.name)
        missing = wanted.volume - sum(read.part.volume for read in reads)
        for read in reads:
            self._add_read(requests, read)
        if missing > 0:
            raise IncompleteCheckpointError(
                f"{missing} of {wanted.volume} elements are in no saved shard", path=self.path, tensor=item.name
            )

    def _overlaps(self, name: str, wanted: Box, tensor: torch.Tensor) -> Iterable[_Read]:
        for shard in self.shards[name]:
            saved = shard.box
            if saved == wanted:
                yield _Read(shard, wanted, tensor)
                return
        seen: set[Box] = set()
        for shard in self.shards[name]:
            part = plan.overlap(shard.box, wanted)
            if part is None or part in seen:
                continue
            seen.add(part)
            view = tensor
            for dimension, (start, base, size) in enumerate(zip(part.offsets, wanted.offsets, part.sizes, strict=True)):
                view = view.narrow(dimension, start - base, size)
            yield _Read(shard, part, view)

    def _add_read(self, requests: _Requests, read: _Read) -> None:
        stored = read.shard.stored
        memory = tensors.memory_of(read.view)
        place = stored.place
        if memory.stride_bytes is None and read.part.sizes == stored.item.sizes:
            requests.rows.append((read.shard.table, *place, stored.item.nbytes, memory.data_ptr))
            return
        strides = memory.stride_bytes or tuple(s * memory.item_bytes for s in read.view.stride())
        offsets = tuple(a - b for a, b in zip(read.part.offsets, stored.item.offsets, strict=True))
        shard = (read.shard.table, *place, stored.item.nbytes)
        requests.boxes.append(
            (shard, memory.item_bytes, stored.item.sizes, offsets, read.part.sizes, memory.data_ptr, strides)
        )

    def _tensor_of(self, table: int, chunk: int) -> str | None:
        for stored in self.indexes[table].tensors:
            if stored.place.first_chunk <= chunk < stored.place.first_chunk + stored.place.chunk_count:
                return stored.item.name
        return None

    def name_tensor(self, error: CorruptCheckpointError) -> CorruptCheckpointError:
        """Adds tensor and rank to an error of the native half, which knows only file and chunk."""
        for table, (_, first_file, index_path) in enumerate(self._tables):
            names = [os.path.join(directory, name) for directory, name, _ in self._files[first_file:]][
                : len(self.indexes[table].files)
            ]
            if error.path == index_path or error.path in names:
                error.rank = self.indexes[table].rank
                if error.chunk is not None and error.tensor is None:
                    error.tensor = self._tensor_of(table, error.chunk)
        return error


def _not_regular(error: OSError, what: str) -> CorruptCheckpointError | None:
    """What to raise when a link, FIFO, device or directory stands in the place of a file; None for other errors."""
    if error.errno not in manifest.NOT_REGULAR_ERRNOS or error.filename is None:
        return None
    return CorruptCheckpointError(f"{what} cannot be opened: {error.strerror}", path=error.filename)


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
