"""What a checkpoint made to do harm can be, item by item: `hostile_items` has the list, with the tests of each item.

The tests that stand here are those that no other file of this folder has. Every test of the list asks for a typed error
in less than 100 ms of CPU and 64 MiB of memory (see `hostile.limited`).
"""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

import snapstone as ss
from durability import hostile, small
from durability.forge import DIGEST, MANIFEST, Forge, write_manifest
from durability.hostile import assert_refused, try_everything
from durability.hostile_items import ITEMS
from snapstone.run_directory import find_checkpoints

FILES = [
    *("test_hostile_documents", "test_hostile_files", "test_hostile_tensors", "test_hostile_chunks"),
    *("test_hostile_deltas", "test_hostile_list", "test_delta_bases", "test_delta_forged_bases", "test_diagnosis"),
]


def test_every_item_of_the_list_has_its_test() -> None:
    here = Path(__file__).parent
    places = [*(here / f"{name}.py" for name in FILES), here.parent / "fuzz" / "test_targets.py"]
    tests = {name for place in places for name in re.findall(r"^def (test_\w+)\(", place.read_text(), re.MULTILINE)}
    named = {(kind, item): text.split(", ") for kind, items in ITEMS.items() for item, text in items.items()}
    assert len(named) == 72, "an item was lost, or a new one is not counted"
    assert {item: set(found) - tests for item, found in named.items() if not set(found) <= tests} == {}


@pytest.fixture
def source(directory: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    hostile.skip_without_memory_counter()
    monkeypatch.setenv("SNAPSTONE_CHUNK_BYTES", "65536")
    path = directory / "source"
    ss.save(small.state(1), checkpoint_id=path, step=1)
    try_everything(path)  # the first use of anything takes memory that is kept
    return path


@pytest.fixture
def path(directory: Path) -> Path:
    return directory / "hostile"


def test_white_space_costs_what_reading_it_costs(source: Path, path: Path) -> None:
    forge = Forge(source)
    forge.write(path)
    sound = json.dumps(forge.manifest).encode()
    write_manifest(path, b" " * (4 << 20) + sound + b"\n" * (1 << 20))
    assert set(try_everything(path).values()) == {None}
    write_manifest(path, b" " * (4 << 20))
    assert_refused(path, ss.CorruptCheckpointError)


DOUBLED = ['"format":', '"rank":', '"xxh128":', '"nbytes":', '"world_size":']


@pytest.mark.parametrize("key", DOUBLED)
def test_a_key_stands_once_in_every_object(source: Path, path: Path, key: str) -> None:
    forge = Forge(source)
    forge.write(path)
    sound = json.dumps(forge.manifest, separators=(",", ":"))
    assert key in sound
    write_manifest(path, sound.replace(key, f"{key}0,{key}", 1).encode())
    assert_refused(path, ss.CorruptCheckpointError)
    write_manifest(path, sound.encode())
    assert set(try_everything(path).values()) == {None}
    header = json.dumps(forge.header, separators=(",", ":"))
    for inside in ('"name":', '"shape":', '"chunk_count":'):
        forge = Forge(source)
        forge.header_text = header.replace(inside, f"{inside}0,{inside}", 1).encode()
        forge.write(path)
        assert_refused(path, ss.CorruptCheckpointError)


@pytest.mark.parametrize("text", [b"", b"0" * 32, b"\xff" * 50, b"0" * 32 + b"  MANIFEST.json\n", b"x" * 100_000])
def test_digest_files_that_are_none_are_refused(source: Path, path: Path, text: bytes) -> None:
    Forge(source).write(path)
    (path / DIGEST).write_bytes(text)
    assert_refused(path, ss.CorruptCheckpointError)


NUMBERS = [
    "NaN",
    "Infinity",
    "-Infinity",
    "1e400",
    "1.0",
    "-1",
    "1e3",
    "18446744073709551616",
    "9" * 5000,
    '"1"',
    "true",
]


@pytest.mark.parametrize("number", NUMBERS, ids=lambda number: number[:12])
def test_integers_are_integers_of_64_bits(source: Path, path: Path, number: str) -> None:
    for field in ("world_size", "nbytes"):
        forge = Forge(source)
        forge.write(path)
        forge.manifest[field] = "PUT"
        write_manifest(path, json.dumps(forge.manifest).replace('"PUT"', number).encode())
        assert_refused(path, ss.CorruptCheckpointError)
    for field in ("rank", "world_size", "chunk_bytes", "chunk_count"):
        forge = Forge(source)
        forge.header[field] = "PUT"
        forge.header_text = json.dumps(forge.header).replace('"PUT"', number).encode()
        forge.write(path)
        assert_refused(path, ss.CorruptCheckpointError)


def test_an_integer_that_no_float_holds_is_read_as_it_is(source: Path, path: Path) -> None:
    forge = Forge(source)
    forge.manifest["step"] = (1 << 53) + 1
    forge.write(path)
    assert ss.Checkpoint.open(path).step == (1 << 53) + 1
    forge.manifest["world_size"] = (1 << 53) + 1
    forge.write(path)
    assert_refused(path, ss.CorruptCheckpointError)


def test_minus_zero_is_zero(source: Path, path: Path) -> None:
    forge = Forge(source)
    forge.header_text = json.dumps(forge.header).replace('"rank": 0', '"rank": -0').encode()
    assert b"-0" in forge.header_text
    forge.write(path)
    assert set(try_everything(path).values()) == {None}
    forge.header_text = json.dumps(forge.header).replace('"chunks": [0,', '"chunks": [-0.0,').encode()
    forge.write(path)
    assert_refused(path, ss.CorruptCheckpointError)


def test_ranks_stand_once_each_and_in_order(source: Path, path: Path) -> None:
    def writer(rank: int, name: int) -> dict[str, Any]:
        text = json.dumps(Forge(source).writer).replace("rank-00000", f"rank-{name:05}")
        return {**json.loads(text), "rank": rank}

    for ranks in ([(1, 0)], [(0, 0), (0, 1)], [(1, 1), (0, 0)], [(0, 0), (2, 2)], []):
        Forge(source).write(path)
        manifest = Forge(source).manifest
        manifest.update(writers=[writer(*one) for one in ranks], world_size=len(ranks))
        write_manifest(path, json.dumps(manifest).encode())
        if ranks:
            assert_refused(path, ss.CorruptCheckpointError)
        else:
            try_everything(path)


DTYPES = [
    "Float32",
    "FLOAT32",
    "float",
    "f32",
    "half",
    "torch.float32",
    ">f4",
    "float32 ",
    "fl\u00f6at32",
    "uint4",
    "int2",
    "bits1x8",
]


@pytest.mark.parametrize("dtype", [*DTYPES, "float32\0", "", "x" * 100_000], ids=lambda dtype: ascii(dtype[:12]))
def test_dtypes_have_one_name_and_whole_bytes(source: Path, path: Path, dtype: str) -> None:
    forge = Forge(source)
    row = next(row for row in forge.header["tensors"] if row["name"] == "small")
    row["dtype"] = dtype
    forge.write(path)
    outcomes = try_everything(path)
    assert all(outcome is not None for outcome in outcomes.values()), outcomes
    assert isinstance(outcomes["load"], (ss.IncompatibleCheckpointError, ss.CorruptCheckpointError))


def test_names_that_look_alike_are_two(directory: Path) -> None:
    names = ["e\u0301", "\u00e9", "weight", "Weight", "\uff57eight", "weight\u200b"]
    state = {name: torch.full((3,), float(number)) for number, name in enumerate(names)}
    ss.save(state, checkpoint_id=directory / "alike")
    with ss.Checkpoint.open(directory / "alike") as checkpoint:
        assert sorted(checkpoint.keys()) == sorted(names)
        for number, name in enumerate(names):
            assert torch.equal(checkpoint.get_tensor(name), torch.full((3,), float(number))), ascii(name)


@pytest.mark.parametrize("name", ["rank-00000.data.", "RANK-00000.DATA", "rank-00000.data..", "-", "n" * 128])
def test_file_names_are_taken_letter_by_letter(source: Path, path: Path, name: str) -> None:
    """As POSIX does: a name that another system would take for the file's is one of another file, which is missing."""
    forge = Forge(source)
    forge.write(path)
    forge.writer["data"][0]["name"] = name
    forge.header["files"] = [name]
    text = json.dumps(forge.header).encode()
    forge.index = struct.pack("<8sQ", b"SNAPSIDX", len(text)) + text
    forge.index += bytes(-len(forge.index) % 64) + forge.table.tobytes()
    forge.write(path)
    assert try_everything(path)["load"] is None, "the file of that name is written, and read"
    (path / name).unlink()
    assert_refused(path)


def test_links_planted_in_a_run_are_no_checkpoints(directory: Path) -> None:
    run, outside = directory / "run", directory / "outside"
    ss.save(small.state(1), checkpoint_id=run / "step-1", step=1)
    ss.save(small.state(2), checkpoint_id=outside / "step-9", step=9)
    (run / "step-5").symlink_to("nothing")
    (run / "step-6").symlink_to("step-6")
    (run / "LATEST").write_text("../outside/step-9")
    (run / "latest").symlink_to("/")
    (run / "step-7").mkdir()
    found = find_checkpoints(str(run))
    assert [Path(one).name for one in found] == ["step-1"]
    assert all(Path(one).resolve().parent == run.resolve() for one in found)


def test_a_file_that_is_cut_after_it_was_opened_is_an_error(source: Path, path: Path) -> None:
    """Files are read, never mapped, so that a cut is no signal."""
    Forge(source).write(path)
    with ss.Checkpoint.open(path) as checkpoint:
        os.truncate(path / "rank-00000.data", 4096)
        with pytest.raises(ss.CorruptCheckpointError):
            checkpoint.load_tensors()


def test_what_a_later_version_may_add_is_refused_by_name(source: Path, path: Path) -> None:
    """There is no list of features that a reader needs: each is met where it is used."""
    forge = Forge(source)
    forge.table["codec"][-1] = 9
    forge.write(path)
    assert_refused(path, ss.CorruptCheckpointError, "unknown codec")
    forge = Forge(source)
    forge.header["tensors"][0]["dtype"] = "float6_e3m2fn"
    forge.write(path)
    assert_refused(path, ss.IncompatibleCheckpointError, "float6_e3m2fn")
    forge = Forge(source)
    forge.header["objects"]["extra"]["value"] = {"$later": 1}
    forge.write(path)
    outcomes = try_everything(path)
    assert isinstance(outcomes["load"], ss.CorruptCheckpointError)
    assert "$later" in str(outcomes["load"])


def test_strides_and_byte_orders_are_not_of_the_format_and_change_nothing(source: Path, path: Path) -> None:
    forge = Forge(source)
    for row in forge.header["tensors"]:
        row.update(strides=[1 << 62, -1], order="F", byte_order=">")
    forge.header.update(endian="big", byte_order=">")
    forge.manifest.update(endian="big", byte_order=">")
    forge.write(path)
    small.assert_holds(path, 1)
    assert set(try_everything(path).values()) == {None}


def test_heads_and_tables_in_the_other_byte_order_are_refused(source: Path, path: Path) -> None:
    forge = Forge(source)
    forge.header_bytes = int.from_bytes(len(json.dumps(forge.header).encode()).to_bytes(8, "little"), "big")
    forge.write(path)
    assert_refused(path, ss.CorruptCheckpointError)
    forge = Forge(source)
    forge.table = forge.table.byteswap()
    forge.write(path)
    assert_refused(path, ss.CorruptCheckpointError)


def test_holes_and_turned_bytes_where_data_was_are_found(source: Path, path: Path) -> None:
    Forge(source).write(path)
    file = path / "rank-00000.data"
    data = file.read_bytes()
    for begin in range(0, len(data), 4096):
        page = data[begin : begin + 4096]
        turned = np.frombuffer(page, "<u4").byteswap().tobytes()
        for change in (None, turned):
            if change == page or (change is None and not any(page)):
                continue
            file.unlink()
            with file.open("wb") as sparse:
                sparse.truncate(len(data))
                for at, part in ((0, data[:begin]), (begin, change), (begin + 4096, data[begin + 4096 :])):
                    os.pwrite(sparse.fileno(), part or b"", at)
            assert_refused(path, ss.CorruptCheckpointError, "rank-00000.data")


def zipped() -> bytes:
    file = io.BytesIO()
    torch.save({"weights": torch.ones(3)}, file)  # a file of torch.save is a zip
    return file.getvalue()


ALSO: dict[str, Callable[[bytes], bytes]] = {
    "zip": lambda data: data + zipped(),
    "zip in front": lambda data: zipped() + data,
    "safetensors": lambda data: safetensors.torch.save({"x": torch.frombuffer(bytearray(data), dtype=torch.uint8)}),
    "pickle": lambda data: pickle.dumps(data),
}


@pytest.mark.parametrize("name", [MANIFEST, DIGEST, "rank-00000.index", "rank-00000.data"])
@pytest.mark.parametrize("kind", list(ALSO))
def test_files_that_are_something_else_too_are_refused(source: Path, path: Path, kind: str, name: str) -> None:
    """What another program takes for weights, with a checkpoint in it, and every digest right."""
    Forge(source).write(path)
    changed = ALSO[kind]((path / name).read_bytes())
    assert changed != (path / name).read_bytes()
    assert zipfile.is_zipfile(io.BytesIO(changed)) or kind != "zip"
    forge = Forge(source)
    if name == "rank-00000.data":
        forge.data = changed
    elif name == "rank-00000.index":
        forge.index = changed
    forge.write(path)
    if name == MANIFEST:
        write_manifest(path, changed)
    elif name == DIGEST:
        (path / name).write_bytes(changed)
    if (kind, name) == ("zip", "rank-00000.data"):
        outcomes = try_everything(path)
        assert outcomes["load"] is None, "of that file it reads chunks and nothing else"
        assert "do not cover the file" in str(outcomes["verify"])
    else:
        assert_refused(path, ss.CorruptCheckpointError)


def test_two_manifests_of_one_step_are_two_checkpoints_and_never_one(directory: Path, path: Path) -> None:
    run = directory / "run"
    for seed, name in ((1, "step-1"), (2, "step-01")):
        ss.save(small.state(seed), checkpoint_id=run / name, step=1)
    assert sorted(Path(one).name for one in find_checkpoints(str(run))) == ["step-01", "step-1"]
    forge, other = Forge(run / "step-1"), Forge(run / "step-01")
    forge.write(path)
    (path / "MANIFEST-2.json").write_bytes((run / "step-01" / MANIFEST).read_bytes())
    assert small.load(path) == small.bits(small.state(1))
    assert "MANIFEST-2.json: not part of the checkpoint" in ss.verify(path).problems[0]
    for part in ("manifest", "header", "table", "data"):
        forge = Forge(run / "step-1")
        setattr(forge, part, getattr(other, part))
        if part == "manifest":
            forge.writer = forge.manifest["writers"][0]
        forge.write(path)
        assert_refused(path, ss.CorruptCheckpointError)
    for seed, name in ((1, "step-1"), (2, "step-01")):
        small.assert_holds(run / name, seed)
