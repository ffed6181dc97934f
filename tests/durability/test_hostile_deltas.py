"""Delta checkpoints by a writer who means harm and computes every digest right.

Invariants:
  1. Shared files are named `base/` and one component, once, in the manifest and in the index; all else is refused.
  2. References that the table does not hold, that run in a circle or in a long chain are refused before they are read.
  3. Reading it ends in a CheckpointError, within 100 ms of CPU and 64 MiB, and opens no file outside the directory.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import snapstone as ss
from durability import hostile, small
from durability.delta import make_delta, rewrite_manifest
from durability.forge import MANIFEST, Forge, edit, places
from durability.hostile import assert_refused, try_everything
from format import reference_reader
from snapstone.errors import CorruptCheckpointError
from snapstone.reader import Reader

Change = Callable[[dict[str, Any]], Any]
BAD_VALUES: list[Any] = [
    None,
    True,
    -1,
    0,
    1 << 63,
    1.5,
    "x",
    "",
    "base",
    "base/",
    [],
    {},
    [[]],
    [{}],
    {"name": "base/x"},
]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    hostile.skip_without_memory_counter()
    monkeypatch.setenv("SNAPSTONE_CHUNK_BYTES", "65536")


@pytest.fixture
def source(directory: Path) -> Path:
    """`large` is as in the base, the packed chunk is new."""
    state = small.state(1)
    ss.save(state | {"scalar": state["scalar"] + 1}, checkpoint_id=directory / "before", step=1)
    ss.save(state, checkpoint_id=directory / "after", step=2)
    path = make_delta(directory / "before", directory / "after", directory / "source")
    assert len(json.loads((path / MANIFEST).read_bytes())["shared"]) == 1
    try_everything(path)
    return path


@pytest.fixture
def xor_source(directory: Path) -> Path:
    """The packed chunk is a difference from the one in the base, so the table ends with a reference."""
    state = small.state(1) | {"small": small.state(1)["small"].repeat(100, 1)}
    ss.save(state | {"scalar": state["scalar"] + 1}, checkpoint_id=directory / "before")
    ss.save(state, checkpoint_id=directory / "after")
    return make_delta(directory / "before", directory / "after", directory / "xor-source", xor=True)


@pytest.fixture
def path(directory: Path) -> Path:
    return directory / "hostile"


def test_the_forge_itself_makes_sound_deltas(source: Path, path: Path) -> None:
    Forge(source).write(path)
    assert set(try_everything(path).values()) == {None}
    small.assert_holds(path, 1)


def may_stand(at: tuple[Any, ...], value: Any) -> bool:
    if at == ("base", "step"):
        return value is None or (type(value) is int and value < 1 << 63)
    return (at == ("base",) and value is None) or (at == ("base", "name") and value in ("x", "base"))


def test_any_value_of_base_and_shared_replaced_or_removed(source: Path, path: Path) -> None:
    Forge(source).write(path)
    sound = json.loads((path / MANIFEST).read_bytes())
    for at in [at for at in places(sound) if at[0] in ("base", "shared")]:
        for value in BAD_VALUES:
            document = deepcopy(sound)
            edit(document, at, lambda inside, key, value=value: inside.__setitem__(key, value))
            rewrite_manifest(path, lambda old, document=document: (old.clear(), old.update(document)))
            outcomes = try_everything(path)
            assert (outcomes["load"] is None) == may_stand(at, value), (at, value)
        document = deepcopy(sound)
        edit(document, at, lambda inside, key: inside.__delitem__(key))
        rewrite_manifest(path, lambda old, document=document: (old.clear(), old.update(document)))
        if at != ("base",):
            assert_refused(path)


@pytest.mark.parametrize("kind", ["itself", "missing", "another run", "deep"])
def test_a_base_is_never_looked_for_whatever_it_is_said_to_be(source: Path, path: Path, kind: str) -> None:
    forge = Forge(source)
    says = {
        "itself": {"save_id": forge.manifest["save_id"], "name": path.name},
        "missing": {"name": "nothing"},
        "another run": {"save_id": "f" * 32, "name": "before"},
        "deep": {"depth": 100_000},
    }
    forge.manifest["base"].update(says[kind])
    forge.write(path)
    for one in (source, source.with_name("before"), source.with_name("after")):
        shutil.rmtree(one)
    assert set(try_everything(path).values()) == {None}
    small.assert_holds(path, 1)


SHARED_NAMES = [
    "",
    "base",
    "base/",
    "base/..",
    "base/../MANIFEST.json",
    "base/../../before/rank-00000.data",
    "base/a/b",
    "base//a",
    "./base/a",
    "/base/a",
    "/etc/passwd",
    "../before/rank-00000.data",
    "other/rank-00000.data",
    "rank-00000.data",
    "base/.hidden",
    "base/" + "a" * 129,
    "base/a\0b",
    "base/ä",
    "BASE/a",
]


@pytest.mark.parametrize("name", SHARED_NAMES)
def test_names_of_shared_files_do_not_leave_base(source: Path, path: Path, name: str) -> None:
    forge = Forge(source)
    forge.manifest["shared"][0]["name"] = name
    forge.header["files"][1] = name
    forge.write(path)
    assert_refused(path, ss.CorruptCheckpointError)


def test_an_index_uses_only_shared_files_that_the_manifest_names_and_each_once(source: Path, path: Path) -> None:
    sound = Forge(source).header["files"]
    assert len(sound) == 2
    wrong = [[sound[0]], [sound[1], sound[0]], [sound[1]], [*sound, sound[1]], [*sound, sound[0]], [sound[0], "base/x"]]
    wrong += [[sound[0], "rank-00000.index"], [sound[0], "base/../MANIFEST.json"], [*sound, "../x"]]
    for files in wrong:
        forge = Forge(source)
        forge.header["files"] = files
        forge.write(path)
        assert_refused(path, ss.CorruptCheckpointError)


def test_no_name_stands_twice_in_a_manifest(source: Path, path: Path) -> None:
    forge = Forge(source)
    forge.manifest["shared"] *= 2
    forge.write(path)
    assert_refused(path, ss.CorruptCheckpointError, "same name")


def test_chunks_lie_inside_their_shared_file(source: Path, path: Path) -> None:
    Forge(source).write(path)
    size = json.loads((path / MANIFEST).read_bytes())["shared"][0]["nbytes"]
    shared = np.flatnonzero(Forge(source).table["file"] == 1)
    assert len(shared) == 2
    for offset in (size, size - 4096, 1 << 40, (1 << 64) - 4096):
        forge = Forge(source)
        forge.table["offset"][shared[0]] = offset
        forge.write(path)
        assert_refused(path, ss.CorruptCheckpointError, "past the end")


def test_a_manifest_that_says_another_size_of_a_shared_file_is_refused(source: Path, path: Path) -> None:
    Forge(source).write(path)
    rewrite_manifest(path, lambda document: document["shared"][0].update(nbytes=1 << 40))
    assert_refused(path, ss.CorruptCheckpointError, "expected")


def test_a_file_of_the_checkpoint_does_not_serve_as_a_shared_one(source: Path, path: Path) -> None:
    """Names are what count: a link from base/ to a file outside is not followed."""
    Forge(source).write(path)
    (file,) = (path / "base").iterdir()
    file.unlink()
    file.symlink_to(source / "base" / file.name)
    assert_refused(path)


# References ---------------------------------------------------------------------------------------------------------


def test_the_reference_reader_reads_references(directory: Path, xor_source: Path) -> None:
    """Through a chain of two: each delta stores its packed chunk as the difference from the one before."""
    state = small.state(1) | {"small": small.state(1)["small"].repeat(100, 1)}
    assert Reader(xor_source).indexes[0].references == 1
    third = state | {"scalar": state["scalar"] + 7}
    ss.save(third, checkpoint_id=directory / "third")
    path = make_delta(xor_source, directory / "third", directory / "chain", xor=True)
    assert Reader(path).indexes[0].references == 2
    for one, expected in ((xor_source, state), (path, third)):
        contents = reference_reader.read(one)
        bits = small.bits(expected)
        assert {name: tensor.data for name, tensor in contents.tensors.items()} == {
            name: value[2] for name, value in bits.items() if type(value) is tuple and len(value) == 3
        }
    assert ss.verify(path, level="quick")


@pytest.mark.parametrize("references", [None, 0, 2, 3, 4, 5, -1, 1 << 31, 1 << 63, True, 1.0, "1", [1]])
def test_counts_of_references_that_do_not_fit_are_refused(xor_source: Path, path: Path, references: Any) -> None:
    forge = Forge(xor_source)
    assert forge.header["references"] == 1
    forge.header["references"] = references
    forge.write(path)
    assert_refused(path, ss.CorruptCheckpointError)
    with pytest.raises(reference_reader.FormatError):
        reference_reader.read(path)


def test_a_missing_count_of_references_is_refused(xor_source: Path, path: Path) -> None:
    forge = Forge(xor_source)
    del forge.header["references"]
    forge.write(path)
    assert_refused(path, ss.CorruptCheckpointError, "references are not as many")


def test_shards_do_not_lie_in_reference_chunks(xor_source: Path, path: Path) -> None:
    forge = Forge(xor_source)
    last = len(forge.table) - 1
    row = next(row for row in forge.header["tensors"] if row["name"] == "small")
    row["chunks"] = [last, 1]
    forge.write(path)
    assert_refused(path, ss.CorruptCheckpointError, "not in a table of")


def grown(source: Path, rows: int) -> Forge:
    """With so many xor records behind the others, each the reference of one before it."""
    forge = Forge(source)
    last = forge.table[-1:].copy()
    middle = forge.table[forge.table["codec"] >= 5][:1].repeat(rows)
    forge.table = np.concatenate([forge.table[:-1], middle, last])
    forge.header["references"] += rows
    forge.header["chunk_count"] += rows
    return forge


def test_chains_of_references_are_bounded(xor_source: Path, path: Path) -> None:
    forge = grown(xor_source, 62)
    forge.write(path)
    assert Reader(path).indexes[0].references == 63
    for rows in (63, 64, 1000, 100_000):
        grown(xor_source, rows).write(path)
        assert_refused(path, ss.CorruptCheckpointError, "too many references in a chain")


def test_circles_of_references_are_refused(xor_source: Path, path: Path) -> None:
    """All records of the table are reference chunks, and the first of them refers to itself."""
    forge = Forge(xor_source)
    number = int(np.flatnonzero(forge.table["codec"] >= 5)[0])
    forge.table = forge.table[number : number + 1]
    forge.header |= {"references": 1, "chunk_count": 1, "tensors": []}
    forge.write(path)
    assert_refused(path, ss.CorruptCheckpointError, "does not stand behind it")


def test_a_reference_of_another_size_is_refused(xor_source: Path, path: Path) -> None:
    forge = Forge(xor_source)
    for field in ("raw_bytes", "stored_bytes"):
        forge.table[field][-1] -= 1
    forge.write(path)
    assert_refused(path, ss.CorruptCheckpointError, "another raw size")
    with pytest.raises(CorruptCheckpointError) as caught:
        Reader(path)
    assert (caught.value.chunk, caught.value.rank) == (int(np.flatnonzero(forge.table["codec"] >= 5)[0]), 0)


def test_a_base_of_many_files_opens_fast(source: Path, path: Path) -> None:
    """Ten thousand shared files, of which a load needs one."""
    files = 10_000
    forge = Forge(source)
    entry = forge.manifest["shared"][0]
    more = [dict(entry, name=f"base/{number:032x}.rank-00000.data") for number in range(files)]
    forge.manifest["shared"] += more
    forge.header["files"] += [one["name"] for one in more]
    forge.write(path)
    (file,) = (path / "base").iterdir()
    for one in more:
        os.link(file, path / one["name"])
    assert set(try_everything(path, items=files).values()) == {None}
