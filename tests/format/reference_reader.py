"""A second reader of the checkpoint format, written from docs/format.md alone: json, numpy, xxhash, zstandard.

It shares no line with the package and needs neither torch nor the extension. It is strict: every digest, every size,
every byte of padding and the place of every tensor are checked, and the first thing that is wrong raises FormatError.
It reads whole checkpoints into memory, so it is for small ones.

    python reference_reader.py CHECKPOINT      prints what is inside
"""

from __future__ import annotations

import base64
import datetime
import json
import math
import re
import struct
import sys
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
import xxhash
import zstandard

MAJOR = 1
PAGE = 4096
PACK_ALIGNMENT = 64
PACK_BELOW = 64 << 10
CHUNK_BYTES_MAX = 64 << 20
FILE_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}")
HEX128 = re.compile(r"[0-9a-f]{32}")
CODECS = {0: None, 1: 1, 2: 2, 3: 4, 4: 8}  # codec -> bytes per item of its byte planes; None is not compressed
XOR_CODECS = {5: 1, 6: 2, 7: 4, 8: 8}
CHAIN_RECORDS_MAX = 64
DERIVED_DTYPES = ("bfloat16", "float16")
CHUNK = np.dtype("<u8, <u4, <u4, <u4, <u2, <u2, V16")
CHUNK.names = ("offset", "stored_bytes", "raw_bytes", "file", "codec", "reserved", "digest")
ITEM_BYTES = {
    **dict.fromkeys(("bool", "uint8", "int8", "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2"), 1),
    **dict.fromkeys(("float8_e5m2fnuz", "float8_e8m0fnu", "float4_e2m1fn_x2"), 1),
    **dict.fromkeys(("uint16", "int16", "float16", "bfloat16"), 2),
    **dict.fromkeys(("uint32", "int32", "float32", "complex32"), 4),
    **dict.fromkeys(("uint64", "int64", "float64", "complex64"), 8),
    "complex128": 16,
}


class FormatError(Exception):
    """The first thing that is not as the format says."""


class Tensor(NamedTuple):
    dtype: str
    shape: tuple[int, ...]
    data: bytes  # row-major, little-endian
    path: list[Any]


class Object(NamedTuple):
    path: list[Any]
    value: Any  # typed JSON; `decode` gives the Python value


class Tagged(NamedTuple):
    """A value that only torch has: {"$dtype": "bfloat16"} is Tagged("$dtype", "bfloat16")."""

    tag: str
    payload: Any


@dataclass
class Contents:
    manifest: dict[str, Any]
    tensors: dict[str, Tensor] = field(default_factory=dict)
    objects: list[dict[str, Object]] = field(default_factory=list)  # by rank; each rank's own
    chunks: int = 0


def check(condition: object, *what: object) -> None:
    if not condition:
        raise FormatError(" ".join(map(str, what)))


def xxh128(data: bytes) -> str:
    return xxhash.xxh3_128_hexdigest(data)


def load_json(data: bytes) -> Any:
    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        check(len(dict(items)) == len(items), "a key stands twice in one object")
        return dict(items)

    def constant(name: str) -> Any:
        raise FormatError(f"{name} is not JSON")

    return json.loads(data.decode("utf-8"), object_pairs_hook=pairs, parse_constant=constant)


def read(path: str | Path) -> Contents:
    """Everything in the checkpoint at `path`."""
    root = Path(path)
    manifest = read_manifest(root)
    contents = Contents(manifest)
    pieces: dict[str, list[tuple[dict[str, Any], bytes | None]]] = {}
    names = {"MANIFEST.json", "MANIFEST.xxh128"}
    shared = read_shared(root, manifest)
    shared_used: set[str] = set()
    for rank, writer in enumerate(manifest["writers"]):
        check(writer["rank"] == rank, "writers are not in the order of their ranks")
        for entry in (writer["index"], *writer["data"]):
            check(FILE_NAME.fullmatch(entry["name"]), "file name", entry["name"])
            check(HEX128.fullmatch(entry["xxh128"]), "digest of", entry["name"])
            check(entry["name"] not in names, entry["name"], "is named twice")
            names.add(entry["name"])
        header, table = read_index(root, manifest, writer)
        chunks = read_chunks(root, writer, header, table, shared)
        shared_used.update(header["files"][len(writer["data"]) :])
        chunks = chunks[: len(chunks) - header.get("references", 0)]
        contents.chunks += len(chunks)
        used = [np.zeros(len(chunk), bool) for chunk in chunks]
        for row in header["tensors"]:
            pieces.setdefault(row["name"], []).append((row, read_shard(row, header, chunks, used)))
        for number, (chunk, mask) in enumerate(zip(chunks, used, strict=True)):
            gaps = np.frombuffer(chunk, np.uint8)[~mask]
            check(not gaps.any(), f"rank {rank}, chunk {number}: alignment gaps are not zero")
        objects = header["objects"].items()
        contents.objects.append({name: Object(entry.get("path", [name]), entry["value"]) for name, entry in objects})
    check(shared_used == shared.keys(), "the manifest names shared files that no index uses")
    names |= {"base"} if shared else set()
    check({entry.name for entry in root.iterdir()} == names, "the directory holds other files than the manifest names")
    contents.tensors = assemble_all(pieces)
    check(manifest["nbytes"] == sum(len(tensor.data) for tensor in contents.tensors.values()), "nbytes of the manifest")
    return contents


def read_manifest(root: Path) -> dict[str, Any]:
    data = (root / "MANIFEST.json").read_bytes()
    line = (root / "MANIFEST.xxh128").read_bytes()
    check(line == f"{xxh128(data)}  MANIFEST.json\n".encode(), "MANIFEST.xxh128 is not the digest of MANIFEST.json")
    manifest: dict[str, Any] = load_json(data)
    check(manifest["format"] == "snapstone", "format is", manifest["format"])
    check(re.fullmatch(r"[0-9]{1,6}\.[0-9]{1,6}", manifest["format_version"]), "format_version is malformed")
    check(int(manifest["format_version"].split(".")[0]) == MAJOR, "format", manifest["format_version"])
    check(HEX128.fullmatch(manifest["save_id"]), "save_id")
    check(manifest["step"] is None or type(manifest["step"]) is int, "step")
    check(type(manifest["metadata"]) is dict and type(manifest["environment"]) is dict, "metadata, environment")
    check(len(manifest["writers"]) == manifest["world_size"], "there are not as many writers as ranks")
    base = manifest.get("base")
    if base is not None:
        check(HEX128.fullmatch(base["save_id"]) and FILE_NAME.fullmatch(base["name"]), "base")
        check(base["step"] is None or type(base["step"]) is int, "step of the base")
        check(type(base["depth"]) is int and base["depth"] >= 1, "depth of the base")
    return manifest


def read_shared(root: Path, manifest: dict[str, Any]) -> dict[str, bytes]:
    """The shared files by name."""
    entries = manifest.get("shared", [])
    files = {}
    for entry in entries:
        directory, _, component = entry["name"].partition("/")
        check(directory == "base" and FILE_NAME.fullmatch(component), "shared file name", entry["name"])
        check(HEX128.fullmatch(entry["xxh128"]), "digest of", entry["name"])
        check(entry["name"] not in files, entry["name"], "is named twice")
        check(not (root / "base").is_symlink() and not (root / entry["name"]).is_symlink(), entry["name"], "is a link")
        files[entry["name"]] = (root / entry["name"]).read_bytes()
        check(len(files[entry["name"]]) == entry["nbytes"], entry["name"], "has another size")
    if files:
        found = {f"base/{entry.name}" for entry in (root / "base").iterdir()}
        check(found == files.keys(), "base holds other files than the manifest names")
    return files


def read_index(root: Path, manifest: dict[str, Any], writer: dict[str, Any]) -> tuple[dict[str, Any], Any]:
    entry = writer["index"]
    data = (root / entry["name"]).read_bytes()
    check((len(data), xxh128(data)) == (entry["nbytes"], entry["xxh128"]), entry["name"], "has another size or digest")
    magic, header_bytes = struct.unpack_from("<8sQ", data)
    check(magic == b"SNAPSIDX", entry["name"], "starts with", magic)
    check(header_bytes <= len(data) - 16, entry["name"], "ends in its header")
    header: dict[str, Any] = load_json(data[16 : 16 + header_bytes])
    begin = -(-(16 + header_bytes) // 64) * 64
    check(not any(data[16 + header_bytes : begin]), entry["name"], "has padding that is not zero")
    check(len(data) - begin == header["chunk_count"] * CHUNK.itemsize, entry["name"], "has a table of another size")
    same = ("save_id", "world_size", "format_version")
    check(all(header[key] == manifest[key] for key in same), entry["name"], "belongs to another save")
    check(header["rank"] == writer["rank"], entry["name"], "belongs to another rank")
    own = [data["name"] for data in writer["data"]]
    files, shared = header["files"], {entry["name"] for entry in manifest.get("shared", [])}
    check(files[: len(own)] == own and len(set(files)) == len(files), entry["name"], "names other files")
    check(set(files[len(own) :]) <= shared, entry["name"], "names shared files that the manifest does not")
    references = header.get("references", 0)
    check(type(references) is int and 0 <= references <= header["chunk_count"], "references")
    check(0 < header["chunk_bytes"] <= CHUNK_BYTES_MAX, "chunk_bytes")
    return header, np.frombuffer(data[begin:], CHUNK)


def read_chunks(
    root: Path, writer: dict[str, Any], header: dict[str, Any], table: Any, shared: dict[str, bytes]
) -> list[bytes]:
    """The raw bytes of every record of one writer, reference chunks too."""
    own = [(root / entry["name"]).read_bytes() for entry in writer["data"]]
    for number, (entry, data) in enumerate(zip(writer["data"], own, strict=True)):
        rows = table[table["file"] == number]
        check(len(data) == entry["nbytes"], entry["name"], "has another size")
        check(xxh128(rows.tobytes()) == entry["xxh128"], entry["name"], "has another table digest")
        extents = sorted({row.tobytes(): (int(row["offset"]), int(row["stored_bytes"])) for row in rows}.values())
        ends = [0, *(offset + -(-stored // PAGE) * PAGE for offset, stored in extents)]
        check([*(offset for offset, _ in extents), len(data)] == ends, entry["name"], "is not covered by its chunks")
    files = own + [shared[name] for name in header["files"][len(own) :]]
    used = {int(number) for number in table["file"]}
    check(set(range(len(own), len(files))) <= used, "a shared file holds no chunk of rank", writer["rank"])
    reference_of = read_references(table, header.get("references", 0))
    chunks: list[bytes] = [b""] * len(table)
    for number in reversed(range(len(table))):  # references come first
        reference = reference_of.get(number)
        raw = None if reference is None else chunks[reference]
        chunks[number] = read_chunk(f"chunk {number}", table[number], files, header, raw)
    return chunks


def read_references(table: Any, references: int) -> dict[int, int]:
    """The reference of each record that has one."""
    first = len(table) - references
    with_xor = [number for number, row in enumerate(table) if int(row["codec"]) in XOR_CODECS]
    check(len(with_xor) == references, "there are not as many references as records with an xor codec")
    reference_of = {number: first + k for k, number in enumerate(with_xor)}
    records = [1] * len(table)
    for number, reference in sorted(reference_of.items(), reverse=True):
        check(reference > number, f"chunk {number}: its reference does not stand behind it")
        check(table[reference]["raw_bytes"] == table[number]["raw_bytes"], f"chunk {number}: size of its reference")
        records[number] += records[reference]
        check(records[number] <= CHAIN_RECORDS_MAX, f"chunk {number}: chain of references")
    return reference_of


def read_chunk(what: str, row: Any, files: list[bytes], header: dict[str, Any], reference: bytes | None) -> bytes:
    offset, stored, raw, file, codec, reserved = (int(row[name]) for name in CHUNK.names[:6])
    check(file < len(files) and reserved == 0 and offset % PAGE == 0, what, "record")
    check(codec in CODECS or codec in XOR_CODECS, what, "codec")
    check(0 < stored <= raw <= header["chunk_bytes"], what, "sizes")
    padded = files[file][offset : offset + -(-stored // PAGE) * PAGE]
    check(not any(padded[stored:]), what, "padding after it is not zero")
    data = decode_chunk(what, {**CODECS, **XOR_CODECS}[codec], padded[:stored], raw)
    check(len(data) == raw, what, "has", len(data), "raw bytes, not", raw)
    if reference is not None:
        data = np.bitwise_xor(np.frombuffer(data, np.uint8), np.frombuffer(reference, np.uint8)).tobytes()
    check(xxhash.xxh3_128_digest(data) == bytes(row["digest"]), what, "digest")
    return data


def decode_chunk(what: str, item_bytes: int | None, stored: bytes, raw_bytes: int) -> bytes:
    if item_bytes is None:
        return stored
    try:
        check(zstandard.get_frame_parameters(stored).dict_id == 0, what, "needs a dictionary")
        decoder = zstandard.ZstdDecompressor()
        data: bytes = decoder.decompress(stored, max_output_size=raw_bytes, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise FormatError(f"{what}: {error}") from None
    items = len(data) // item_bytes
    planes = np.frombuffer(data, np.uint8, items * item_bytes).reshape(item_bytes, items)
    return planes.T.tobytes() + data[items * item_bytes :]


def read_shard(row: dict[str, Any], header: dict[str, Any], chunks: list[bytes], used: list[Any]) -> bytes | None:
    """None for a derived shard, which has no bytes of its own."""
    name, shape, sizes = row["name"], row["shape"], row.get("sizes", row["shape"])
    offsets = row.get("offsets", [0] * len(shape))
    check(len(shape) == len(sizes) == len(offsets) <= 64, name, "has lists of different lengths")
    check(all(0 <= o <= o + s <= n for o, s, n in zip(offsets, sizes, shape, strict=True)), name, "reaches outside")
    check(row["dtype"] in ITEM_BYTES, name, "has dtype", row["dtype"])
    nbytes = math.prod(sizes) * ITEM_BYTES[row["dtype"]]
    first, count = row["chunks"]
    at = row.get("at", 0)
    check(("derived_from" in row) == ("xxh128" in row), name, "is half derived")
    if "derived_from" in row:
        check(row["dtype"] in DERIVED_DTYPES and nbytes and (first, count, at) == (0, 0, 0), name, "cannot be derived")
        return None
    check(first + count <= len(chunks) and (count == 0) == (nbytes == 0), name, "chunks")
    if nbytes < PACK_BELOW:
        check(at % PACK_ALIGNMENT == 0 and count <= 1, name, "is packed wrongly")
    else:
        check(at == 0 and count == -(-nbytes // header["chunk_bytes"]), name, "is cut wrongly")
        check(all(len(chunks[i]) == header["chunk_bytes"] for i in range(first, first + count - 1)), name, "cuts")
        check(sum(len(chunks[i]) for i in range(first, first + count)) == nbytes, name, "shares its last chunk")
    for i in range(first, first + count):
        used[i][at : at + nbytes] = True
    data = b"".join(chunks[first : first + count])[at : at + nbytes]
    check(len(data) == nbytes, name, "is longer than its chunks")
    return data


def assemble_all(pieces: dict[str, list[tuple[dict[str, Any], bytes | None]]]) -> dict[str, Tensor]:
    """Masters first: what is derived is made of them."""
    whole: dict[str, Tensor] = {}
    for name, shards in sorted(pieces.items(), key=lambda entry: any(data is None for _, data in entry[1])):
        filled = [(row, derive(row, whole) if data is None else data) for row, data in shards]
        whole[name] = assemble(name, filled)
    return {name: whole[name] for name in pieces}


def derive(row: dict[str, Any], masters: dict[str, Tensor]) -> bytes:
    """The bytes of a derived shard."""
    name, master = row["name"], masters.get(row["derived_from"])
    check(master is not None, name, "has no master", row["derived_from"])
    assert master is not None
    check((master.dtype, list(master.shape)) == ("float32", row["shape"]), name, "has a master of another kind")
    sizes, offsets = row.get("sizes", row["shape"]), row.get("offsets", [0] * len(row["shape"]))
    box = tuple(slice(offset, offset + size) for offset, size in zip(offsets, sizes, strict=True))
    exact = np.frombuffer(master.data, "<f4").reshape(master.shape)[box]
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
    item_bytes = ITEM_BYTES[head["dtype"]]
    whole = np.zeros((*head["shape"], item_bytes), np.uint8)
    covered = np.zeros(head["shape"], np.uint8)
    for row, data in shards:
        check((row["dtype"], row["shape"]) == (head["dtype"], head["shape"]), name, "has shards that disagree")
        sizes, offsets = row.get("sizes", row["shape"]), row.get("offsets", [0] * len(row["shape"]))
        box = tuple(slice(offset, offset + size) for offset, size in zip(offsets, sizes, strict=True))
        whole[box] = np.frombuffer(data, np.uint8).reshape(*sizes, item_bytes)
        covered[box] += 1
    check((covered == 1).all(), name, "is not tiled by its shards")
    return Tensor(head["dtype"], tuple(head["shape"]), whole.tobytes(), head.get("path", [name]))


def decode(value: Any) -> Any:
    """The Python value of typed JSON. Values of torch's own types come back as `Tagged`, and so do pickles."""
    if type(value) is list:
        return [decode(item) for item in value]
    if type(value) is not dict:
        return value
    ((tag, payload),) = value.items() if len(value) == 1 else (("", None),)
    if not tag.startswith("$"):
        check(not any(key.startswith("$") for key in value), "a tag among other keys")
        return {key: decode(item) for key, item in value.items()}
    check(tag in DECODERS or tag in TORCH_TAGS, "unknown tag", tag)
    return DECODERS[tag](payload) if tag in DECODERS else Tagged(tag, payload)


def array(payload: dict[str, Any], shape: list[int]) -> Any:
    dtype = payload["dtype"]
    dtype = np.dtype(dtype if dtype[0] in "<>|" else np.dtype(dtype).newbyteorder("<"))
    return np.frombuffer(base64.b64decode(payload["data"], validate=True), dtype).reshape(shape)


def special_float(text: str) -> float:
    return struct.unpack(">d", bytes.fromhex(text))[0] if len(text) == 16 else float(text)


TORCH_TAGS = {"$dtype", "$device", "$size", "$tensor", "$pickle"}
DECODERS: dict[str, Any] = {
    "$tuple": lambda payload: tuple(map(decode, payload)),
    "$set": lambda payload: set(map(decode, payload)),
    "$frozenset": lambda payload: frozenset(map(decode, payload)),
    "$dict": lambda payload: {decode(key): decode(item) for key, item in payload},
    "$slice": lambda payload: slice(*map(decode, payload)),
    "$range": lambda payload: range(*payload),
    "$ellipsis": lambda payload: ...,
    "$complex": lambda payload: complex(*map(decode, payload)),
    "$float": special_float,
    "$int": lambda payload: int(payload, 16),
    "$str": lambda payload: base64.b64decode(payload, validate=True).decode("utf-8", "surrogatepass"),
    "$bytes": lambda payload: base64.b64decode(payload, validate=True),
    "$bytearray": lambda payload: bytearray(base64.b64decode(payload, validate=True)),
    "$path": lambda payload: PurePosixPath(decode(payload)),
    "$datetime": datetime.datetime.fromisoformat,
    "$date": datetime.date.fromisoformat,
    "$timedelta": lambda payload: datetime.timedelta(*payload),
    "$numpy": lambda payload: array(payload, [1])[0],
    "$ndarray": lambda payload: array(payload, payload["shape"]),
}


if __name__ == "__main__":
    found = read(sys.argv[1])
    for name, tensor in found.tensors.items():
        print(f"{name}  {tensor.dtype}{list(tensor.shape)}  {xxh128(tensor.data)}")
    for rank, objects in enumerate(found.objects):
        for name, item in objects.items():
            print(f"{name}  (rank {rank})  {json.dumps(item.value)}")
