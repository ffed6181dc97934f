"""How the values that ranks tell each other become values of a key-value store: packed, split, framed.

A value is one or several parts, each under a key of its own. The first begins with a head that tells how many there
are, so one look at the first key is enough to fetch the rest.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Final

__all__ = ["frame", "pack", "part_count", "unframe", "unpack"]

COMPRESS_ABOVE_BYTES: Final = 4 << 10
PART_BYTES: Final = 4 << 20  # a TCPStore refuses more than 8 MiB

_HEAD: Final = struct.Struct("<BIQ")  # 1 when compressed, number of parts, raw bytes


def pack(payload: bytes) -> list[bytes]:
    """The parts that stand for `payload`, the one with the head first."""
    body = zlib.compress(payload, 1) if len(payload) > COMPRESS_ABOVE_BYTES else payload
    parts = [body[begin : begin + PART_BYTES] for begin in range(0, len(body), PART_BYTES)] or [b""]
    parts[0] = _HEAD.pack(body is not payload, len(parts), len(payload)) + parts[0]
    return parts


def part_count(first: bytes) -> int:
    """Of the value whose first part this is."""
    count: int = _HEAD.unpack_from(first)[1]
    return count


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
