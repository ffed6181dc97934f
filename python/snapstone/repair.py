"""`repair`: a damaged checkpoint put right with bytes from elsewhere, or by turning a flipped bit back.

The steps, for each damaged file. A crash before 4 changes nothing; one in 4 leaves the damaged or the repaired file
under each name, and a staging directory that the next save into the run removes.

  1. Make a staging directory beside the checkpoint, as a save does.
  2. Write a new file there: the chunks that are right, and those that are found elsewhere with the same digest. Files
     are never written in place, because other checkpoints may have the same file under names of their own.
  3. Sync it, drop it from the page cache, read all chunks back and compare their digests.
  4. Give it the name of the damaged file by one rename, in every checkpoint of the run that has that file; in this one
     last, whose damage says until then what is left to do. The damaged file keeps a name in the staging directory until
     the repaired one was read under its new name.

Directories are opened before anything in them is judged, and files go into these alone: a save that meanwhile takes the
name of a checkpoint is left as it is.
"""

from __future__ import annotations

import errno
import os
import stat
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from . import _native, index, manifest
from .chunks import Chunk, Chunks, Library, checkpoints_in, digest_of, neighbours, read_range
from .diagnosis import flipped_bit
from .errors import CheckpointError, CheckpointNotFoundError
from .reader import Reader
from .root_repair import repair_root
from .verify import verify

__all__ = ["RepairReport", "repair"]

_LEVELS = (3, 1, *range(2, 20), *range(-7, 0), 20, 21, 22)  # of zstd, the usual ones first
_PATCH_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class RepairReport:
    """Truthy when nothing is wrong any more. `repaired`: what was put right, and how. `problems`: what is still wrong.
    `checkpoints`: all that a repaired file was put into.
    """

    path: str
    repaired: tuple[str, ...]
    problems: tuple[str, ...]
    checkpoints: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return not self.problems


def repair(
    path: str | os.PathLike[str],
    *,
    sources: Sequence[str | os.PathLike[str]] = (),
    progress: bool | Callable[[int, int], None] = False,
) -> RepairReport:
    """Puts right what is damaged in the checkpoint at `path`, as far as that can be done.

    A chunk is taken from any checkpoint that holds the same digest: those of `sources` and those beside this one. A
    single flipped bit is turned back without any. A damaged manifest or index needs a copy of this checkpoint. Damaged
    files are replaced, never written to; other checkpoints of the run that share one get the repaired one, too. What
    could not be repaired stays as it was.

    Args:
        path: a committed checkpoint. One process calls, and nothing may remove it meanwhile. Where another checkpoint
            takes its name, that one is left alone.
        sources: directories of checkpoints, or of runs, that may hold the same bytes: replicas, copies, earlier runs.
        progress: True for a bar on a terminal, or a callback (bytes_done, bytes_total) of the verifications.

    Raises:
        CheckpointNotFoundError: nothing is there. OSError: it cannot be read, no file can be written (ENOSPC) or given
            to the owner of the damaged one (EPERM), another checkpoint or repair took the place (ESTALE).
    """
    path = os.path.realpath(path)
    if not os.path.lexists(path):
        raise CheckpointNotFoundError(path=path)
    others = [one for source in sources for one in checkpoints_in(os.path.realpath(source))] + neighbours(path)
    _native.reap(os.path.dirname(path))
    work = _Repair(path, others)
    try:
        work.run()
    finally:
        work.close()
    report = verify(path, progress=progress, diagnosis=False)
    problems = [*report.problems, *(dict.fromkeys(work.lost) if not report else ())]
    return RepairReport(path, tuple(work.repaired), (*problems, *work.elsewhere), tuple(sorted(work.checkpoints)))


class _Place(NamedTuple):
    """Where bytes of the repaired file come from: a file and an offset."""

    path: str
    offset: int


class _Repair:
    def __init__(self, path: str, others: Sequence[str]) -> None:
        self.repaired: list[str] = []
        self.lost: list[str] = []
        self.elsewhere: list[str] = []
        self.checkpoints: set[str] = set()
        self._path = path
        self._others = others
        self._directories: dict[str, int] = {}  # descriptors, by path
        self._hold(path)
        self._made: Any = None
        self._count = 0
        self._raw: dict[bytes, bytes | None] = {}  # of references, by digest

    @property
    def _staging(self) -> Any:
        if self._made is None:
            self._made = _native.Staging.create(os.path.dirname(self._path), uuid.uuid4().hex, [_native.boot_id()])
        return self._made

    def close(self) -> None:
        if self._made is not None:
            self._made.discard()
            self._made.close()
        for descriptor in self._directories.values():
            os.close(descriptor)
        self._directories.clear()

    def _hold(self, checkpoint: str) -> None:
        if checkpoint not in self._directories:
            self._directories[checkpoint] = os.open(checkpoint, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    def _stands(self, checkpoint: str) -> bool:
        """Whether its name still means the directory that was opened."""
        try:
            return os.path.samestat(os.stat(checkpoint), os.fstat(self._directories[checkpoint]))
        except FileNotFoundError:
            return False

    def run(self) -> None:
        self.repaired += repair_root(self._path, self._others, self._put)
        try:
            reader = Reader(self._path)
        except CheckpointError as error:
            self.lost.append(f"{error}: needs a copy of this checkpoint")
            return
        self._own = Chunks(reader)
        self._library = Library([self._own], self._others)
        entries = [entry for writer in reader.manifest.writers for entry in writer.data] + list(reader.manifest.shared)
        for entry in entries:
            self._repair_file(entry)

    def _put(self, name: str, data: bytes) -> None:
        """A small file of the checkpoint, anew."""
        new = self._new_name()
        self._staging.write_file(new, data, "repaired_file")
        self._give(new, os.path.join(self._path, name))
        self._staging.sync()
        self._place(new, self._path, name)
        self._check_it_stands()

    def _new_name(self) -> str:
        self._count += 1
        return f"repaired-{self._count}"

    def _check_it_stands(self) -> None:
        if not self._stands(self._path):
            raise _stale(self._path)

    def _give(self, new: str, damaged: str) -> None:
        """To the owner of the damaged file, or of the manifest where that is missing, with its mode."""
        like = _facts(damaged) or _facts(os.path.join(self._path, manifest.MANIFEST_NAME))
        descriptor = os.open(os.path.join(self._staging.path, new), os.O_RDONLY | os.O_CLOEXEC)
        try:
            if like is not None:
                own = os.fstat(descriptor)
                if own.st_uid != like.st_uid or (own.st_gid != like.st_gid and os.geteuid() == 0):
                    os.fchown(descriptor, like.st_uid, like.st_gid)
                os.fchmod(descriptor, stat.S_IMODE(like.st_mode))
                _native.sync_file(descriptor, os.path.join(self._staging.path, new), "repaired_mode")
        finally:
            os.close(descriptor)

    def _place(self, new: str, checkpoint: str, name: str, damaged: tuple[int, int] | None = None) -> str:
        aside = f"damaged-{self._count}-{len(self.checkpoints)}-{uuid.uuid4().hex[:8]}"
        descriptor = self._directories[checkpoint]
        try:
            _native.replace_file(self._staging, new, descriptor, checkpoint, name, aside, damaged)
        except FileNotFoundError:
            if self._stands(checkpoint):
                raise
            raise _stale(checkpoint) from None  # and the directory that was opened is removed
        self.checkpoints.add(checkpoint)
        return aside

    def _repair_file(self, entry: Any) -> None:
        path = os.path.join(self._own.reader.path, entry.name)
        facts = _facts(path)  # of the file that is judged from here on
        users, links = self._users(entry)
        chunks: dict[int, Chunk] = {}
        for user, name in users:
            for chunk in user.of_file(name):
                chunks.setdefault(chunk.offset, chunk)
        ordered = [chunks[offset] for offset in sorted(chunks)]
        wrong = [chunk for chunk in ordered if not self._is_right(chunk, path)]
        size = _size(path)
        if not wrong and size == entry.nbytes:
            return
        places, fixed = self._find(wrong, path)
        if not fixed and (wrong or size < 0):
            return
        still = {chunk.offset for chunk in wrong} - places.keys()
        if any(_fails(chunk, path) for chunk in wrong if chunk.offset in still):
            self.lost.append(f"{path}: cannot be read now, and may be later: it was left as it is")
            return
        cut = [(chunk.offset, _padded(chunk, path)) for chunk in wrong if chunk.offset in still]
        places |= self._patches([(offset, data) for offset, data in cut if data])
        new = self._write(entry.nbytes, path, ordered, places)
        self._check(new, ordered, still)
        right = [chunk for chunk in ordered if chunk.offset not in still]
        for user, name in users[::-1]:
            self._replace(new, user.reader.path, name, facts, right)
        self._check_it_stands()
        self.repaired += fixed or [f"{path}: its size"]
        if links > len(users):
            self.elsewhere.append(
                f"{path}: {links - len(users)} more names of the damaged file are in no checkpoint beside this one "
                "(find -samefile); they were left as they are"
            )

    def _replace(
        self, new: str, checkpoint: str, name: str, damaged: os.stat_result | None, right: list[Chunk]
    ) -> None:
        """In one checkpoint. One whose name means another by now has been replaced by a save, and lacks nothing."""
        placed = os.path.join(checkpoint, name)
        try:
            aside = self._place(new, checkpoint, name, damaged and (damaged.st_dev, damaged.st_ino))
        except OSError as error:
            if error.errno != errno.ESTALE or checkpoint == self._path:
                raise
            if self._stands(checkpoint) and not all(self._is_right(chunk, placed) for chunk in right):
                self.elsewhere.append(f"{placed}: another file took its place, and is not right either")
            return
        if self._stands(checkpoint) and not all(self._is_right(chunk, placed) for chunk in right):
            self._place(aside, checkpoint, name)
            raise CheckpointError("the repaired file could not be read back; the damaged one is back", path=placed)

    def _users(self, entry: Any) -> tuple[list[tuple[Chunks, str]], int]:
        """The checkpoints of the run that have this file, with its name there; and the number of all its names."""
        users = [(self._own, entry.name)]
        facts = _facts(os.path.join(self._own.reader.path, entry.name))
        if facts is None:
            return users, 0
        if facts.st_nlink == 1:
            return users, 1
        for path in checkpoints_in(os.path.dirname(self._own.reader.path)):
            for name in _data_files(path):
                if path != self._own.reader.path and _is_same(os.path.join(path, name), facts):
                    try:
                        self._hold(path)
                        users.append((Chunks(Reader(path)), name))
                    except (CheckpointError, OSError) as error:
                        self.elsewhere.append(f"{path}: has the damaged {name}, and cannot be opened itself: {error}")
        return users, facts.st_nlink

    def _is_right(self, chunk: Chunk, path: str) -> bool:
        try:
            if chunk.stored(path) and self._decodes(chunk, chunk.stored(path)):
                padded = read_range(path, chunk.offset, chunk.padded_bytes)
                return len(padded) == chunk.padded_bytes and not any(padded[chunk.stored_bytes :])
        except OSError:
            pass
        return False

    def _decodes(self, chunk: Chunk, stored: bytes) -> bool:
        reference = None
        if chunk.reference is not None:
            reference = self._raw_of(chunk.reference)
            if reference is None:
                return True  # nothing can be said of it; the reference is what is reported
        try:
            return digest_of(chunk.decoded(stored, reference)) == chunk.digest
        except CheckpointError:
            return False

    def _raw_of(self, chunk: Chunk) -> bytes | None:
        """The raw bytes of a reference, from wherever they are right."""
        if chunk.digest not in self._raw:
            if len(self._raw) > 64:
                self._raw.clear()
            self._raw[chunk.digest] = self._recovered(chunk)
        return self._raw[chunk.digest]

    def _recovered(self, chunk: Chunk) -> bytes | None:
        try:
            stored = chunk.stored()
            reference = None if chunk.reference is None else self._raw_of(chunk.reference)
            if chunk.reference is None or reference is not None:
                raw = chunk.decoded(stored, reference)
                if digest_of(raw) == chunk.digest:
                    return raw
        except (CheckpointError, OSError):
            stored = b""
        for _, raw in self._copies(chunk):
            return raw
        bit, _ = flipped_bit(chunk, stored, None) if stored and chunk.codec == 0 else (None, True)
        return None if bit is None else _flipped(stored, bit)

    def _copies(self, chunk: Chunk) -> Iterator[tuple[Chunk, bytes]]:
        """All chunks with the same digest that are right, with their raw bytes."""
        for other in self._library.with_digest(chunk.digest, chunk.raw_bytes):
            try:
                yield other, other.raw()
            except (CheckpointError, OSError):
                continue

    def _find(self, wrong: list[Chunk], path: str) -> tuple[dict[int, _Place], list[str]]:
        """Where the stored bytes of damaged chunks are, by offset; and what is said of them."""
        places: dict[int, _Place] = {}
        said = []
        pending: list[tuple[int, bytes]] = []
        for chunk in wrong:
            found = self._find_one(chunk, path)
            if found is None:
                self.lost.append(f"{chunk.describe()}: no good copy was found")
                continue
            how, where = found
            said.append(f"{chunk.describe()}: {how}")
            if isinstance(where, _Place):
                places[chunk.offset] = where
                continue
            pending.append((chunk.offset, where + bytes(chunk.padded_bytes - len(where))))
            if sum(len(data) for _, data in pending) >= _PATCH_BYTES:
                places |= self._patches(pending)
                pending = []
        return places | self._patches(pending), said

    def _find_one(self, chunk: Chunk, path: str) -> tuple[str, bytes | _Place] | None:
        try:
            stored = chunk.stored(path)
        except OSError:
            stored = b""
        if len(stored) == chunk.stored_bytes and self._decodes(chunk, stored):
            return "zeros behind it", stored
        reference = None if chunk.reference is None else self._raw_of(chunk.reference)
        copy: bytes | None = None
        for other, raw in self._copies(chunk):
            if other.path == path and other.offset == chunk.offset:
                continue
            where = f"copied from {other.describe()}"
            if (other.codec, other.stored_bytes) == (chunk.codec, chunk.stored_bytes) and _same_reference(other, chunk):
                padded = read_range(other.path, other.offset, other.padded_bytes)
                if len(padded) == other.padded_bytes and not any(padded[other.stored_bytes :]):
                    return where, _Place(other.path, other.offset)
                return where, padded[: other.stored_bytes]
            if copy is None:
                copy = _encoded(chunk, raw, reference)
                if copy is not None:
                    return f"{where}, encoded again", copy
        if len(stored) == chunk.stored_bytes and (chunk.reference is None or reference is not None):
            bit, _ = flipped_bit(chunk, stored, reference)
            if bit is not None:
                return f"bit {bit % 8} of byte {bit // 8} flipped back", _flipped(stored, bit)
        return None

    def _patches(self, pending: list[tuple[int, bytes]]) -> dict[int, _Place]:
        """A file of these bytes, all of whole pages."""
        if not pending:
            return {}
        name = f"patch-{uuid.uuid4().hex}"
        self._staging.write_file(name, b"".join(data for _, data in pending), "repaired_patch")
        places = {}
        at = 0
        for offset, data in pending:
            places[offset] = _Place(os.path.join(self._staging.path, name), at)
            at += len(data)
        return places

    def _write(self, nbytes: int, path: str, chunks: list[Chunk], places: dict[int, _Place]) -> str:
        """The name of the repaired file in the staging directory. What no chunk of these covers is zero there."""
        paths = list(dict.fromkeys([place.path for place in places.values()]))
        size = _size(path)
        if size > 0:
            paths.append(path)
        zeros = len(paths)
        ranges = []
        at = 0
        for chunk in chunks:
            place = places.get(chunk.offset)
            if place is None and chunk.offset + chunk.padded_bytes <= size:
                place = _Place(path, chunk.offset)
            ranges.append((zeros, 0, chunk.offset - at))
            source = (zeros, 0) if place is None else (paths.index(place.path), place.offset)
            ranges.append((*source, chunk.padded_bytes))
            at = chunk.offset + chunk.padded_bytes
        ranges.append((zeros, 0, -(-(nbytes - at) // index.PAGE_BYTES) * index.PAGE_BYTES))
        new = self._new_name()
        rows = np.array([row for row in ranges if row[2]], np.uint64).reshape(-1, 3)
        self._staging.copy_ranges(new, [os.path.split(one) for one in paths], rows)
        self._give(new, path)
        self._staging.sync()
        return new

    def _check(self, new: str, chunks: list[Chunk], still: set[int]) -> None:
        """Reads the new file back from the disk."""
        path = os.path.join(self._staging.path, new)
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)
        if any(not self._is_right(chunk, path) for chunk in chunks if chunk.offset not in still):
            raise CheckpointError("the repaired file has wrong bytes; nothing was replaced", path=path)


def _stale(checkpoint: str) -> OSError:
    return OSError(errno.ESTALE, "another checkpoint took the place of the one under repair", checkpoint)


def _facts(path: str) -> os.stat_result | None:
    """Of a regular file; None where none stands."""
    try:
        facts = os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    return facts if stat.S_ISREG(facts.st_mode) else None


def _size(path: str) -> int:
    """Of a regular file; -1 where none stands."""
    facts = _facts(path)
    return -1 if facts is None else facts.st_size


def _padded(chunk: Chunk, path: str) -> bytes:
    """What is there of a chunk in which its file ends, and zeros; nothing of all others."""
    data = read_range(path, chunk.offset, chunk.padded_bytes)
    return data + bytes(chunk.padded_bytes - len(data)) if 0 < len(data) < chunk.padded_bytes else b""


def _fails(chunk: Chunk, path: str) -> bool:
    """Whether its bytes are there and cannot be read."""
    try:
        read_range(path, chunk.offset, chunk.padded_bytes)
    except OSError:
        return True
    return False


def _flipped(data: bytes, bit: int) -> bytes:
    return data[: bit // 8] + bytes([data[bit // 8] ^ 1 << bit % 8]) + data[bit // 8 + 1 :]


def _same_reference(one: Chunk, other: Chunk) -> bool:
    first, second = one.reference, other.reference
    return (first is None and second is None) or bool(first and second and first.digest == second.digest)


def _encoded(chunk: Chunk, raw: bytes, reference: bytes | None) -> bytes | None:
    """`raw` as the chunk's record says that it is stored; None if no level of the codec gives that size."""
    if chunk.codec == 0:
        return raw
    if chunk.reference is not None and reference is None:
        return None
    for level in _LEVELS:
        stored: bytes | None = _native.encode_chunk(raw, chunk.codec, level, reference)
        if stored is not None and len(stored) == chunk.stored_bytes:
            return stored
    return None


def _data_files(checkpoint: str) -> list[str]:
    """As they are in the directory, whatever its manifest says."""
    found = []
    for directory in ("", manifest.BASE_NAME):
        try:
            names = os.listdir(os.path.join(checkpoint, directory))
        except OSError:
            continue
        found += [os.path.join(directory, name) for name in sorted(names) if name.endswith(".data")]
    return found


def _is_same(path: str, facts: os.stat_result) -> bool:
    try:
        own = os.lstat(path)
    except OSError:
        return False
    return (own.st_dev, own.st_ino) == (facts.st_dev, facts.st_ino)
