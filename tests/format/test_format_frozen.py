"""A fresh save has the layout that docs/format.md gives for its version; a change of one byte needs a new version.

Invariants:
  1. Saving the states of the golden checkpoints again gives their files byte for byte, once the save_id, which every
     save draws anew, is put in: MANIFEST.json, MANIFEST.xxh128, indexes and data. Of compressed chunks, whose bytes
     are the library's, the records without stored size and offset.
  2. Keys, their order and their types; the magic; the chunk record and its offsets; the limits: all as documented.
  3. Codec numbers and file names, also those of delta saves and derived shards, are those of the golden files.
  4. docs/format.md is about this version, lists it under "Version changes", and there are golden files of every
     version in that list.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash

from format import make_golden, reference_reader
from format.make_golden import CHAINS, CODECS, GOLDEN
from snapstone import _native
from snapstone.config import FORMAT_MAJOR, FORMAT_MINOR
from snapstone.index import CHUNK_DTYPE
from snapstone.manifest import digest_line

pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf:UserWarning")
DOCUMENT = Path(__file__).parents[2] / "docs" / "format.md"
VERSION = f"{FORMAT_MAJOR}.{FORMAT_MINOR}"

MANIFEST_KEYS = {
    "format": str,
    "format_version": str,
    "save_id": str,
    "step": int,
    "world_size": int,
    "nbytes": int,
    "writers": list,
    "metadata": dict,
    "environment": dict,
}
INDEX_KEYS = {
    "format_version": str,
    "save_id": str,
    "rank": int,
    "world_size": int,
    "files": list,
    "chunk_bytes": int,
    "chunk_count": int,
    "tensors": list,
    "objects": dict,
}
TENSOR_KEYS = {"name": str, "dtype": str, "shape": list, "offsets": list, "sizes": list, "chunks": list, "at": int}
TENSOR_KEYS |= {"derived_from": str, "xxh128": str, "path": list}
CODEC_NAMES = {1: "zstd", 2: "planes 2", 3: "planes 4", 4: "planes 8", 5: "xor", 6: "xor 2", 7: "xor 4", 8: "xor 8"}


def types_of(document: dict[str, Any]) -> dict[str, type]:
    return {key: type(value) for key, value in document.items()}


def read_index(path: Path, rank: int = 0) -> tuple[dict[str, Any], Any]:
    manifest = reference_reader.read_manifest(path)
    return reference_reader.read_index(path, manifest, manifest["writers"][rank])


@pytest.fixture(scope="module", params=sorted(CODECS))
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A golden checkpoint of this version, and the same state saved now."""
    fresh = tmp_path_factory.mktemp("fresh") / request.param
    make_golden.save(request.param, fresh)
    return GOLDEN / VERSION / request.param, fresh


def test_there_are_golden_files_of_this_version() -> None:
    assert sorted(path.name for path in (GOLDEN / VERSION).iterdir()) == sorted([*CODECS, *CHAINS, "expected.json"])


def test_a_fresh_save_is_the_golden_one_byte_for_byte(pair: tuple[Path, Path]) -> None:
    golden, fresh = pair
    assert [file.name for file in sorted(fresh.iterdir())] == [file.name for file in sorted(golden.iterdir())]
    assert (fresh / "MANIFEST.xxh128").read_bytes() == digest_line((fresh / "MANIFEST.json").read_bytes())
    old, new = (reference_reader.read_manifest(path) for path in pair)
    if CODECS[golden.name] is not None:
        return  # compressed bytes are the library's; the next test compares the rest
    for file in sorted(fresh.iterdir()):
        data = file.read_bytes().replace(new["save_id"].encode(), old["save_id"].encode())
        if not file.name.startswith("MANIFEST"):
            assert data == (golden / file.name).read_bytes(), file.name
    resign(new, old)
    text = (json.dumps(new, indent=1) + "\n").encode()
    assert text == (golden / "MANIFEST.json").read_bytes()


def test_a_fresh_save_has_the_golden_structure(pair: tuple[Path, Path]) -> None:
    golden, fresh = pair
    old, new = (reference_reader.read_manifest(path) for path in pair)
    resign(new, old)
    for writer in (*new["writers"], *old["writers"]):
        for entry in writer["data"]:
            entry.update(nbytes=0, xxh128="")
    assert new == old
    for rank in range(old["world_size"]):
        old_header, old_table = read_index(golden, rank)
        new_header, new_table = read_index(fresh, rank)
        assert list(new_header) == list(old_header)
        assert {**new_header, "save_id": ""} == {**old_header, "save_id": ""}
        for field in ("raw_bytes", "file", "codec", "reserved", "digest"):
            assert np.array_equal(new_table[field], old_table[field]), field


def unsigned(path: Path) -> tuple[list[str], list[Any]]:
    """Names of all files and all documents of a checkpoint, save_ids as numbers, without the bytes of zstd."""
    numbers: dict[str, str] = {}
    manifest = reference_reader.read_manifest(path)
    parts = [read_index(path, rank) for rank in range(manifest["world_size"])]
    for entry in (entry for writer in manifest["writers"] for entry in (writer["index"], *writer["data"])):
        entry.update(nbytes=0, xxh128="")
    for entry in manifest["shared"]:
        entry.update(nbytes=0, xxh128="")
    ids = [manifest["save_id"], manifest["base"]["save_id"]]
    for header, _ in parts:
        ids += re.findall("[0-9a-f]{32}", json.dumps(header["files"]))
    for save_id in ids:
        numbers.setdefault(save_id, f"<save {len(numbers)}>")
    manifest["shared"].sort(key=lambda entry: numbers[entry["name"][5:37]])
    manifest["base"]["name"] = ""
    names = sorted(str(file.relative_to(path)) for file in path.rglob("*"))
    documents = [manifest, *(header for header, _ in parts)]
    text = json.dumps([names, documents])
    for save_id, number in numbers.items():
        text = text.replace(save_id, number)
    names, documents = json.loads(text)
    tables = [[table[field].tolist() for field in ("raw_bytes", "file", "codec", "digest")] for _, table in parts]
    return sorted(names), [*documents, *tables]


@pytest.mark.parametrize("kind", sorted(CHAINS))
def test_a_fresh_delta_save_has_the_golden_structure(tmp_path: Path, kind: str) -> None:
    make_golden.save(kind, tmp_path / kind)
    golden = unsigned(GOLDEN / VERSION / kind)
    assert unsigned(tmp_path / kind) == golden
    assert list(golden[1][0]) == [*list(MANIFEST_KEYS)[:7], "base", "shared", *list(MANIFEST_KEYS)[7:]]
    assert list(golden[1][0]["base"]) == ["save_id", "step", "name", "depth"]
    if kind == "xor":
        assert list(golden[1][1]) == [*list(INDEX_KEYS)[:7], "references", *list(INDEX_KEYS)[7:]]


def test_the_golden_files_have_every_feature() -> None:
    """A feature that no golden file has is frozen by nothing."""
    codecs: set[int] = set()
    keys: set[str] = set()
    names: set[str] = set()
    for path in (GOLDEN / VERSION).iterdir():
        if path.is_dir():
            manifest = reference_reader.read_manifest(path)
            names |= {re.sub("[0-9a-f]{32}", "ID", str(file.relative_to(path))) for file in path.rglob("*")}
            for rank in range(manifest["world_size"]):
                header, table = read_index(path, rank)
                codecs |= set(table["codec"].tolist())
                keys |= {key for row in header["tensors"] for key in row}
    assert codecs == set(reference_reader.CODECS | reference_reader.XOR_CODECS)
    assert keys == set(TENSOR_KEYS)
    wanted = ["base/ID.rank-00000.carried.data", "base/ID.rank-00000.data", "rank-00000.carried.data"]
    assert {"MANIFEST.json", "MANIFEST.xxh128", "rank-00001.data", "rank-00001.index", ".metadata", *wanted} <= names


def test_codec_numbers_are_the_documented_ones() -> None:
    """Each number decodes what the reference reader's table says of it."""
    raw = bytes(range(256)) * 16
    table = DOCUMENT.read_text().partition("### Codecs")[2].partition("###")[0]
    numbers = [int(number) for number in re.findall(r"^\| (\d+) \|", table, re.MULTILINE)]
    assert numbers == [0, *CODEC_NAMES] == sorted(reference_reader.CODECS | reference_reader.XOR_CODECS)
    for number in CODEC_NAMES:
        reference = bytes(len(raw)) if number in reference_reader.XOR_CODECS else None
        stored = _native.encode_chunk(raw, number, 3, reference)
        item_bytes = (reference_reader.CODECS | reference_reader.XOR_CODECS)[number]
        assert reference_reader.decode_chunk("", item_bytes, stored, len(raw)) == raw, CODEC_NAMES[number]
    with pytest.raises(ValueError, match="unknown codec"):
        _native.encode_chunk(raw, 9, 3)


def resign(new: dict[str, Any], old: dict[str, Any]) -> None:
    """The save_id of `old` in `new`, and the digests of indexes that follow from it."""
    assert re.fullmatch("[0-9a-f]{32}", new["save_id"])
    assert new["save_id"] != old["save_id"]
    new["save_id"] = old["save_id"]
    for mine, theirs in zip(new["writers"], old["writers"], strict=True):
        assert mine["index"]["nbytes"] == theirs["index"]["nbytes"]
        mine["index"]["xxh128"] = theirs["index"]["xxh128"]


def test_documents_have_the_keys_of_the_format(pair: tuple[Path, Path]) -> None:
    _, fresh = pair
    manifest = reference_reader.read_manifest(fresh)
    assert list(types_of(manifest).items()) == list(MANIFEST_KEYS.items())
    assert manifest["format_version"] == VERSION
    for rank, writer in enumerate(manifest["writers"]):
        assert list(types_of(writer).items()) == [("rank", int), ("index", dict), ("data", list)]
        for entry in (writer["index"], *writer["data"]):
            assert list(types_of(entry).items()) == [("name", str), ("nbytes", int), ("xxh128", str)]
        assert writer["index"]["name"] == f"rank-{rank:05d}.index"
        assert [entry["name"] for entry in writer["data"]] == [f"rank-{rank:05d}.data"]
        header, _ = read_index(fresh, rank)
        assert list(types_of(header).items()) == list(INDEX_KEYS.items())
        order = list(TENSOR_KEYS)
        for row in header["tensors"]:
            assert all(type(value) is TENSOR_KEYS[key] for key, value in row.items()), row
            assert sorted(row, key=order.index) == list(row)
        for entry in header["objects"].values():
            assert list(entry) == ["path", "value"]


def test_the_chunk_record_is_the_documented_one() -> None:
    names = ("offset", "stored_bytes", "raw_bytes", "file", "codec", "reserved", "digest")
    assert CHUNK_DTYPE.names == names
    assert [str(CHUNK_DTYPE[name]) for name in names] == ["uint64", *["uint32"] * 3, "uint16", "uint16", "|V16"]
    assert [CHUNK_DTYPE.fields[name][1] for name in names] == [0, 8, 12, 16, 20, 22, 24]
    assert CHUNK_DTYPE.itemsize == 40
    assert reference_reader.CHUNK == CHUNK_DTYPE
    text = DOCUMENT.read_text()
    rows = re.findall(r"^\| (\d+) \| (\d+) \| `(\w+)` \|", text, re.MULTILINE)
    assert [(int(at), int(size), name) for at, size, name in rows] == [
        (CHUNK_DTYPE.fields[name][1], CHUNK_DTYPE[name].itemsize, name) for name in names
    ]


def test_digests_and_limits_are_the_documented_ones() -> None:
    assert _native.digest_hex(b"snapstone") == xxhash.xxh3_128_hexdigest(b"snapstone")
    assert _native.CHUNK_BYTES_MAX == reference_reader.CHUNK_BYTES_MAX
    assert _native.PACK_THRESHOLD_BYTES == reference_reader.PACK_BELOW
    assert _native.is_file_name("a" * 128)
    for name in ("", ".", "..", ".a", "a/b", "a" * 129, "ü", "a b", "a\0"):
        assert not _native.is_file_name(name), name


def test_the_document_is_about_this_version() -> None:
    text = DOCUMENT.read_text()
    assert re.search(rf"^# .*\b{re.escape(VERSION)}$", text, re.MULTILINE), "the title names the version"
    changes = text.partition("\n## Version changes\n")[2]
    assert changes, "the last section is 'Version changes'"
    assert "\n## " not in changes
    listed = re.findall(r"^- \*\*(\d+\.\d+)\*\*", changes, re.MULTILINE)
    assert listed[0] == VERSION, "newest first"
    assert sorted(listed) == sorted(path.name for path in GOLDEN.iterdir())


def test_every_documented_key_and_tag_exists() -> None:
    text = DOCUMENT.read_text()
    from snapstone.values import _DECODERS, STORED_DTYPES

    for key in (*MANIFEST_KEYS, *INDEX_KEYS, *TENSOR_KEYS, *_DECODERS, *STORED_DTYPES):
        assert f'`"{key}"`' in text or f"`{key}`" in text, f"docs/format.md does not explain {key}"
