"""What a codec made of each kind of tensor: ratio and speed, for the statistics of a save."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from .index import StoredTensor

__all__ = ["codec_stats"]

_PACKED = "packed"
_OTHER = "other"
_KINDS_MAX = 64
_XOR_CODECS = (5, 6, 7, 8)


def codec_stats(contents: Sequence[StoredTensor], records: Any, encode_us: Any) -> dict[str, dict[str, Any]]:
    """By kind: raw and stored bytes of the chunks that were encoded, their ratio, raw bytes per second of one core, and
    how many chunks are differences from the base's.

    `records` (CHUNK_DTYPE) and `encode_us` (uint32, 0 for a chunk that was not encoded) are those of the layout. A kind
    is a dtype and the last part of a name that is not a number; small tensors are packed together.
    """
    names = [_PACKED, _OTHER]
    numbers: dict[str, int] = {}
    kind_of_chunk = np.zeros(len(records), np.int64)
    shared = np.zeros(len(records), np.int64)
    for item, _, place, *_ in contents:
        kind = f"{item.dtype} {_last_word(item.name)}"
        if kind not in numbers and len(numbers) < _KINDS_MAX:
            numbers[kind] = len(names)
            names.append(kind)
        chunks = slice(place.first_chunk, place.first_chunk + place.chunk_count)
        kind_of_chunk[chunks] = numbers.get(kind, 1)
        shared[chunks] += 1
    kind_of_chunk[shared > 1] = 0
    found = {}
    encoded = encode_us > 0
    for number in np.unique(kind_of_chunk[encoded]).tolist():
        chosen = encoded & (kind_of_chunk == number)
        raw, stored = (int(records[key][chosen].sum()) for key in ("raw_bytes", "stored_bytes"))
        found[names[number]] = {
            "raw_bytes": raw,
            "stored_bytes": stored,
            "ratio": raw / stored,
            "bytes_per_second": raw / (int(encode_us[chosen].sum()) * 1e-6),
            "differences": int(np.isin(records["codec"][chosen], _XOR_CODECS).sum()),
        }
    return found


def _last_word(name: str) -> str:
    words = [word for word in name.split(".") if word and not word.isdigit()]
    return words[-1] if words else name
