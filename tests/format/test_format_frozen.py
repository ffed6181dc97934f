"""A fresh save has the layout that docs/format.md gives for its version; a change of one byte needs a new version.

Invariants:
  1. Saving the states of the golden checkpoints again gives their files byte for byte, once the save_id, which every
     save draws anew, is put in: MANIFEST.json, MANIFEST.xxh128, indexes and data. Of compressed chunks, whose bytes
     are the library's, the records without stored size and offset.
  2. Keys, their order and their types; the magic; the chunk record and its offsets; the limits: all as documented.
  3. docs/format.md is about this version, lists it under "Version changes", and there are golden files of every
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
from format.make_golden import CODECS, GOLDEN
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
TENSOR_KEYS["path"] = list


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
    assert sorted(path.name for path in (GOLDEN / VERSION).iterdir()) == sorted([*CODECS, "expected.json"])


def test_a_fresh_save_is_the_golden_one_byte_for_byte(pair: tuple[Path, Path]) -> None:
    golden, fresh = pair
    assert [file.name for file in sorted(fresh.iterdir())] == [file.name for file in sorted(golden.iterdir())]
    assert (fresh / "MANIFEST.xxh128").read_bytes() == digest_line((fresh / "MANIFEST.json").read_bytes())
    old, new = (reference_reader.read_manifest(path) for path in pair)
    if CODECS[golden.name] is not None:
        return  # compressed bytes are the library's; the next test compares the rest
    for file in sorted(fresh.iterdir()):
        data = file.read_bytes().replace(new["save_id"].encode(), old["save_id"].encode())
        if file.name.startswith("rank-"):
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
