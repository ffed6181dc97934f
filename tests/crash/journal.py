"""What csrc/os/journal.h records, read back: every change of a file system, in order."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from snapstone import _native

__all__ = ["Op", "mark", "packed", "read", "recorded"]

MARK, CREATE, MKDIR, UNLINK, RMDIR, RENAME, EXCHANGE, LINK, WRITE, ALLOCATE, TRUNCATE, SYNC = range(12)
_HEAD = struct.Struct("=IIQQQQIHH")


class Op(NamedTuple):
    kind: int
    process: int
    subject: int
    object: int
    offset: int
    data: bytes
    error: int
    name: str
    other: str


def read(path: Path) -> list[Op]:
    """Raises ValueError for a journal with nothing in it, or with half a record."""
    data, at, ops = path.read_bytes(), 0, []
    while at < len(data):
        kind, process, subject, obj, offset, nbytes, error, name_bytes, other_bytes = _HEAD.unpack_from(data, at)
        at += _HEAD.size
        end = at + name_bytes + other_bytes + nbytes
        if end > len(data):
            raise ValueError(f"{path} ends within a record")
        name = data[at : at + name_bytes].decode()
        other = data[at + name_bytes : at + name_bytes + other_bytes].decode()
        ops.append(Op(kind, process, subject, obj, offset, data[end - nbytes : end], error, name, other))
        at = end
    if not ops:
        raise ValueError(f"{path} holds nothing")
    return ops


def packed(
    kind: int, subject: int, name: str = "", other: str = "", *, obj: int = 0, offset: int = 0, data: bytes = b""
) -> bytes:
    """One record, of this process."""
    names = name.encode(), other.encode()
    sizes = len(data), 0, len(names[0]), len(names[1])
    return b"".join((_HEAD.pack(kind, os.getpid(), subject, obj, offset, *sizes), *names, data))


@contextmanager
def recorded(path: Path) -> Iterator[None]:
    """What this process does meanwhile goes to `path`, behind what is there."""
    _native.journal_start(str(path))
    try:
        yield
    finally:
        _native.journal_stop()


def mark(text: str) -> None:
    """Of this moment; nothing where nothing is recorded."""
    _native.journal_mark(text)
