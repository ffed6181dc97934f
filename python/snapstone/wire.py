"""How the values that ranks tell each other become values of a c10d key-value store: packed, split, framed.

A value is one or several parts, each under a key of its own. The first begins with a head that tells how many there
are, so one look at the first key is enough to fetch the rest.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Final, Protocol

__all__ = ["Store", "absent", "fetch", "frame", "pack", "unframe", "unpack"]

COMPRESS_ABOVE_BYTES: Final = 4 << 10
PART_BYTES: Final = 4 << 20  # a TCPStore refuses more than 8 MiB
FETCH_COUNT: Final = 64  # keys per multi_get

_HEAD: Final = struct.Struct("<BIQ")  # 1 when compressed, number of parts, raw bytes


class Store(Protocol):
    """What is used of `torch.distributed.Store`, whose own stub types values as str."""

    def set(self, key: str, value: bytes) -> None: ...
    def get(self, key: str) -> bytes: ...
    def multi_get(self, keys: list[str]) -> list[bytes]: ...
    def check(self, keys: list[str]) -> bool: ...
    def add(self, key: str, value: int) -> int: ...
    def compare_set(self, key: str, expected_value: bytes, desired_value: bytes) -> bytes: ...
    def delete_key(self, key: str) -> bool: ...


def absent(store: Store, names: Sequence[str], start: int = 0) -> list[int]:
    """Indices of the names that the store lacks, by bisection: few questions when few are missing."""
    if not names or store.check(list(names)):
        return []
    if len(names) == 1:
        return [start]
    half = len(names) // 2
    return absent(store, names[:half], start) + absent(store, names[half:], start + half)


def fetch(store: Store, names: Sequence[str]) -> list[bytes]:
    """The packed values of names that are known to exist, parts joined."""
    values: list[bytes] = []
    for begin in range(0, len(names), FETCH_COUNT):
        batch = names[begin : begin + FETCH_COUNT]
        for name, first in zip(batch, store.multi_get(list(batch)), strict=True):
            _, part_count, _ = _HEAD.unpack_from(first)
            values.append(b"".join([first, *(store.get(f"{name}#{index}") for index in range(1, part_count))]))
    return values


def pack(payload: bytes) -> list[bytes]:
    """The parts that stand for `payload`, the one with the head first."""
    body = zlib.compress(payload, 1) if len(payload) > COMPRESS_ABOVE_BYTES else payload
    parts = [body[begin : begin + PART_BYTES] for begin in range(0, len(body), PART_BYTES)] or [b""]
    parts[0] = _HEAD.pack(body is not payload, len(parts), len(payload)) + parts[0]
    return parts


def unpack(packed: bytes) -> bytes:
    """The payload of all parts joined."""
    compressed, _, nbytes = _HEAD.unpack_from(packed)
    body = packed[_HEAD.size :]
    return zlib.decompress(body, bufsize=max(1, nbytes)) if compressed else body


def frame(items: Sequence[bytes]) -> bytes:
    """Several values as one."""
    return struct.pack(f"<I{len(items)}Q", len(items), *map(len, items)) + b"".join(items)


def unframe(framed: bytes) -> list[bytes]:
    """What `frame` was given."""
    (count,) = struct.unpack_from("<I", framed)
    sizes = struct.unpack_from(f"<{count}Q", framed, 4)
    return [framed[begin:end] for begin, end in pairwise(accumulate(sizes, initial=4 + 8 * count))]
