"""Index files: what one writer stored, as bytes and as Python values. `docs/format.md` is normative.

    magic "SNAPSIDX" | u64 header length | JSON header | zeros up to a multiple of 64 | chunk table (40 bytes per chunk)

The caller has compared the file's digest with the manifest's before `parse` sees it; `parse` still trusts nothing:
every number is checked against the file's own size before it is used.
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import repeat
from typing import Any, NamedTuple

import numpy as np

from . import _native
from .config import FORMAT_MAJOR, FORMAT_MINOR
from .errors import CorruptCheckpointError, IncompatibleCheckpointError
from .plan import DIMENSIONS_MAX, TensorItem

__all__ = [
    "CHUNK_DTYPE",
    "DERIVED_DTYPES",
    "MASTER_DTYPE",
    "Index",
    "Place",
    "StoredTensor",
    "encode",
    "encode_tensors",
    "padded",
    "parse",
]

MAGIC = b"SNAPSIDX"
ALIGNMENT = 64
PAGE_BYTES = 4096
FILE_BYTES_MAX = 2 * _native.INDEX_HEADER_BYTES_MAX  # header and table: as much again, for 25 million chunks
CHUNK_DTYPE = np.dtype(
    [
        ("offset", "<u8"),
        ("stored_bytes", "<u4"),
        ("raw_bytes", "<u4"),
        ("file", "<u4"),
        ("codec", "<u2"),
        ("reserved", "<u2"),
        ("digest", "V16"),
    ]
)
MASTER_DTYPE = "float32"
DERIVED_DTYPES = ("bfloat16", "float16")
_HEAD = struct.Struct("<8sQ")
_DIGEST = re.compile(r"[0-9a-f]{32}")
_INT64_MAX = (1 << 63) - 1


class Place(NamedTuple):
    """Bytes of a stored shard: `chunk_count` chunks from `first_chunk` on, beginning at byte `at` of the first."""

    first_chunk: int
    chunk_count: int
    at: int


class StoredTensor(NamedTuple):
    item: TensorItem
    path: Any  # as state.encode_path wrote it; None when it is just [name]
    place: Place
    derived_from: str | None = None  # the tensor whose elements it has, rounded; it has no place of its own then
    xxh128: str | None = None  # of a derived shard's bytes; a catalog leaves it out


@dataclass(frozen=True, slots=True)
class Index:
    """`files`: this writer's own data files, then those of earlier saves that its records use, which are named with
    their directory. The last `references` records are reference chunks only: no shard is in them.
    """

    save_id: str
    rank: int
    world_size: int
    files: tuple[str, ...]
    chunk_bytes: int
    tensors: tuple[StoredTensor, ...]
    objects: Mapping[str, Any]  # name -> {"path": ..., "value": typed JSON}
    table: bytes  # of CHUNK_DTYPE records
    references: int = 0


def padded(stored_bytes: Any) -> Any:
    """Sizes of chunks (an array of integers) with the zeros up to the next page, as uint64."""
    return (stored_bytes.astype(np.uint64) + (PAGE_BYTES - 1)) // PAGE_BYTES * PAGE_BYTES


def _compact(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=True)


def encode_tensors(tensors: Sequence[StoredTensor]) -> str:
    """The header's "tensors" list. It does not change while the structure of the state does not, so callers keep it."""
    rows = []
    for item, path, place, derived_from, xxh128 in tensors:
        row: dict[str, Any] = {"name": item.name, "dtype": item.dtype, "shape": item.shape}
        if item.sizes != item.shape:
            row["offsets"] = item.offsets
            row["sizes"] = item.sizes
        row["chunks"] = (place.first_chunk, place.chunk_count)
        if place.at:
            row["at"] = place.at
        if derived_from is not None:
            row["derived_from"] = derived_from
            row["xxh128"] = xxh128
        if path is not None:
            row["path"] = path
        rows.append(row)
    return _compact(rows)


def encode(
    *,
    save_id: str,
    rank: int,
    world_size: int,
    files: Sequence[str],
    chunk_bytes: int,
    tensors_json: str,
    objects: Mapping[str, Any],
    table: bytes,
    references: int = 0,
) -> bytes:
    """The bytes of an index file."""
    facts = {
        "format_version": f"{FORMAT_MAJOR}.{FORMAT_MINOR}",
        "save_id": save_id,
        "rank": rank,
        "world_size": world_size,
        "files": list(files),
        "chunk_bytes": chunk_bytes,
        "chunk_count": len(table) // CHUNK_DTYPE.itemsize,
    }
    head = _compact(facts | {"references": references} if references else facts)
    header = f'{head[:-1]},"tensors":{tensors_json},"objects":{_compact(objects)}}}'.encode("ascii")
    padding = -(_HEAD.size + len(header)) % ALIGNMENT
    return b"".join((_HEAD.pack(MAGIC, len(header)), header, bytes(padding), table))


class _Reject(Exception):
    """Why a header is not valid; becomes a CorruptCheckpointError with the file's name."""


def _integer(value: Any, what: str, limit: int = _INT64_MAX) -> int:
    if type(value) is not int or not 0 <= value <= limit:
        raise _Reject(f"{what} is not an integer between 0 and {limit}: {str(value)[:80]}")
    return value


def _integers(value: Any, what: str) -> tuple[int, ...]:
    if type(value) is not list or len(value) > DIMENSIONS_MAX:
        raise _Reject(f"{what!r}: not a list of at most {DIMENSIONS_MAX} integers")
    for entry in value:
        if type(entry) is not int or not 0 <= entry <= _INT64_MAX:
            raise _Reject(f"{what!r}: {str(entry)[:80]} is not a size or position")
    return tuple(value)


def _text(value: Any, what: str) -> str:
    if type(value) is not str:
        raise _Reject(f"{what} is not a string")
    return value


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise _Reject("a key stands twice in one object")
    return result


def load_json(data: bytes) -> Any:
    """Strict JSON: UTF-8, no duplicate keys, no NaN. Raises ValueError (also for nesting too deep) with the reason."""
    try:
        return json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_no_duplicates,
            parse_constant=lambda name: _reject(f"{name} is not JSON"),
        )
    except (_Reject, RecursionError) as error:
        raise ValueError(str(error) or "nested too deep") from None


def _reject(reason: str) -> Any:
    raise _Reject(reason)


def parse(data: bytes, *, path: str, dtype_bytes: Mapping[str, int]) -> Index:
    """Reads an index file. `dtype_bytes` maps every dtype name that can be read to its item size.

    Raises:
        CorruptCheckpointError: anything in `data` that no writer would have written.
        IncompatibleCheckpointError: a dtype that is not in `dtype_bytes`.
    """
    try:
        return _parse(data, dtype_bytes)
    except IncompatibleCheckpointError as error:
        error.path = path
        raise
    except _Reject as reason:
        raise CorruptCheckpointError(f"index: {reason}", path=path) from None
    except (ValueError, KeyError, TypeError) as error:
        raise CorruptCheckpointError(f"index header: {type(error).__name__}: {error}", path=path) from None


def _parse(data: bytes, dtype_bytes: Mapping[str, int]) -> Index:
    if len(data) < _HEAD.size:
        raise _Reject(f"{len(data)} bytes are too few")
    magic, header_bytes = _HEAD.unpack_from(data)
    if magic != MAGIC:
        raise _Reject(f"magic is {magic!r}, not {MAGIC!r}")
    if header_bytes > min(len(data) - _HEAD.size, _native.INDEX_HEADER_BYTES_MAX):
        raise _Reject(f"header length {header_bytes} does not fit into {len(data)} bytes")
    header = load_json(data[_HEAD.size : _HEAD.size + header_bytes])
    if type(header) is not dict:
        raise _Reject("header is not an object")
    chunk_count = _integer(header["chunk_count"], "chunk_count")
    table_begin = -(-(_HEAD.size + header_bytes) // ALIGNMENT) * ALIGNMENT
    if any(data[_HEAD.size + header_bytes : table_begin]):
        raise _Reject("padding after the header is not zero")
    if len(data) - table_begin != chunk_count * CHUNK_DTYPE.itemsize:
        raise _Reject(f"{len(data) - table_begin} bytes cannot be a table of {chunk_count} chunks")
    references = _integer(header.get("references", 0), "references", chunk_count)
    files = header["files"]
    if type(files) is not list or not all(type(name) is str for name in files):
        raise _Reject("files is not a list of names")
    objects = header["objects"]
    if type(objects) is not dict:
        raise _Reject("objects is not an object")
    rows = header["tensors"]
    if type(rows) is not list:
        raise _Reject("tensors is not a list")
    table = data[table_begin:]
    raw_bytes = np.frombuffer(table, CHUNK_DTYPE)["raw_bytes"][: chunk_count - references]
    ends = [0, *np.cumsum(raw_bytes, dtype=np.uint64).tolist()]
    return Index(
        save_id=_text(header["save_id"], "save_id"),
        rank=_integer(header["rank"], "rank"),
        world_size=_integer(header["world_size"], "world_size"),
        files=tuple(files),
        chunk_bytes=_integer(header["chunk_bytes"], "chunk_bytes", _native.CHUNK_BYTES_MAX),
        tensors=tuple(_parse_tensor(row, ends, dtype_bytes) for row in rows),
        objects=objects,
        table=table,
        references=references,
    )


def _parse_tensor(row: Any, ends: list[int], dtype_bytes: Mapping[str, int]) -> StoredTensor:
    """`ends[i]` is the sum of the raw sizes of the first i chunks, of those that shards may be in."""
    if type(row) is not dict:
        raise _Reject("a tensor is not an object")
    name = row["name"]
    dtype = row["dtype"]
    if type(name) is not str or type(dtype) is not str:
        raise _Reject("a tensor's name or dtype is not a string")
    if dtype not in dtype_bytes:
        raise IncompatibleCheckpointError(f"this version of torch has no dtype {dtype[:80]!r}", tensor=name)
    shape = _integers(row["shape"], name)
    if "sizes" in row:
        offsets = _integers(row["offsets"], name)
        sizes = _integers(row["sizes"], name)
        if not len(offsets) == len(sizes) == len(shape):
            raise _Reject(f"{name!r}: shape, offsets and sizes differ in length")
        if any(offset + size > extent for offset, size, extent in zip(offsets, sizes, shape, strict=True)):
            raise _Reject(f"{name!r}: shard lies outside its tensor")
    else:
        offsets, sizes = (0,) * len(shape), shape
    if math.prod(map(max, shape, repeat(1))) > _INT64_MAX:  # without the zeros, as strides are computed
        raise _Reject(f"{name!r}: shape {shape} overflows")
    nbytes = math.prod(sizes) * dtype_bytes[dtype]
    first, count = _integers(row["chunks"], name)
    at = _integer(row.get("at", 0), name, _native.CHUNK_BYTES_MAX)
    if first >= len(ends) or count >= len(ends) - first:
        raise _Reject(f"{name!r}: chunks {first}+{count} are not in a table of {len(ends) - 1}")
    place = Place(first, count, at)
    item = TensorItem(name, dtype, shape, offsets, sizes, nbytes)
    if "derived_from" in row or "xxh128" in row:
        return StoredTensor(item, row.get("path"), place, *_derivation(row, item, place))
    if (nbytes == 0) != (count == 0) or (count and at + nbytes > ends[first + count] - ends[first]):
        raise _Reject(f"{name!r}: {nbytes} bytes cannot be in {count} chunks")
    return StoredTensor(item, row.get("path"), place)


def _derivation(row: Any, item: TensorItem, place: Place) -> tuple[str, str]:
    """`derived_from` and `xxh128`, which stand together, in the place of bytes."""
    master, digest = _text(row["derived_from"], "derived_from"), _text(row["xxh128"], "xxh128")
    if not _DIGEST.fullmatch(digest):
        raise _Reject(f"{item.name!r}: xxh128 is {digest[:80]!r}")
    if item.dtype not in DERIVED_DTYPES or item.nbytes == 0 or place != (0, 0, 0):
        raise _Reject(f"{item.name!r}: a shard of {item.nbytes} bytes of {item.dtype} at {place} cannot be derived")
    return master, digest
