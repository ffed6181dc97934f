"""Damaged manifests and indexes put right: from a copy of the checkpoint, or by turning a flipped bit back."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence

from . import _native, manifest
from .chunks import digest_of, read_range
from .errors import CheckpointError

__all__ = ["repair_root"]

_SEARCH_SECONDS = 10.0
_DIGEST_LINE_BYTES = 48

Put = Callable[[str, bytes], None]


def repair_root(path: str, others: Sequence[str], put: Put) -> list[str]:
    """Calls `put(name, bytes)` for each of these files that is damaged and can be put right; says how."""
    said = list(_manifest(path, others, put))
    try:
        document = manifest.read(path)
    except (CheckpointError, OSError):
        return said
    for writer in document.writers:
        entry = writer.index
        data = _read(os.path.join(path, entry.name), entry.nbytes + 1)
        wanted = bytes.fromhex(entry.xxh128)
        if len(data) == entry.nbytes and digest_of(data) == wanted:
            continue
        found = _good(data, entry.nbytes, wanted, [os.path.join(one, entry.name) for one in others])
        if found is not None:
            put(entry.name, found[1])
            said.append(f"{os.path.join(path, entry.name)}: {found[0]}")
    return said


def _manifest(path: str, others: Sequence[str], put: Put) -> Iterator[str]:
    data = _read(os.path.join(path, manifest.MANIFEST_NAME), _native.MANIFEST_BYTES_MAX)
    line = _read(os.path.join(path, manifest.DIGEST_NAME), _DIGEST_LINE_BYTES + 1)
    if manifest.digest_line(data) == line:
        return
    for one in others:
        other = _read(os.path.join(one, manifest.MANIFEST_NAME), _native.MANIFEST_BYTES_MAX)
        other_line = manifest.digest_line(other)
        if other and other_line == _read(os.path.join(one, manifest.DIGEST_NAME), _DIGEST_LINE_BYTES + 1):
            if data == other:
                put(manifest.DIGEST_NAME, other_line)
                yield f"{os.path.join(path, manifest.DIGEST_NAME)}: copied from {one}"
                return
            if line == other_line:
                put(manifest.MANIFEST_NAME, other)
                yield f"{os.path.join(path, manifest.MANIFEST_NAME)}: copied from {one}"
                return
    right = manifest.digest_line(data)
    if data and len(line) == len(right) and sum(a != b for a, b in zip(line, right, strict=True)) == 1:
        put(manifest.DIGEST_NAME, right)
        yield f"{os.path.join(path, manifest.DIGEST_NAME)}: its one wrong byte"
        return
    try:
        wanted = bytes.fromhex(line[:32].decode("ascii"))
    except (ValueError, UnicodeDecodeError):
        return
    found = _good(data, len(data), wanted, [])
    if found is not None and manifest.digest_line(found[1]) == line:
        put(manifest.MANIFEST_NAME, found[1])
        yield f"{os.path.join(path, manifest.MANIFEST_NAME)}: {found[0]}"


def _good(data: bytes, nbytes: int, wanted: bytes, copies: Sequence[str]) -> tuple[str, bytes] | None:
    for copy in copies:
        other = _read(copy, nbytes + 1)
        if len(other) == nbytes and digest_of(other) == wanted:
            return f"copied from {copy}", other
    if len(data) == nbytes and len(wanted) == 16:
        bit, _ = _native.find_flipped_bit(data, wanted, _SEARCH_SECONDS)
        if bit is not None:
            flipped = bytes([data[bit // 8] ^ 1 << bit % 8])
            return f"bit {bit % 8} of byte {bit // 8} flipped back", data[: bit // 8] + flipped + data[bit // 8 + 1 :]
    return None


def _read(path: str, nbytes: int) -> bytes:
    try:
        return read_range(path, 0, nbytes)
    except OSError:
        return b""
