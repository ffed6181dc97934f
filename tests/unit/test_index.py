"""Index files. Invariants: what is encoded is parsed back; any other bytes end in a typed error."""

from __future__ import annotations

import json
import random
import struct
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from snapstone.errors import CorruptCheckpointError, IncompatibleCheckpointError
from snapstone.index import CHUNK_DTYPE, Index, Place, StoredTensor, encode, encode_tensors, load_json, parse
from snapstone.plan import TensorItem

DTYPE_BYTES = {"float32": 4, "uint8": 1, "complex128": 16}
MIB = 1 << 20
SAVE_ID = "0123456789abcdef" * 2


def stored(
    name: str = "t",
    dtype: str = "float32",
    shape: tuple[int, ...] = (4, 2),
    offsets: tuple[int, ...] | None = None,
    sizes: tuple[int, ...] | None = None,
    place: Place | None = None,
    path: Any = None,
) -> StoredTensor:
    sizes = shape if sizes is None else sizes
    nbytes = int(np.prod(sizes, dtype=object)) * DTYPE_BYTES[dtype]
    return StoredTensor(
        TensorItem(name, dtype, shape, offsets or (0,) * len(shape), sizes, nbytes), path, place or Place(0, 1, 0)
    )


def table(count: int) -> bytes:
    records = np.zeros(count, dtype=CHUNK_DTYPE)
    records["offset"] = np.arange(count) * 4096
    records["stored_bytes"] = records["raw_bytes"] = MIB
    return records.tobytes()


def encoded(*tensors: StoredTensor, chunks: int = 3, objects: Any = None) -> bytes:
    return encode(
        save_id=SAVE_ID,
        rank=2,
        world_size=5,
        files=["rank-00002.data"],
        chunk_bytes=MIB,
        tensors_json=encode_tensors(tensors),
        objects={} if objects is None else objects,
        table=table(chunks),
    )


def delta(*tensors: StoredTensor, chunks: int = 3, references: int = 1) -> bytes:
    return encode(
        save_id=SAVE_ID,
        rank=2,
        world_size=5,
        files=["rank-00002.data", f"base/{SAVE_ID}.rank-00001.data"],
        chunk_bytes=MIB,
        tensors_json=encode_tensors(tensors),
        objects={},
        table=table(chunks),
        references=references,
    )


def parsed(data: bytes) -> Index:
    return parse(data, path="somewhere/rank-00002.index", dtype_bytes=DTYPE_BYTES)


def with_header(
    data: bytes, change: dict[str, Any] | None = None, *, raw: bytes | None = None, tail: bytes = b""
) -> bytes:
    """The file with another JSON header, correctly framed."""
    magic, count = struct.unpack_from("<8sQ", data)
    begin = -(-(16 + count) // 64) * 64
    header = raw if raw is not None else json.dumps(json.loads(data[16 : 16 + count]) | (change or {})).encode()
    return b"".join(
        (magic, struct.pack("<Q", len(header)), header, bytes(-(16 + len(header)) % 64), data[begin:], tail)
    )


def row(data: bytes, **change: Any) -> dict[str, Any]:
    _, count = struct.unpack_from("<8sQ", data)
    first: dict[str, Any] = json.loads(data[16 : 16 + count])["tensors"][0]
    return {key: value for key, value in (first | change).items() if value is not None}


# ---- what is written is read


@st.composite
def stored_tensors(draw: st.DrawFn) -> StoredTensor:
    shape = tuple(draw(st.lists(st.integers(0, 40), max_size=4)))
    begin = tuple(draw(st.integers(0, size)) for size in shape)
    sizes = tuple(draw(st.integers(0, size - first)) for size, first in zip(shape, begin, strict=True))
    dtype = draw(st.sampled_from(sorted(DTYPE_BYTES)))
    nbytes = int(np.prod(sizes, dtype=object)) * DTYPE_BYTES[dtype]
    at = draw(st.sampled_from([0, 64, 4096])) if nbytes else 0
    offsets = begin if sizes != shape else (0,) * len(shape)
    path = draw(st.none() | st.just(["a", {"$key": 1}, 0]))
    place = Place(draw(st.integers(0, 100)), -(-(at + nbytes) // MIB), at)
    name = draw(st.text(st.characters(exclude_categories=["Cs"]), max_size=8))
    return StoredTensor(TensorItem(name, dtype, shape, offsets, sizes, nbytes), path, place)


@settings(max_examples=80, deadline=None, derandomize=True, database=None)
@given(st.lists(stored_tensors(), max_size=5))
def test_any_tensors_come_back(tensors: list[StoredTensor]) -> None:
    data = encoded(*tensors, chunks=200, objects={"x": {"path": ["x"], "value": {"$tuple": [1, "ü"]}}})
    index = parsed(data)
    assert list(index.tensors) == tensors
    assert (index.save_id, index.rank, index.world_size, index.files) == (SAVE_ID, 2, 5, ("rank-00002.data",))
    assert index.chunk_bytes == MIB
    assert index.objects == {"x": {"path": ["x"], "value": {"$tuple": [1, "ü"]}}}
    assert index.table == table(200)


def test_references_and_shared_files_come_back() -> None:
    index = parsed(delta(stored(place=Place(1, 1, 0))))
    assert (index.references, index.files[1]) == (1, f"base/{SAVE_ID}.rank-00001.data")
    assert index.table == table(3)
    assert parsed(encoded(stored())).references == 0
    assert b"references" not in encoded(stored())


def test_shards_end_before_the_reference_chunks() -> None:
    for place in (Place(2, 1, 0), Place(1, 2, 0), Place(3, 1, 0)):
        with pytest.raises(CorruptCheckpointError, match="are not in a table of 2"):
            parsed(delta(stored(place=place)))


def test_there_are_not_more_references_than_chunks() -> None:
    assert parsed(delta(chunks=3, references=3)).references == 3
    for references in (4, -1, 1 << 63, "1", 1.0, True, None, [1]):
        with pytest.raises(CorruptCheckpointError, match="references is not an integer between 0 and 3"):
            parsed(with_header(delta(), {"references": references}))


def test_the_table_starts_at_a_multiple_of_64_and_is_all_that_follows() -> None:
    for length in range(70):
        data = encoded(stored(name="n" * length))
        assert (len(data) - 3 * CHUNK_DTYPE.itemsize) % 64 == 0
        assert np.frombuffer(data[-3 * CHUNK_DTYPE.itemsize :], dtype=CHUNK_DTYPE)["offset"].tolist() == [0, 4096, 8192]
    assert CHUNK_DTYPE.itemsize == 40


def test_the_header_is_plain_ascii_json() -> None:
    data = encoded(stored(name="ü\n\U0001f600"))
    _, count = struct.unpack_from("<8sQ", data)
    assert data[16 : 16 + count].isascii()
    assert json.loads(data[16 : 16 + count])["tensors"][0]["name"] == "ü\n\U0001f600"


def test_unknown_keys_of_a_newer_minor_version_are_ignored() -> None:
    data = encoded(stored())
    newer = with_header(data, {"format_version": "1.7", "future": [1], "tensors": [row(data, future={"a": 1})]})
    assert parsed(newer) == parsed(data)


# ---- anything else is refused


def bad(reason: str, **change: Any) -> Any:
    return pytest.param(change, id=reason)


@pytest.mark.parametrize(
    "change",
    [
        bad("more chunks than the table", chunk_count=4),
        bad("fewer chunks than the table", chunk_count=2),
        bad("negative chunks", chunk_count=-1),
        bad("chunk count is a float", chunk_count=3.0),
        bad("chunk count is a bool", chunk_count=True),
        bad("save id is a number", save_id=7),
        bad("rank is a string", rank="2"),
        bad("files are no list", files="rank-00002.data"),
        bad("a file name is no string", files=[3]),
        bad("chunks too large", chunk_bytes=1 << 62),
        bad("objects are a list", objects=[]),
        bad("tensors are an object", tensors={}),
        bad("a tensor is a list", tensors=[[]]),
        bad("a tensor is null", tensors=[None]),
    ],
)
def test_a_header_with_one_wrong_field(change: dict[str, Any]) -> None:
    with pytest.raises(CorruptCheckpointError, match=r"rank-00002\.index"):
        parsed(with_header(encoded(stored()), change))


def test_what_is_refused_is_named() -> None:
    data = encoded(stored())
    magic = data[:8]
    named = {
        f"header length {1 << 40} does not fit into {len(data)} bytes": struct.pack("<8sQ", magic, 1 << 40) + data[16:],
        f"header length {len(data)} does not fit": struct.pack("<8sQ", magic, len(data)) + data[16:],
        "header is not an object": with_header(data, raw=b"[]"),
        "a tensor is not an object": with_header(data, {"tensors": [[]]}),
        "shape, offsets and sizes differ in length": with_header(
            data, {"tensors": [row(data, offsets=[0], sizes=[4])]}
        ),
    }
    for words, wrong in named.items():
        with pytest.raises(CorruptCheckpointError, match=words):
            parsed(wrong)


@pytest.mark.parametrize(
    "key", ["save_id", "rank", "world_size", "files", "chunk_bytes", "chunk_count", "tensors", "objects"]
)
def test_a_header_without_one_field(key: str) -> None:
    data = encoded(stored())
    _, count = struct.unpack_from("<8sQ", data)
    header = json.loads(data[16 : 16 + count])
    del header[key]
    with pytest.raises(CorruptCheckpointError, match=key):
        parsed(with_header(data, raw=json.dumps(header).encode()))


@pytest.mark.parametrize(
    "change",
    [
        bad("no name", name=None),
        bad("name is a number", name=3),
        bad("dtype is a list", dtype=["float32"]),
        bad("negative size", shape=[-1, 2]),
        bad("size is a float", shape=[4.0, 2]),
        bad("size is a bool", shape=[True, 2]),
        bad("shape is a number", shape=8),
        bad("shape overflows", shape=[1 << 40, 1 << 40]),
        bad("huge size", shape=[1 << 64]),
        bad("too many dimensions", shape=[1] * 65),
        bad("no chunks", chunks=[0, 0]),
        bad("chunks beyond the table", chunks=[3, 1]),
        bad("chunks that end beyond the table", chunks=[2, 2]),
        bad("chunks wrap around", chunks=[(1 << 63) - 1, 2]),
        bad("chunks are three", chunks=[0, 1, 2]),
        bad("chunks are one", chunks=[0]),
        bad("more bytes than chunks can hold", shape=[1 << 30, 1 << 10]),
        bad("an empty tensor with chunks", shape=[0, 2]),
        bad("position beyond a chunk", at=1 << 60),
        bad("position too near the end of the chunk", at=MIB - 31),
        bad("negative position", at=-64),
        bad("sizes without offsets", sizes=[1, 2]),
        bad("shard sticks out", offsets=[3, 0], sizes=[2, 2]),
        bad("offset wraps around", offsets=[(1 << 63) - 1, 0], sizes=[2, 2]),
        bad("fewer dimensions in the shard", offsets=[0], sizes=[2]),
    ],
)
def test_a_tensor_with_one_wrong_field(change: dict[str, Any]) -> None:
    data = encoded(stored())
    with pytest.raises(CorruptCheckpointError):
        parsed(with_header(data, {"tensors": [row(data, **change)]}))


def test_a_dtype_that_this_torch_lacks_is_incompatible_not_corrupt() -> None:
    data = encoded(stored())
    with pytest.raises(IncompatibleCheckpointError, match=r"float33.*rank-00002\.index.*tensor='t'"):
        parsed(with_header(data, {"tensors": [row(data, dtype="float33")]}))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"SNAPSIDX",
        b"SNAPSIDX" + struct.pack("<Q", 0),
        b"SNAPSIDX" + struct.pack("<Q", 1 << 63),
        b"SNAPSIDX" + struct.pack("<Q", (1 << 64) - 1) + b"{}",
        b"SNAPSIDY" + encoded(stored())[8:],
        encoded(stored())[:-1],
        encoded(stored()) + b"\0",
        encoded(stored())[: -CHUNK_DTYPE.itemsize],
        with_header(encoded(stored()), raw=b"[]"),
        with_header(encoded(stored()), raw=b"\xff\xfe"),
        with_header(encoded(stored()), raw=b'{"a":NaN}'),
        with_header(encoded(stored()), raw=b'{"rank":1,"rank":2}'),
        with_header(encoded(stored()), raw=b"[" * 100_000),
        with_header(encoded(stored()), raw=b'{"rank":' + b"9" * 10_000 + b"}"),
    ],
    ids=lambda data: f"{len(data)} bytes",
)
def test_bytes_that_are_no_index(data: bytes) -> None:
    with pytest.raises(CorruptCheckpointError, match=r"rank-00002\.index"):
        parsed(data)


def test_padding_that_is_not_zero() -> None:
    for length in range(64):
        data = bytearray(encoded(stored(name="n" * length)))
        _, count = struct.unpack_from("<8sQ", data)
        if (16 + count) % 64:
            data[16 + count] = 1
            with pytest.raises(CorruptCheckpointError, match="padding"):
                parsed(bytes(data))
            return
    pytest.fail("no header needed padding")


def test_no_change_of_a_byte_ends_in_another_exception() -> None:
    source = random.Random(7)
    data = encoded(stored(), stored(name="u", shape=(9,), offsets=(3,), sizes=(6,), place=Place(1, 2, 64)))
    for _ in range(3000):
        changed = bytearray(data)
        for _ in range(source.choice([1, 1, 2, 5])):
            changed[source.randrange(len(changed))] = source.randrange(256)
        try:
            index = parsed(bytes(changed[: source.choice([len(data), source.randrange(len(data))])]))
        except (CorruptCheckpointError, IncompatibleCheckpointError):  # the latter for a dtype of another name
            continue
        for one in index.tensors:
            assert one.place.first_chunk + one.place.chunk_count <= 3
            assert all(o + s <= n for o, s, n in zip(one.item.offsets, one.item.sizes, one.item.shape, strict=True))


@pytest.mark.parametrize("text", [b'{"a":1,"a":2}', b"Infinity", b"{", b"\xff", b"[" * 5000, b'{"a":{"b":1,"b":1}}'])
def test_json_is_strict(text: bytes) -> None:
    with pytest.raises(ValueError, match=r"."):
        load_json(text)
