"""Manifests and indexes by a writer who means harm and computes every digest right.

Invariants, for every document here:
  1. Reading it (load, the lazy reader, verify) ends in success or in a CheckpointError, never in another error.
  2. It ends within 100 ms of CPU, with less than 64 MiB of memory, and touches no file outside the directory.
  3. What docs/format.md says readers must refuse is refused.
"""

from __future__ import annotations

import json
import os
import random
import struct
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from hypothesis import strategies

import snapstone as ss
from durability import hostile, small
from durability.forge import MANIFEST, Forge, digest, edit, places, write_manifest
from durability.hostile import assert_refused, try_everything

SEED = 90210
BAD_VALUES: list[Any] = [None, True, -1, 1, 1 << 63, 1.5, "x", "", [], {}, [[]], [-1], {"$tuple": 1}]
INT64_MAX = (1 << 63) - 1


@pytest.fixture(autouse=True)
def seeded(monkeypatch: pytest.MonkeyPatch) -> None:
    print(f"seed {SEED}")
    hostile.skip_without_memory_counter()
    monkeypatch.setenv("SNAPSTONE_CHUNK_BYTES", "65536")


@pytest.fixture
def source(directory: Path) -> Path:
    path = directory / "source"
    ss.save(small.state(1), checkpoint_id=path, step=1, metadata={"metrics": {"loss": 1.5}, "t": (1, 2)})
    try_everything(path)  # the first use of anything takes memory that is kept
    return path


@pytest.fixture
def path(directory: Path) -> Path:
    return directory / "hostile"


def test_the_forge_itself_makes_sound_checkpoints(source: Path, path: Path) -> None:
    Forge(source).write(path)
    assert set(try_everything(path).values()) == {None}
    small.assert_holds(path, 1)


@pytest.mark.parametrize(
    ("key", "value"), [("save_id", "f" * 32), ("rank", 1), ("world_size", 7), ("files", ["other.data"])]
)
def test_the_index_of_another_save_is_said_to_be_one(source: Path, path: Path, key: str, value: Any) -> None:
    forged = Forge(source)
    assert forged.header[key] != value
    forged.header[key] = value
    forged.write(path)
    with pytest.raises(ss.CorruptCheckpointError, match="index belongs to another save, rank or file"):
        ss.load(small.state(0), checkpoint_id=path)


def test_any_value_of_the_manifest_replaced_or_removed(source: Path, path: Path) -> None:
    forge = Forge(source)
    forge.write(path)
    sound = forge.manifest
    needed = ("format", "format_version", "save_id", "step", "world_size", "nbytes", "writers", "metadata")
    for at in places(sound):
        for value in BAD_VALUES:
            document = deepcopy(sound)
            edit(document, at, lambda inside, key, value=value: inside.__setitem__(key, value))
            write_manifest(path, json.dumps(document).encode())
            try_everything(path)
        document = deepcopy(sound)
        edit(document, at, lambda inside, key: inside.__delitem__(key))
        write_manifest(path, json.dumps(document).encode())
        if at[-1] in needed or at[0] == "writers":
            assert_refused(path)
        else:
            try_everything(path)


def test_any_value_of_an_index_replaced_or_removed(source: Path, path: Path) -> None:
    sound = Forge(source)
    for at in places(sound.header):
        for value in BAD_VALUES:
            forge = Forge(source)
            edit(forge.header, at, lambda inside, key, value=value: inside.__setitem__(key, value))
            forge.write(path)
            try_everything(path)
        if at[0] in ("format_version", "objects", "tensors") and len(at) > 1:
            continue  # a value or tensor less, or an optional key
        forge = Forge(source)
        edit(forge.header, at, lambda inside, key: inside.__delitem__(key))
        forge.write(path)
        if at[0] != "format_version":
            assert_refused(path)


BAD_NAMES = [
    "",
    ".",
    "..",
    "../secret",
    "/etc/passwd",
    "a/b",
    "a/../../b",
    "a\0b",
    ".hidden",
    "%2e%2e%2fsecret",
    "C:\\x",
    "rank-00000.data ",
    "rank 0",
    "n" * 129,
    "n" * 5000,
    "ü",
    "\ud800",
    "rank-00000.data\n",
]


@pytest.mark.parametrize("which", ["index", "data"])
@pytest.mark.parametrize("name", BAD_NAMES, ids=lambda name: ascii(name[:20]))
def test_names_that_lead_elsewhere_are_refused(source: Path, path: Path, name: str, which: str) -> None:
    forge = Forge(source)
    secret = path.parent / "secret"
    secret.write_bytes(forge.data)
    entry = forge.writer["index"] if which == "index" else forge.writer["data"][0]
    good = entry["name"]
    forge.write(path)
    entry["name"] = name
    if which == "data":
        forge.header["files"] = [name]
        text = json.dumps(forge.header).encode()
        index = struct.pack("<8sQ", b"SNAPSIDX", len(text)) + text
        index += bytes(-len(index) % 64) + forge.table.tobytes()
        (path / forge.writer["index"]["name"]).write_bytes(index)
        forge.writer["index"].update(nbytes=len(index), xxh128=digest(index))
    assert (path / good).exists()
    write_manifest(path, json.dumps(forge.manifest).encode())
    assert_refused(path, ss.CorruptCheckpointError)


def test_one_file_under_two_names_and_two_files_under_one_are_refused(source: Path, path: Path) -> None:
    forge = Forge(source)
    forge.writer["index"]["name"] = forge.writer["data"][0]["name"]
    forge.write(path)
    assert_refused(path, ss.CorruptCheckpointError, "same name")
    forge = Forge(source)
    forge.writer["data"].append(dict(forge.writer["data"][0]))
    forge.header["files"] *= 2
    forge.write(path)
    assert_refused(path, ss.CorruptCheckpointError, "same name")


VERSIONS = [
    "",
    "1",
    "1.",
    ".0",
    "1.0.0",
    "1.x",
    "-1.0",
    "0.9",
    "1.-1",
    "1e3.0",
    "٣.0",
    " 1.0",
    "1.0\n",
    "9" * 5000 + ".0",
]


@pytest.mark.parametrize("version", [*VERSIONS, 1, 1.0, None, [1, 0], {"major": 1}], ids=lambda v: ascii(v)[:20])
def test_versions_that_are_none_are_corrupt(source: Path, path: Path, version: Any) -> None:
    forge = Forge(source)
    forge.manifest["format_version"] = version
    forge.write(path)
    assert_refused(path, ss.CorruptCheckpointError)


def raw_documents(sound: bytes) -> dict[str, bytes]:
    deep = 100_000
    text = sound.decode()
    return {
        "empty": b"",
        "one byte": b"{",
        "zero": b"\0",
        "not utf-8": b"\xff" + sound,
        "utf-16": text.encode("utf-16"),
        "byte-order mark": b"\xef\xbb\xbf" + sound,
        "list": b"[]",
        "null": b"null",
        "number": b"1",
        "trailing": sound + b"{}",
        "same key twice": b'{"format": "snapstone",' + sound.strip()[1:],
        "nan": sound.replace(b'"step": 1', b'"step": NaN'),
        "infinity": sound.replace(b'"step": 1', b'"step": Infinity'),
        "minus infinity": sound.replace(b'"step": 1', b'"step": -Infinity'),
        "1e400": sound.replace(b'"step": 1', b'"step": 1e400'),
        "a thousand digits": sound.replace(b'"step": 1', b'"step": ' + b"9" * 1000),
        "a million digits": sound.replace(b'"step": 1', b'"step": ' + b"9" * 1_000_000),
        "deep list": b"[" * deep + b"]" * deep,
        "deep object": b'{"a":' * deep + b"1" + b"}" * deep,
        "deep inside": sound.replace(b'"step": 1', b'"step": ' + b"[" * deep + b"]" * deep),
        "unclosed": sound.replace(b'"step": 1', b'"step": ' + b"[" * deep),
        "white space": sound.replace(b'"step": 1', b'"step": "' + b" " * 4_000_000 + b'"'),
        "control character": sound.replace(b'"snapstone"', b'"snap\nstone"'),
    }


@pytest.mark.parametrize("name", list(raw_documents(b"{}")))
def test_manifests_that_are_not_json_as_defined(source: Path, path: Path, name: str) -> None:
    forge = Forge(source)
    forge.manifest_text = raw_documents(json.dumps(forge.manifest).encode())[name]
    forge.write(path)
    assert_refused(path, ss.CorruptCheckpointError)


@pytest.mark.parametrize("name", list(raw_documents(b"{}")))
def test_index_headers_that_are_not_json_as_defined(source: Path, path: Path, name: str) -> None:
    forge = Forge(source)
    sound = json.dumps({"step": 1, "format": "snapstone", **forge.header}).encode()
    forge.header_text = raw_documents(sound)[name]
    if name in ("1e400", "a thousand digits", "white space"):
        forge.header_text = forge.header_text.replace(b'"step"', b'"rank"').replace(b'"rank": 0', b'"x": 0')
    forge.write(path)
    assert_refused(path, ss.CorruptCheckpointError)


@pytest.mark.parametrize("depth", [150, 250, 800, 900, 950, 970, 980, 985, 990, 995, 1000, 1100])
@pytest.mark.parametrize("key", ["step", "environment", "metadata", "writers", "nbytes"])
def test_nesting_near_the_limit_of_the_stack(source: Path, path: Path, key: str, depth: int) -> None:
    forge = Forge(source)
    forge.write(path)
    nested = b'{"a":' * depth + b"1" + b"}" * depth
    forge.manifest[key] = "PUT"
    write_manifest(path, json.dumps(forge.manifest).encode().replace(b'"PUT"', nested))
    try_everything(path)
    forge = Forge(source)
    forge.header["objects"]["deep"] = {"path": ["deep"], "value": "PUT"}
    forge.header_text = json.dumps(forge.header).encode().replace(b'"PUT"', nested)
    forge.write(path)
    try_everything(path)


@pytest.mark.parametrize("length", [0, 1, 15, 16, 1 << 31, 1 << 32, 1 << 62, 1 << 63, (1 << 64) - 1, (1 << 64) - 16])
def test_header_lengths_that_do_not_fit(source: Path, path: Path, length: int) -> None:
    forge = Forge(source)
    forge.header_bytes = length
    forge.write(path)
    assert_refused(path, ss.CorruptCheckpointError)


def test_header_lengths_off_by_a_few(source: Path, path: Path) -> None:
    exact = len(json.dumps(Forge(source).header).encode())
    for off in (-2, -1, 1, 2, 64, 128):
        forge = Forge(source)
        forge.header_bytes = exact + off
        forge.write(path)
        assert_refused(path, ss.CorruptCheckpointError)


def test_index_files_that_are_too_short_or_not_one(source: Path, path: Path) -> None:
    forge = Forge(source)
    forge.write(path)
    whole = (path / "rank-00000.index").read_bytes()
    for index in (
        b"",
        whole[:8],
        whole[:15],
        whole[:16],
        whole[:-1],
        whole + b"\0",
        b"SNAPSIDY" + whole[8:],
        whole[::-1],
    ):
        forge.index = index
        forge.write(path)
        assert_refused(path, ss.CorruptCheckpointError)


def test_sizes_beyond_what_files_have(source: Path, path: Path) -> None:
    for nbytes in (0, 1, 4095, 1 << 40, INT64_MAX):
        for which in ("index", "data"):
            forge = Forge(source)
            forge.write(path)
            entry = forge.writer["index"] if which == "index" else forge.writer["data"][0]
            entry["nbytes"] = nbytes
            write_manifest(path, json.dumps(forge.manifest).encode())
            assert_refused(path)


def test_huge_sparse_files_are_refused_before_they_are_read(source: Path, tmp_path: Path) -> None:
    """A terabyte of zeros costs its writer nothing."""
    terabyte = 1 << 40
    for name in (MANIFEST, "MANIFEST.xxh128", "rank-00000.index", "rank-00000.data"):
        forge = Forge(source)
        path = tmp_path / "sparse"
        forge.write(path)
        try:
            os.truncate(path / name, terabyte)
        except OSError as error:
            pytest.skip(f"no sparse file of a terabyte here: {error}")
        if name.startswith("rank"):
            entry = forge.writer["index"] if name.endswith("index") else forge.writer["data"][0]
            entry["nbytes"] = terabyte
            write_manifest(path, json.dumps(forge.manifest).encode())
        outcomes = try_everything(path)
        assert outcomes["verify"] is not None
        if name != "rank-00000.data":  # of that, a load reads the chunks and no more
            assert isinstance(outcomes["load"], ss.CorruptCheckpointError)
        os.truncate(path / name, 0)


def test_many_tensors_without_bytes_take_memory_in_proportion(source: Path, path: Path) -> None:
    forge = Forge(source)
    row = {"name": "", "dtype": "uint8", "shape": [0], "chunks": [0, 0]}
    forge.header["tensors"] += [{**row, "name": f"t{i}"} for i in range(5_000)]
    forge.write(path)
    assert try_everything(path, items=5_000)["load"] is not None  # unexpected keys, all named in one error


@pytest.mark.parametrize("world_size", [0, -1, 2, 1 << 31, 1 << 62])
def test_world_sizes_that_do_not_match_the_writers(source: Path, path: Path, world_size: int) -> None:
    forge = Forge(source)
    forge.manifest["world_size"] = world_size
    forge.write(path)
    assert_refused(path, ss.CorruptCheckpointError)


JSON = strategies.recursive(
    strategies.none()
    | strategies.booleans()
    | strategies.integers()
    | strategies.floats()
    | strategies.text(max_size=8),
    lambda inner: (
        strategies.lists(inner, max_size=4)
        | strategies.dictionaries(
            strategies.text(max_size=4) | strategies.sampled_from(["$tuple", "$dict"]), inner, max_size=3
        )
    ),
    max_leaves=8,
)


@pytest.mark.parametrize("document", ["manifest", "header", "table"])
def test_random_mutations(source: Path, path: Path, document: str) -> None:
    """One to three values anywhere replaced by any JSON, removed, or given twice over; of the table, any bytes."""

    @hypothesis.settings(
        max_examples=400,
        deadline=None,
        database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.seed(SEED)
    @hypothesis.given(strategies.data())
    def mutate(data: strategies.DataObject) -> None:
        forge = Forge(source)
        if document == "table":
            table = bytearray(forge.table.tobytes())
            for _ in range(data.draw(strategies.integers(1, 3))):
                at = data.draw(strategies.integers(0, len(table) - 9))
                table[at : at + 8] = data.draw(strategies.binary(min_size=8, max_size=8))
            forge.table = forge.table.__class__(len(forge.table), forge.table.dtype, bytes(table))
        else:
            for _ in range(data.draw(strategies.integers(1, 3))):
                mutate_one(data, getattr(forge, document))
        forge.write(path)
        try_everything(path)

    mutate()


def mutate_one(data: strategies.DataObject, document: Any) -> None:
    all_places = list(places(document))
    if not all_places:
        return
    at = data.draw(strategies.sampled_from(all_places))
    change: Callable[[Any, Any], None]
    match data.draw(strategies.sampled_from(["replace", "remove", "copy", "grow"])):
        case "remove":
            change = remove
        case "copy":
            other = deepcopy(find(document, data.draw(strategies.sampled_from(all_places))))
            change = lambda inside, key: inside.__setitem__(key, other)  # noqa: E731
        case "grow":
            factor = data.draw(strategies.sampled_from([-1, 2, 4096, 1 << 32, 1 << 61]))
            change = lambda inside, key: grow(inside, key, factor)  # noqa: E731
        case _:
            value = data.draw(JSON)
            change = lambda inside, key: inside.__setitem__(key, value)  # noqa: E731
    edit(document, at, change)


def remove(inside: Any, key: Any) -> None:
    del inside[key]


def grow(inside: Any, key: Any, factor: int) -> None:
    if type(inside[key]) is int:
        inside[key] *= factor


def find(document: Any, at: tuple[Any, ...]) -> Any:
    for key in at:
        document = document[key]
    return document


def test_random_bytes_in_place_of_each_file(source: Path, path: Path) -> None:
    chosen = random.Random(SEED)
    for _ in range(60):
        forge = Forge(source)
        junk = chosen.randbytes(chosen.choice([0, 1, 16, 100, 5000]))
        which = chosen.choice(["index", "manifest_text", "header_text"])
        setattr(forge, which, b"SNAPSIDX" + junk if which == "index" and chosen.random() < 0.5 else junk)
        forge.write(path)
        assert_refused(path)
