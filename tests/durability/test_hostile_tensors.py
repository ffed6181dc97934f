"""Tensors, shards and values by a writer who means harm and computes every digest right.

Invariants, for everything here: reading it ends in success or in a CheckpointError, within 100 ms of CPU and 64 MiB,
and what docs/format.md says readers must refuse is refused.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import snapstone as ss
from durability import hostile, small
from durability.forge import Forge
from durability.hostile import assert_refused, try_everything

SEED = 90211
INT64_MAX = (1 << 63) - 1


@pytest.fixture(autouse=True)
def seeded(monkeypatch: pytest.MonkeyPatch) -> None:
    print(f"seed {SEED}")
    hostile.skip_without_memory_counter()
    monkeypatch.setenv("SNAPSTONE_CHUNK_BYTES", "65536")


@pytest.fixture
def source(directory: Path) -> Path:
    path = directory / "source"
    ss.save(small.state(1), checkpoint_id=path, metadata={"t": (1, 2)})
    try_everything(path)  # the first use of anything takes memory that is kept
    return path


@pytest.fixture
def path(directory: Path) -> Path:
    return directory / "hostile"


def tensor_changes() -> dict[str, dict[str, Any]]:
    """What is said about the tensor "small", which has 60 bytes in the shape [3, 5]."""
    box = {"shape": [3, 5], "offsets": [0, 0], "sizes": [3, 5]}
    return {
        "overflow 2^62 x 4": {"shape": [1 << 62, 4]},
        "overflow 2^32 x 2^32": {"shape": [1 << 32, 1 << 32]},
        "overflow of bytes": {"shape": [INT64_MAX]},
        "overflow around zero": {"shape": [0, 1 << 62, 1 << 62], "chunks": [0, 0]},
        "much around zero": {"shape": [0, INT64_MAX], "chunks": [0, 0]},
        "terabytes": {"shape": [1 << 40]},
        "one more": {"shape": [3, 6]},
        "negative": {"shape": [-3, -5]},
        "float": {"shape": [3.0, 5.0]},
        "text": {"shape": "35"},
        "65 dimensions": {"shape": [1] * 65},
        "a million dimensions": {"shape": [1] * 1_000_000},
        "offset outside": {**box, "offsets": [1, 0]},
        "offset far outside": {**box, "offsets": [INT64_MAX, 0]},
        "negative offset": {**box, "offsets": [-1, 0], "sizes": [3, 5]},
        "hole": {**box, "sizes": [2, 5]},
        "larger than the shape": {**box, "sizes": [4, 5]},
        "other lengths": {**box, "sizes": [3, 5, 1]},
        "sizes alone": {"sizes": [3, 5]},
        "chunk after the table": {"chunks": [10_000, 1]},
        "chunk at the end of the table": {"chunks": [3, 1]},
        "chunk overflow": {"chunks": [INT64_MAX, INT64_MAX]},
        "negative chunk": {"chunks": [-1, 1]},
        "no chunk": {"chunks": [0, 0]},
        "one number": {"chunks": [0]},
        "three numbers": {"chunks": [0, 1, 0]},
        "float chunks": {"chunks": [0.0, 1.0]},
        "at the end of the chunk": {"at": 1 << 20},
        "at far outside": {"at": INT64_MAX},
        "negative at": {"at": -64},
        "unknown dtype": {"dtype": "float31"},
        "upper case dtype": {"dtype": "FLOAT32"},
        "attribute of torch": {"dtype": "load"},
        "quantized dtype": {"dtype": "qint8"},
        "other dtype": {"dtype": "complex128"},
        "path of nothing": {"path": []},
        "path of objects": {"path": [{}]},
        "path of keys": {"path": [{"$key": {"$dict": []}}]},
        "deep path": {"path": ["a"] * 100_000},
    }


@pytest.mark.parametrize("name", list(tensor_changes()))
def test_tensors_that_cannot_be(source: Path, path: Path, name: str) -> None:
    forge = Forge(source)
    row = next(row for row in forge.header["tensors"] if row["name"] == "small")
    row.update(tensor_changes()[name])
    forge.write(path)
    outcomes = try_everything(path)
    assert outcomes["load"] is not None
    # These three are sound in themselves, only not what the loader of `small` wants.
    assert outcomes["open"] is not None or name in ("other dtype", "much around zero", "one more")


@pytest.mark.parametrize("name", ["small", "derived"])
def test_no_memory_is_made_for_what_is_claimed_and_not_stored(source: Path, path: Path, name: str) -> None:
    forge = Forge(source)
    row = next(row for row in forge.header["tensors"] if row["name"] == "small")
    row.update(shape=[1 << 40, 5], offsets=[0, 0], sizes=[3, 5])
    derived = {"shape": [1 << 40, 5], "chunks": [0, 0], "derived_from": "small", "xxh128": "0" * 32}
    forge.header["tensors"].append({"name": "derived", "dtype": "bfloat16", **derived})
    forge.write(path)
    outcomes = try_everything(path)
    assert isinstance(outcomes["open"], ss.IncompleteCheckpointError)
    assert "elements are in no saved shard" in str(outcomes["verify"])
    with pytest.raises(ss.IncompleteCheckpointError):
        ss.Checkpoint.open(path).get_tensor(name)
    with pytest.raises(ss.IncompleteCheckpointError):
        ss.Checkpoint.open(path).get_slice(name)[:]


def test_a_key_that_is_missing_from_a_tensor(source: Path, path: Path) -> None:
    for key in ("name", "dtype", "shape", "chunks"):
        forge = Forge(source)
        del forge.header["tensors"][0][key]
        forge.write(path)
        assert_refused(path, ss.CorruptCheckpointError)


def test_shards_that_overlap_leave_a_hole_or_disagree(source: Path, path: Path) -> None:
    def shards(*boxes: tuple[int, int], **more: Any) -> Forge:
        forge = Forge(source)
        rows = forge.header["tensors"]
        row = rows.pop(next(i for i, row in enumerate(rows) if row["name"] == "small"))
        for first, count in boxes:
            rows.append({**row, "shape": [3, 5], "offsets": [first, 0], "sizes": [count, 5]})
        rows[-1].update(more)
        return forge

    cases = {
        "hole": shards((0, 1), (2, 1)),
        "overlap": shards((0, 2), (1, 2)),
        "overlap that adds up": shards((0, 2), (0, 1)),
        "other dtype": shards((0, 1), (1, 2), dtype="int32"),
        "other shape": shards((0, 1), (1, 2), shape=[3, 6]),
        "other dimensions": shards((0, 1), (1, 2), shape=[15], offsets=[5], sizes=[10]),
    }
    for forge in cases.values():
        forge.write(path)
        for name in ("load", "open"):
            assert try_everything(path)[name] is not None
    shards((0, 1), (1, 2)).write(path)
    assert try_everything(path)["open"] is None


def object_values() -> dict[str, Any]:
    return {
        "unknown tag": {"$eval": "1"},
        "tag among keys": {"$tuple": [], "x": 1},
        "tuple of no list": {"$tuple": {"a": 1}},
        "bad base64": {"$bytes": "%%%"},
        "base64 of a number": {"$bytes": 5},
        "int of text": {"$int": "0x"},
        "int of a million digits": {"$int": "0x" + "f" * 1_000_000 + "g"},
        "float of a word": {"$float": "1.0"},
        "finite bits": {"$float": "3ff0000000000000"},
        "complex of one": {"$complex": [1.0]},
        "complex of text": {"$complex": ["1", "2"]},
        "range of zero": {"$range": [0, 1, 0]},
        "dict with list key": {"$dict": [[[1], 2]]},
        "dict with the same key": {"$dict": [[1, 2], [1, 3]]},
        "dict of triples": {"$dict": [[1, 2, 3]]},
        "set of lists": {"$set": [[1]]},
        "set of the same": {"$set": [1, 1]},
        "dtype of torch": {"$dtype": "load"},
        "dtype of dots": {"$dtype": "nn.Module"},
        "device": {"$device": "rm -rf"},
        "size of text": {"$size": ["a"]},
        "date": {"$date": "2020-13-01"},
        "datetime": {"$datetime": "x" * 100_000},
        "timedelta overflow": {"$timedelta": [10**30, 0, 0]},
        "path of a number": {"$path": 1},
        "pickle": {"$pickle": "gASVIQAAAAAAAACMBXBvc2l4lIwGc3lzdGVtlJOUjAZleGl0IDGUhZRSlC4="},
        "numpy object": {"$numpy": {"dtype": "O", "data": "AAAAAAAAAAA="}},
        "numpy record": {"$numpy": {"dtype": "i4,O", "data": ""}},
        "numpy without data": {"$numpy": {"dtype": "float32"}},
        "numpy of one byte": {"$numpy": {"dtype": "float32", "data": "AA=="}},
        "ndarray overflow": {"$ndarray": {"dtype": "uint8", "shape": [1 << 62, 1 << 62], "data": ""}},
        "ndarray negative": {"$ndarray": {"dtype": "uint8", "shape": [-1], "data": ""}},
        "ndarray of text": {"$ndarray": {"dtype": "<U9999999", "shape": [1], "data": ""}},
        "ndarray of none": {"$ndarray": {"dtype": "<U0", "shape": [1 << 40], "data": ""}},
        "tensor of nothing": {"$tensor": {"dtype": "float32", "shape": [1 << 40], "data": ""}},
        "tensor of dots": {"$tensor": {"dtype": "float32", "shape": [1], "data": "AAAAAA==", "code": 1}},
        "bool of two": {"$tensor": {"dtype": "bool", "shape": [1], "data": "Ag=="}},
        "deep tuple": json.loads('{"$tuple":[' * 240 + "1" + "]}" * 240),
        "str of bytes": {"$str": "////"},
    }


@pytest.mark.parametrize("name", list(object_values()))
def test_values_that_no_writer_writes(source: Path, path: Path, name: str) -> None:
    forge = Forge(source)
    forge.header["objects"]["extra"]["value"] = object_values()[name]
    forge.write(path)
    outcomes = try_everything(path)
    kind = ss.IncompatibleCheckpointError if name == "pickle" else ss.CorruptCheckpointError
    assert isinstance(outcomes["load"], kind), outcomes
    assert isinstance(outcomes["open"], kind), outcomes
    forge = Forge(source)
    forge.manifest["metadata"]["t"] = object_values()[name]
    forge.write(path)
    assert isinstance(try_everything(path)["open"], kind)


def test_names_that_confuse_are_only_names(source: Path, path: Path) -> None:
    for name in ("", "\0", "a\nb", "\u202e", "__proto__", "x" * 1_000_000, "\ud800", "../../x", "a.b.c." * 1000):
        forge = Forge(source)
        forge.header["tensors"][0]["name"] = name
        forge.header["objects"][name + "value"] = {"value": 1}
        forge.write(path)
        try_everything(path)
