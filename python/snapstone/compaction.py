"""`compact`: a checkpoint that shares no files with others any more.

The steps. A crash in 1 to 5 leaves the checkpoint as it was, and a staging directory that the next save into the run
removes; a crash after 6 leaves the compacted one, and the replaced one as trash.

  1. Open the checkpoint, and hold its directory open, so that whatever takes its place is told from it. Manifest and
     indexes are checked. Without shared files there is nothing to do.
  2. Make a staging directory beside it, as a save does (`csrc/store/staging.cc`). It gets the owner of the checkpoint,
     and each file owner and permissions of the one that it replaces; a process that may not do that stops here.
  3. For each writer: copy the chunks that its records name, its own and shared ones, into one data file; write an index
     of the same tensors and values, whose records say where the chunks are now. The DCP marker is copied too.
  4. Read every chunk of the copy and compare its digest, so that a bit that flipped in a shared file is reported and
     not copied for good.
  5. Look whether the checkpoint is still the one that was opened, so that nothing more is written if it is not.
  6. Commit by exchange, as a save with overwrite does: THE COMMIT POINT. It takes the place of the directory of step 1
     and of no other: it holds that directory's lock, for which such a save waits, looks right before the exchange
     whether it still stands there, and right after it whether it is what was taken; anything else is put back. Where
     nothing stands any more nothing is put. The replaced checkpoint is removed; files that other checkpoints share stay
     where those have them.
"""

from __future__ import annotations

import errno
import os
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from datetime import timedelta
from typing import Any, NamedTuple

import numpy as np

from . import _native, index, manifest
from .checkpoint import Checkpoint
from .collective import Deadline
from .config import FORMAT_MINOR, seconds_of
from .errors import (
    CheckpointError,
    CheckpointNotFoundError,
    CorruptCheckpointError,
    IncompatibleCheckpointError,
    IncompleteCheckpointError,
)
from .index import CHUNK_DTYPE, Index
from .manifest import FileEntry, Manifest
from .progress import Progress
from .reader import Reader
from .target import Target
from .trace import Trace

__all__ = ["compact"]


def compact(
    path: str | os.PathLike[str],
    *,
    timeout: timedelta | float | None = None,
    progress: bool | Callable[[int, int], None] = False,
) -> Checkpoint:
    """Makes the checkpoint at `path` independent of the files that it shares with others, in place.

    Everything that it needs is copied into data files of its own (on file systems that can share blocks, no block is
    written again), verified, and put in its place by one rename: at any moment the old or the new one is there, whole.
    The new one has the same tensors, values, step and metadata, owner and permissions, another `save_id`, and no base.
    A checkpoint that a save puts there meanwhile stays, and one that is removed meanwhile stays removed. It needs as
    much free space as the checkpoint has bytes; what the old one had alone is free afterwards. Other checkpoints do not
    change. A checkpoint that shares nothing is returned as it is.

    Args:
        path: a committed checkpoint. One process calls, whatever the world size of the save was.
        timeout: seconds after which it gives up, with everything as it was (SNAPSTONE_TIMEOUT, 1800 s).
        progress: True for a bar on a terminal, or a callback (bytes_done, bytes_total); every byte counts twice, when
            it is copied and when the copy is verified.

    Returns:
        The checkpoint. `stats`: "copied_bytes", seconds and bytes of "copy", "verify" and "commit".

    Raises:
        CheckpointNotFoundError, IncompleteCheckpointError: nothing, or nothing committed, is there, or not any more, or
            a file is gone.
        CorruptCheckpointError: a byte is not what was saved; names the file and the tensor. Nothing was changed.
        IncompatibleCheckpointError: a newer format.
        CheckpointError: another checkpoint took its place meanwhile, or the time was over.
        FileExistsError: files stand in the directory that are not the checkpoint's.
        PermissionError: it belongs to another user, and this process may not make files of theirs.
        OSError: it cannot be read, or the copy cannot be written (ENOSPC). EINVAL where the file system cannot exchange
            two directories (RENAME_EXCHANGE), as for a save with overwrite.
    """
    deadline = Deadline(seconds_of(timeout))
    place = os.path.realpath(path)
    replaced = _held(place)
    try:
        return _compact(place, replaced, deadline, progress)
    finally:
        replaced.close()


def _held(place: str) -> Any:
    try:
        return _native.Predecessor.open(*os.path.split(place))
    except OSError:
        manifest.read(place)  # says what is wrong with it as a checkpoint
        raise


def _compact(place: str, replaced: Any, deadline: Deadline, progress: bool | Callable[[int, int], None]) -> Checkpoint:
    source = Reader(place)
    if not source.manifest.shared:
        return Checkpoint(source)
    if source.manifest.format_version[1] > FORMAT_MINOR:
        major, minor = source.manifest.format_version
        raise IncompatibleCheckpointError(
            f"format {major}.{minor} is newer than this version writes ({major}.{FORMAT_MINOR}): what is new would be "
            "lost; update snapstone",
            path=source.path,
        )
    target = Target(source.path, source.manifest.step, source.manifest.metadata)
    target.check(overwrite=True)
    trace = Trace("compact", 0, 1)
    plans = [_plan(one) for one in source.indexes]
    total = sum(plan.nbytes for plan in plans)
    trace.stats["copied_bytes"] = total
    _native.reap(target.parent)
    staging = _native.Staging.create(target.parent, uuid.uuid4().hex, [_native.boot_id()])
    try:
        staging.succeed(replaced)
        with Progress(progress, "compact", 2 * total) as bar:
            compaction = _Compaction(source, staging, deadline, bar, trace)
            document = compaction.copy(plans)
            compaction.verify(document)
        with trace.span("commit"):
            compaction.check_time()
            data = document.to_bytes()
            try:
                staging.commit(data, manifest.digest_line(data), target.name, True)
            except OSError as error:
                if error.errno == errno.ESTALE:
                    raise _superseded(source.path) from None
                raise
    except BaseException:
        staging.discard()
        raise
    finally:
        staging.close()
        trace.close()
    return Checkpoint.committed(source.path, document, trace.stats)


def _superseded(path: str) -> CheckpointError:
    if os.path.lexists(path):
        return CheckpointError("another checkpoint took its place while it was compacted", path=path)
    return CheckpointNotFoundError("it was removed while it was compacted", path=path)


class _Plan(NamedTuple):
    """What one writer's data file is made of, and the chunk table that says so."""

    ranges: Any  # uint64 [n, 3]: number of the file in the old index, offset, bytes
    table: bytes
    nbytes: int


def _plan(one: Index) -> _Plan:
    """Each chunk once, in the order of the table; rows that are equal are one chunk."""
    records = np.frombuffer(one.table, CHUNK_DTYPE).copy()
    _, first, chunk = np.unique(records.view(f"V{CHUNK_DTYPE.itemsize}"), return_index=True, return_inverse=True)
    order = np.argsort(first)
    chunks = records[first[order]]
    nbytes = index.padded(chunks["stored_bytes"])
    ends = np.cumsum(nbytes)
    position = np.empty(len(order), np.int64)
    position[order] = np.arange(len(order))
    ranges = np.stack([chunks["file"].astype(np.uint64), chunks["offset"], nbytes], axis=1)
    records["file"] = 0
    records["offset"] = (ends - nbytes)[position[chunk]]
    return _Plan(ranges, records.tobytes(), int(nbytes.sum()))


class _Compaction:
    """Steps 3 and 4: `copy`, `verify`."""

    def __init__(self, source: Reader, staging: Any, deadline: Deadline, progress: Progress, trace: Trace) -> None:
        self._source = source
        self._staging = staging
        self._deadline = deadline
        self._progress = progress
        self._trace = trace
        self._copied = 0

    def copy(self, plans: list[_Plan]) -> Manifest:
        """Writes all files but the manifest, which it returns; the commit syncs the entries of all."""
        old = self._source.manifest
        writers = [self._copy_writer(*one) for one in zip(old.writers, self._source.indexes, plans, strict=True)]
        with suppress(FileNotFoundError):
            marker = _native.read_file(self._source.path, manifest.DCP_MARKER_NAME, _native.INDEX_HEADER_BYTES_MAX)
            self._staging.write_file(manifest.DCP_MARKER_NAME, marker, "marker")
        return replace(old, save_id=self._staging.save_id, writers=tuple(writers), base=None, shared=())

    def _copy_writer(self, writer: manifest.Writer, one: Index, plan: _Plan) -> manifest.Writer:
        data_name, index_name = f"rank-{writer.rank:05d}.data", f"rank-{writer.rank:05d}.index"
        paths = [os.path.join(self._source.path, name) for name in one.files]
        try:
            with self._trace.span("copy", plan.nbytes):
                sources = [os.path.split(path) for path in paths]
                self._staging.copy_ranges(data_name, sources, plan.ranges, self._copied_to)
        except OSError as error:
            if error.filename in paths and error.errno == errno.ENOENT:
                raise IncompleteCheckpointError("data file is missing", path=error.filename, rank=writer.rank) from None
            if error.filename in paths and error.errno in manifest.NOT_REGULAR_ERRNOS:
                reason = f"data file cannot be opened: {error.strerror}"
                raise CorruptCheckpointError(reason, path=error.filename, rank=writer.rank) from None
            raise
        self._copied += plan.nbytes
        data = index.encode(
            save_id=self._staging.save_id,
            rank=writer.rank,
            world_size=one.world_size,
            files=[data_name],
            chunk_bytes=one.chunk_bytes,
            tensors_json=index.encode_tensors(one.tensors),
            objects=one.objects,
            table=plan.table,
            references=one.references,
        )
        self._staging.write_file(index_name, data, "index")
        return manifest.Writer(
            writer.rank,
            FileEntry(index_name, len(data), _native.digest_hex(data)),
            (FileEntry(data_name, plan.nbytes, _native.digest_hex(plan.table)),),
        )

    def _copied_to(self, nbytes: int) -> None:
        self.check_time()
        self._progress.at(self._copied + nbytes)

    def verify(self, document: Manifest) -> None:
        """Raises CorruptCheckpointError if a byte of the copy is not what was saved."""
        copy = Reader(self._staging.path, document)
        for old, new in zip(self._source.indexes, copy.indexes, strict=True):
            if (old.tensors, old.objects) != (new.tensors, new.objects):
                raise CheckpointError("the copy would not hold the same tensors and values", path=self._source.path)
        bar = Progress(lambda done, _: self._progress.at(self._copied + done), "verify", self._copied)
        with self._trace.span("verify", self._copied):
            problems = self._scrub(copy, bar)
        if problems:
            # Where the bytes came from says whose they are; if nothing is wrong there, the copy itself went wrong.
            raise max(self._scrub(self._source, None) or problems, key=_depth)

    def _scrub(self, reader: Reader, bar: Progress | None) -> list[CorruptCheckpointError]:
        return reader.scrub(reader.start_scrub(), timeout_seconds=self._deadline.remaining(), progress=bar)

    def check_time(self) -> None:
        if self._deadline.expired:
            raise CheckpointError("not compacted: it took longer than the timeout", path=self._source.path)


def _depth(problem: CorruptCheckpointError) -> int:
    """A chunk that refers to a damaged one cannot be decoded either. References stand behind what refers to them."""
    return -1 if problem.chunk is None else problem.chunk
