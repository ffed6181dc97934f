"""The chunks of committed checkpoints one by one, and where else the same bytes are. For diagnosis and repair, which
look at few chunks, and at files that may be shorter than recorded or that the disk refuses to read.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from . import _native, index, manifest
from .errors import CheckpointError, CorruptCheckpointError
from .reader import Reader

__all__ = ["Chunk", "Chunks", "Library", "checkpoints_in", "digest_of", "exclusive_or", "neighbours", "read_range"]

_NEIGHBOURS_MAX = 64
_FIRST_XOR_CODEC = 5


class Chunk(NamedTuple):
    """One record of the table of `chunks` with that number."""

    chunks: Chunks
    table: int
    number: int

    @property
    def row(self) -> Any:
        return self.chunks.tables[self.table][self.number]

    @property
    def digest(self) -> bytes:
        return bytes(self.row["digest"].tobytes())

    @property
    def codec(self) -> int:
        return int(self.row["codec"])

    @property
    def offset(self) -> int:
        return int(self.row["offset"])

    @property
    def stored_bytes(self) -> int:
        return int(self.row["stored_bytes"])

    @property
    def padded_bytes(self) -> int:
        return -(-self.stored_bytes // index.PAGE_BYTES) * index.PAGE_BYTES

    @property
    def raw_bytes(self) -> int:
        return int(self.row["raw_bytes"])

    @property
    def file_name(self) -> str:
        """From the directory of the checkpoint on."""
        return self.chunks.reader.indexes[self.table].files[int(self.row["file"])]

    @property
    def path(self) -> str:
        return os.path.join(self.chunks.reader.path, self.file_name)

    @property
    def reference(self) -> Chunk | None:
        number = self.chunks.references(self.table).get(self.number)
        return None if number is None else Chunk(self.chunks, self.table, number)

    def describe(self) -> str:
        tensor = self.chunks.reader.shards.tensor_of(self.table, self.number)
        return f"chunk {self.number} of {self.path}" + (f", tensor {tensor!r}" if tensor else "")

    def stored(self, path: str | None = None) -> bytes:
        """As they are now; fewer than recorded where the file ends. OSError when they cannot be read."""
        return read_range(path or self.path, self.offset, self.stored_bytes)

    def decoded(self, stored: bytes, reference: bytes | None = None) -> bytes:
        """The raw bytes that `stored` gives, right or wrong. CorruptCheckpointError when it gives none."""
        if len(stored) < self.stored_bytes:
            raise CorruptCheckpointError("the file ends in this chunk", path=self.path, chunk=self.number)
        raw: bytes = _native.decode_chunk(stored, self.codec, self.raw_bytes) if self.codec else stored
        if self.codec < _FIRST_XOR_CODEC:
            return raw
        if reference is None:
            assert self.reference is not None
            reference = self.reference.raw()
        return exclusive_or(raw, reference)

    def raw(self) -> bytes:
        """Verified. Raises CorruptCheckpointError when they are not what was saved, OSError."""
        raw = self.decoded(self.stored())
        if digest_of(raw) != self.digest:
            raise CorruptCheckpointError("digest mismatch", path=self.path, chunk=self.number)
        return raw


class Chunks:
    """Of one open checkpoint."""

    def __init__(self, reader: Reader) -> None:
        self.reader = reader
        self.tables = [np.frombuffer(one.table, index.CHUNK_DTYPE) for one in reader.indexes]
        self._references: dict[int, dict[int, int]] = {}

    def references(self, table: int) -> dict[int, int]:
        """The number of the reference of each record that has one."""
        if table not in self._references:
            first = len(self.tables[table]) - self.reader.indexes[table].references
            records = np.flatnonzero(self.tables[table]["codec"] >= _FIRST_XOR_CODEC).tolist()
            self._references[table] = {number: first + k for k, number in enumerate(records)}
        return self._references[table]

    def of_file(self, name: str) -> list[Chunk]:
        """The chunks that this checkpoint has in one of its files, each once, by offset."""
        found: dict[int, Chunk] = {}
        for table, parsed in enumerate(self.reader.indexes):
            if name in parsed.files:
                number = parsed.files.index(name)
                for record in np.flatnonzero(self.tables[table]["file"] == number).tolist():
                    chunk = Chunk(self, table, record)
                    found.setdefault(chunk.offset, chunk)
        return [found[offset] for offset in sorted(found)]

    @cached_property
    def _by_digest(self) -> dict[bytes, list[tuple[int, int]]]:
        found: dict[bytes, list[tuple[int, int]]] = {}
        for table, rows in enumerate(self.tables):
            for number, digest in enumerate(rows["digest"].tolist()):
                found.setdefault(bytes(digest), []).append((table, number))
        return found

    def with_digest(self, digest: bytes, raw_bytes: int) -> Iterator[Chunk]:
        for place in self._by_digest.get(digest, ()):
            chunk = Chunk(self, *place)
            if chunk.raw_bytes == raw_bytes:
                yield chunk


class Library:
    """Checkpoints in which chunks are looked for, each opened when it is needed; what cannot be opened has none."""

    def __init__(self, first: Iterable[Chunks], paths: Iterable[str]) -> None:
        self._opened = list(first)
        known = {chunks.reader.path for chunks in self._opened}
        self._paths = [path for path in dict.fromkeys(map(os.path.normpath, paths)) if path not in known]

    def __iter__(self) -> Iterator[Chunks]:
        for position in range(len(self._opened) + len(self._paths)):
            while position >= len(self._opened):
                if not self._paths:
                    return
                try:
                    self._opened.append(Chunks(Reader(self._paths.pop(0))))
                except (CheckpointError, OSError):
                    continue
            yield self._opened[position]

    def with_digest(self, digest: bytes, raw_bytes: int) -> Iterator[Chunk]:
        for chunks in self:
            yield from chunks.with_digest(digest, raw_bytes)


def digest_of(data: bytes) -> bytes:
    return bytes.fromhex(_native.digest_hex(data))


def exclusive_or(left: bytes, right: bytes) -> bytes:
    return bytes(np.bitwise_xor(np.frombuffer(left, np.uint8), np.frombuffer(right, np.uint8)).tobytes())


def read_range(path: str, offset: int, nbytes: int) -> bytes:
    """Fewer bytes where the file ends, none where there is no regular file. Other failures are OSError."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if isinstance(error, FileNotFoundError) or error.errno in manifest.NOT_REGULAR_ERRNOS:
            return b""
        raise
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            return b""
        data = b""
        while len(data) < nbytes and (more := os.pread(descriptor, nbytes - len(data), offset + len(data))):
            data += more
        return data
    finally:
        os.close(descriptor)


def checkpoints_in(path: str) -> list[str]:
    """`path` itself when it is a committed checkpoint, else those directly in it."""
    if manifest.is_checkpoint(path):
        return [path]
    try:
        names = sorted(os.listdir(path))
    except OSError:
        return []
    return [os.path.join(path, name) for name in names if manifest.is_checkpoint(os.path.join(path, name))]


def neighbours(path: str) -> list[str]:
    """The checkpoints beside this one: those that were committed at about the same time."""

    def committed(one: str) -> float:
        try:
            return os.lstat(os.path.join(one, manifest.MANIFEST_NAME)).st_mtime
        except OSError:
            return 0.0

    path = os.path.realpath(path)
    own = committed(path)
    others = [one for one in checkpoints_in(os.path.dirname(path)) if one != path]
    return sorted(others, key=lambda one: abs(committed(one) - own))[:_NEIGHBOURS_MAX]
