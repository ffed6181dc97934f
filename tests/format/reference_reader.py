"""A second reader of the checkpoint format, written from docs/format.md alone: json, numpy, xxhash, zstandard.

It shares no line with the package and needs neither torch nor the extension. It checks every digest, every size, every
byte of padding and the place of every tensor, raises FormatError for the first that is wrong, and holds all in memory.
"""

from __future__ import annotations

import datetime
import json
import math
import re
import struct
from base64 import b64decode
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
import zstandard
from xxhash import xxh3_128_digest
from xxhash import xxh3_128_hexdigest as xxh128

PAGE, PACK_ALIGNMENT, PACK_BELOW, CHUNK_BYTES_MAX, CHAIN_RECORDS_MAX = 4096, 64, 64 << 10, 64 << 20, 64
FILE_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}")
VERSION = re.compile(r"0{0,5}1\.[0-9]{1,6}")
HEX128 = re.compile(r"[0-9a-f]{32}")
CODECS = {0: None, 1: 1, 2: 2, 3: 4, 4: 8}  # codec -> bytes per item of its byte planes; None is not compressed
XOR_CODECS = {5: 1, 6: 2, 7: 4, 8: 8}
CHUNK = np.dtype("<u8, <u4, <u4, <u4, <u2, <u2, V16")
CHUNK.names = ("offset", "stored_bytes", "raw_bytes", "file", "codec", "reserved", "digest")
DTYPES = "uint8 int8 float8_e4m3fn float8_e4m3fnuz float8_e5m2 float8_e5m2fnuz float8_e8m0fnu uint16 int16 float16 "
DTYPES += "bfloat16 uint32 int32 float32 complex32 uint64 int64 float64 complex64 complex128"
ITEM_BYTES = {name: int(re.findall("[0-9]+", name)[0]) // 8 for name in DTYPES.split()}
ITEM_BYTES |= {"bool": 1, "float4_e2m1fn_x2": 1}


class FormatError(Exception):
    """The first thing that is not as the format says."""


class Tensor(NamedTuple):
    dtype: str
    shape: tuple[int, ...]
    data: bytes  # row-major, little-endian
    path: list[Any]


class Contents(NamedTuple):
    manifest: dict[str, Any]
    tensors: dict[str, Tensor]
    objects: list[dict[str, dict[str, Any]]]  # by rank, each rank's own; "value" is typed JSON, which `decode` reads
    chunks: int


def check(condition: object, *what: object) -> None:
    if not condition:
        raise FormatError(" ".join(map(str, what)))


def load_json(data: bytes) -> Any:
    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        check(len(dict(items)) == len(items), "a key stands twice in one object")
        return dict(items)

    return json.loads(data.decode("utf-8"), object_pairs_hook=pairs, parse_constant=lambda name: check(False, name))


def read(path: str | Path) -> Contents:
    """Everything in the checkpoint at `path`."""
    root = Path(path)
    manifest = read_manifest(root)
    own = [entry for writer in manifest["writers"] for entry in (writer["index"], *writer["data"])]
    shared = manifest.get("shared", [])
    check(all(FILE_NAME.fullmatch(entry["name"]) for entry in own), "file names")
    check(all(re.fullmatch("base/" + FILE_NAME.pattern, entry["name"]) for entry in shared), "names of shared files")
    files = {entry["name"]: read_file(root, entry) for entry in (*own, *shared)}
    check(len(files) == len(own) + len(shared), "a name is given twice")
    shared_used: set[str] = set()
    pieces: dict[str, list[tuple[dict[str, Any], bytes | None]]] = {}  # by name: shards, and their bytes
    objects, count = [], 0
    for rank, writer in enumerate(manifest["writers"]):
        check(writer["rank"] == rank, "writers are not in the order of their ranks")
        header, table = read_index(root, manifest, writer)
        shared_used.update(header["files"][len(writer["data"]) :])
        chunks = read_chunks(writer, header, table, files)[: len(table) - header.get("references", 0)]
        count += len(chunks)
        used = [np.zeros(len(chunk), bool) for chunk in chunks]
        for row in header["tensors"]:
            pieces.setdefault(row["name"], []).append((row, read_shard(row, header, chunks, used)))
        for number, (chunk, mask) in enumerate(zip(chunks, used, strict=True)):
            check(not np.frombuffer(chunk, np.uint8)[~mask].any(), rank, number, "alignment gaps are not zero")
        objects.append(header["objects"])
    check(shared_used == {entry["name"] for entry in shared}, "the manifest names shared files that no index uses")
    found = {str(entry.relative_to(root)) for entry in (*root.iterdir(), *root.glob("base/*"))} - {".metadata"}
    known = {"MANIFEST.json", "MANIFEST.xxh128", *files, *(["base"] if shared else [])}
    check(found == known, "the directory holds other files than the manifest names")
    tensors: dict[str, Any] = dict.fromkeys(pieces)
    for name, shards in sorted(pieces.items(), key=lambda entry: any(data is None for _, data in entry[1])):
        tensors[name] = assemble(name, [(row, derive(row, tensors) if data is None else data) for row, data in shards])
    check(manifest["nbytes"] == sum(len(tensor.data) for tensor in tensors.values()), "nbytes of the manifest")
    return Contents(manifest, tensors, objects, count)


def read_file(root: Path, entry: dict[str, Any]) -> bytes:
    path = root / entry["name"]
    check(not path.is_symlink() and not path.parent.is_symlink() and path.is_file(), path, "is not a regular file")
    data = path.read_bytes()
    check(len(data) == entry["nbytes"], entry["name"], "has another size")
    check(HEX128.fullmatch(entry["xxh128"]), "digest of", entry["name"])
    return data


def read_manifest(root: Path) -> dict[str, Any]:
    data, line = ((root / name).read_bytes() for name in ("MANIFEST.json", "MANIFEST.xxh128"))
    check(line == f"{xxh128(data)}  MANIFEST.json\n".encode(), "MANIFEST.xxh128 is not the digest of MANIFEST.json")
    manifest: dict[str, Any] = load_json(data)
    check(manifest["format"] == "snapstone" and VERSION.fullmatch(manifest["format_version"]), "format, format_version")
    check(HEX128.fullmatch(manifest["save_id"]), "save_id")
    check(type(manifest["metadata"]) is dict and type(manifest["environment"]) is dict, "metadata, environment")
    check(len(manifest["writers"]) == manifest["world_size"], "there are not as many writers as ranks")
    if (base := manifest.get("base")) is not None:
        check(HEX128.fullmatch(base["save_id"]) and FILE_NAME.fullmatch(base["name"]) and base["depth"] >= 1, "base")
    for one in (manifest, base or manifest):
        check(one["step"] is None or type(one["step"]) is int, "step")
    return manifest


def read_index(root: Path, manifest: dict[str, Any], writer: dict[str, Any]) -> tuple[dict[str, Any], Any]:
    name, data = writer["index"]["name"], read_file(root, writer["index"])
    check(xxh128(data) == writer["index"]["xxh128"], name, "has another digest")
    magic, header_bytes = struct.unpack_from("<8sQ", data)
    check(magic == b"SNAPSIDX" and header_bytes <= len(data) - 16, name, "starts with", magic, header_bytes)
    header: dict[str, Any] = load_json(data[16 : 16 + header_bytes])
    begin = -(-(16 + header_bytes) // 64) * 64
    check(not any(data[16 + header_bytes : begin]), name, "has padding that is not zero")
    check(len(data) - begin == header["chunk_count"] * CHUNK.itemsize, name, "has a table of another size")
    same = ("save_id", "world_size", "format_version")
    check(all(header[key] == manifest[key] for key in same), name, "belongs to another save")
    check(header["rank"] == writer["rank"], name, "belongs to another rank")
    own, shared = [entry["name"] for entry in writer["data"]], {entry["name"] for entry in manifest.get("shared", [])}
    check(header["files"][: len(own)] == own and set(header["files"][len(own) :]) <= shared, name, "names other files")
    check(len(set(header["files"])) == len(header["files"]), name, "names a file twice")
    check(0 < header["chunk_bytes"] <= CHUNK_BYTES_MAX, "chunk_bytes")
    return header, np.frombuffer(data[begin:], CHUNK)


def read_chunks(writer: dict[str, Any], header: dict[str, Any], table: Any, files: dict[str, bytes]) -> list[bytes]:
    """The raw bytes of every record of one writer, reference chunks too."""
    for number, entry in enumerate(writer["data"]):
        rows = table[table["file"] == number]
        check(xxh128(rows.tobytes()) == entry["xxh128"], entry["name"], "has another table digest")
        extents = sorted({row.tobytes(): (int(row["offset"]), int(row["stored_bytes"])) for row in rows}.values())
        ends = [0, *(offset + -(-stored // PAGE) * PAGE for offset, stored in extents)]
        check([*(begin for begin, _ in extents), entry["nbytes"]] == ends, entry["name"], "is not covered by chunks")
    unused = set(range(len(writer["data"]), len(header["files"]))) - {int(number) for number in table["file"]}
    check(not unused, "a shared file holds no chunk of rank", writer["rank"])
    with_xor = [number for number, row in enumerate(table) if int(row["codec"]) in XOR_CODECS]
    references = header.get("references", 0)
    check(type(references) is int and references == len(with_xor), "references are not as many as xor codecs")
    reference_of = {number: len(table) - references + k for k, number in enumerate(with_xor)}
    chunks, chain = [b""] * len(table), [1] * len(table)
    for number in reversed(range(len(table))):  # references come first
        what = f"chunk {number}"
        chunks[number] = read_chunk(what, table[number], files, header)
        if (reference := reference_of.get(number)) is not None:
            check(reference > number, what, "refers to one that does not stand behind it")
            check(table[reference]["raw_bytes"] == table[number]["raw_bytes"], what, "size of its reference")
            chain[number] += chain[reference]
            check(chain[number] <= CHAIN_RECORDS_MAX, what, "chain of references")
            difference, other = (np.frombuffer(chunks[one], np.uint8) for one in (number, reference))
            chunks[number] = (difference ^ other).tobytes()
        check(xxh3_128_digest(chunks[number]) == bytes(table[number]["digest"]), what, "digest")
    return chunks


def read_chunk(what: str, row: Any, files: dict[str, bytes], header: dict[str, Any]) -> bytes:
    """What is stored for a record: of one with an xor codec the difference."""
    offset, stored, raw, file, codec, reserved = (int(row[name]) for name in CHUNK.names[:6])
    check(file < len(header["files"]) and reserved == 0 and offset % PAGE == 0, what, "record")
    check(codec in CODECS | XOR_CODECS, what, "codec")
    check(0 < stored <= raw <= header["chunk_bytes"], what, "sizes")
    padded = files[header["files"][file]][offset : offset + -(-stored // PAGE) * PAGE]
    check(not any(padded[stored:]), what, "padding after it is not zero")
    data = decode_chunk(what, (CODECS | XOR_CODECS)[codec], padded[:stored], raw)
    check(len(data) == raw, what, "has", len(data), "raw bytes, not", raw)
    return data


def decode_chunk(what: str, item_bytes: int | None, stored: bytes, raw_bytes: int) -> bytes:
    if item_bytes is None:
        return stored
    try:
        check(zstandard.get_frame_parameters(stored).dict_id == 0, what, "needs a dictionary")
        data = zstandard.ZstdDecompressor().decompress(stored, max_output_size=raw_bytes, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise FormatError(f"{what}: {error}") from None
    items = len(data) // item_bytes
    planes = np.frombuffer(data, np.uint8, items * item_bytes).reshape(item_bytes, items)
    return planes.T.tobytes() + data[items * item_bytes :]


def box_of(row: dict[str, Any]) -> tuple[slice, ...]:
    sizes, offsets = row.get("sizes", row["shape"]), row.get("offsets", [0] * len(row["shape"]))
    check(len(row["shape"]) == len(sizes) == len(offsets) <= 64, row["name"], "has lists of different lengths")
    inside = all(0 <= o <= o + s <= n for o, s, n in zip(offsets, sizes, row["shape"], strict=True))
    check(inside, row["name"], "reaches outside")
    return tuple(slice(offset, offset + size) for offset, size in zip(offsets, sizes, strict=True))


def read_shard(row: dict[str, Any], header: dict[str, Any], chunks: list[bytes], used: list[Any]) -> bytes | None:
    """None for a derived shard, which has no bytes of its own."""
    name, dtype, at = row["name"], row["dtype"], row.get("at", 0)
    check(dtype in ITEM_BYTES, name, "has dtype", dtype)
    nbytes = math.prod(side.stop - side.start for side in box_of(row)) * ITEM_BYTES[dtype]
    first, count = row["chunks"]
    check(("derived_from" in row) == ("xxh128" in row), name, "is half derived")
    if "derived_from" in row:
        check(dtype.endswith("float16") and nbytes and (first, count, at) == (0, 0, 0), name, "cannot be derived")
        return None
    check(0 <= first <= first + count <= len(chunks) and (count == 0) == (nbytes == 0), name, "chunks")
    own = chunks[first : first + count]
    if nbytes < PACK_BELOW:
        check(at % PACK_ALIGNMENT == 0 and count <= 1, name, "is packed wrongly")
    else:
        check(at == 0 and count == -(-nbytes // header["chunk_bytes"]), name, "is cut wrongly")
        check(all(len(chunk) == header["chunk_bytes"] for chunk in own[:-1]), name, "has pieces of other sizes")
        check(sum(map(len, own)) == nbytes, name, "shares its last chunk")
    for mask in used[first : first + count]:
        mask[at : at + nbytes] = True
    check(at + nbytes <= sum(map(len, own)), name, "is longer than its chunks")
    return b"".join(own)[at : at + nbytes]


def derive(row: dict[str, Any], tensors: dict[str, Any]) -> bytes:
    """The bytes of a derived shard, whose master was put together before."""
    name, master = row["name"], tensors.get(row["derived_from"])
    check(master and (master.dtype, list(master.shape)) == ("float32", row["shape"]), name, "has no master of its kind")
    exact = np.frombuffer(master.data, "<f4").reshape(master.shape)[box_of(row)]
    check(not np.isnan(exact).any(), name, "has a master with NaN")
    if row["dtype"] == "float16":
        with np.errstate(over="ignore"):
            data = exact.astype("<f2").tobytes()
    else:  # bfloat16: the upper half of the bits, rounded to nearest, ties to even
        bits = np.ascontiguousarray(exact).view("<u4").astype(np.uint64)
        data = ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype("<u2").tobytes()
    check(xxh128(data) == row["xxh128"], name, "is not what its master gives")
    return data


def assemble(name: str, shards: list[tuple[dict[str, Any], bytes]]) -> Tensor:
    head = shards[0][0]
    whole = np.zeros((*head["shape"], ITEM_BYTES[head["dtype"]]), np.uint8)
    covered = np.zeros(head["shape"], np.uint8)
    for row, data in shards:
        check((row["dtype"], row["shape"]) == (head["dtype"], head["shape"]), name, "has shards that disagree")
        box = box_of(row)
        whole[box] = np.frombuffer(data, np.uint8).reshape(whole[box].shape)
        covered[box] += 1
    check((covered == 1).all(), name, "is not tiled by its shards")
    return Tensor(head["dtype"], tuple(head["shape"]), whole.tobytes(), head.get("path", [name]))


def decode(value: Any) -> Any:
    """The Python value of typed JSON. Values of torch's own types stay as they are, and so do pickles."""
    if type(value) is list:
        return [decode(item) for item in value]
    if type(value) is not dict:
        return value
    tag = next((key for key in value if key.startswith("$")), None)
    if tag is None:
        return {key: decode(item) for key, item in value.items()}
    check(len(value) == 1, "a tag among other keys")
    check(tag in DECODERS or tag in TORCH_TAGS, "unknown tag", tag)
    return DECODERS[tag](value[tag]) if tag in DECODERS else value


def array(payload: dict[str, Any], shape: list[int]) -> Any:
    dtype = payload["dtype"]
    dtype = np.dtype(dtype if dtype[0] in "<>|" else np.dtype(dtype).newbyteorder("<"))
    return np.frombuffer(b64decode(payload["data"], validate=True), dtype).reshape(shape)


TORCH_TAGS = {"$dtype", "$device", "$size", "$tensor", "$pickle"}
DECODERS: dict[str, Any] = {
    **{f"${kind.__name__}": lambda given, kind=kind: kind(map(decode, given)) for kind in (tuple, set, frozenset)},
    **{f"${kind.__name__}": lambda given, kind=kind: kind(*map(decode, given)) for kind in (slice, range, complex)},
    **{f"${kind.__name__}": kind.fromisoformat for kind in (datetime.datetime, datetime.date)},
    "$bytes": lambda text: b64decode(text, validate=True),
    "$bytearray": lambda text: bytearray(b64decode(text, validate=True)),
    "$timedelta": lambda given: datetime.timedelta(*given),
    "$dict": lambda given: {decode(key): decode(item) for key, item in given},
    "$ellipsis": lambda given: ...,
    "$float": lambda text: struct.unpack(">d", bytes.fromhex(text))[0] if len(text) == 16 else float(text),
    "$int": lambda text: int(text, 16),
    "$str": lambda text: b64decode(text, validate=True).decode("utf-8", "surrogatepass"),
    "$path": lambda given: PurePosixPath(decode(given)),
    "$numpy": lambda given: array(given, [1])[0],
    "$ndarray": lambda given: array(given, given["shape"]),
}
