"""The manifest: what is written is read; all else is one of four typed errors, told apart by what a caller can do."""

from __future__ import annotations

import json
import os
import random
import subprocess
from pathlib import Path
from typing import Any

import pytest
import xxhash

from snapstone.errors import (
    CheckpointNotFoundError,
    CorruptCheckpointError,
    IncompatibleCheckpointError,
    IncompleteCheckpointError,
)
from snapstone.manifest import (
    DIGEST_NAME,
    MANIFEST_NAME,
    Base,
    FileEntry,
    Manifest,
    Writer,
    digest_line,
    is_checkpoint,
    is_file_of_checkpoint,
    is_shared_file,
    origin_of_shared,
    read,
    shared_name,
    writer_of,
)

HEX = "0123456789abcdef" * 2
SHARED = f"base/{HEX}.rank-00000.carried.data"


def manifest(world_size: int = 2, **change: Any) -> Manifest:
    writers = tuple(
        Writer(
            rank,
            FileEntry(f"rank-{rank:05d}.index", 640 + rank, HEX),
            (FileEntry(f"rank-{rank:05d}.data", 4096 * rank, HEX),),
        )
        for rank in range(world_size)
    )
    fields: dict[str, Any] = {
        "save_id": HEX,
        "step": 1000,
        "world_size": world_size,
        "nbytes": 12345,
        "writers": writers,
        "metadata": {"metrics": {"loss": 0.5}, "note": "ü"},
        "environment": {},
    }
    return Manifest(**{**fields, **change})


def put(path: Path, data: bytes) -> Path:
    path.mkdir(exist_ok=True)
    (path / MANIFEST_NAME).write_bytes(data)
    (path / DIGEST_NAME).write_bytes(digest_line(data))
    return path


def changed(**change: Any) -> bytes:
    return json.dumps(json.loads(manifest().to_bytes()) | change).encode()


@pytest.mark.parametrize(
    "one",
    [
        manifest(),
        manifest(1, step=None),
        manifest(64, step=-(1 << 63)),
        manifest(nbytes=0, metadata={}, environment={"torch": "2"}),
        manifest(step=(1 << 63) - 1, nbytes=(1 << 63) - 1),
        manifest(base=Base(HEX, None, "step-1", 1)),
        manifest(base=Base(HEX, -3, "step-1", 70), shared=(FileEntry(SHARED, 4096, HEX), FileEntry("base/x", 0, HEX))),
    ],
)
def test_what_is_written_is_read(tmp_path: Path, one: Manifest) -> None:
    assert read(str(put(tmp_path / "c", one.to_bytes()))) == one
    assert is_checkpoint(str(tmp_path / "c"))


def test_it_is_small_readable_json_with_a_digest_that_common_tools_check(tmp_path: Path) -> None:
    data = manifest().to_bytes()
    assert data.isascii()
    assert data.endswith(b"\n")
    document = json.loads(data)
    assert document["format"] == "snapstone"
    assert document["format_version"] == "1.0"
    assert document["step"] == 1000
    expected = f"{xxhash.xxh3_128_hexdigest(data)}  {MANIFEST_NAME}\n".encode()
    assert digest_line(data) == expected
    put(tmp_path / "c", data)
    try:
        checked = subprocess.run(["xxh128sum", "-c", DIGEST_NAME], cwd=tmp_path / "c", capture_output=True, check=False)
    except FileNotFoundError:
        return  # the tool is not on every machine; the digest above is the same
    assert checked.returncode == 0


def test_writers_come_back_from_json() -> None:
    for writer in manifest(3).writers:
        assert writer_of(json.loads(json.dumps(writer.to_json()))) == writer


def test_any_changed_byte_is_found_by_the_digest(tmp_path: Path) -> None:
    source = random.Random(3)
    path = put(tmp_path / "c", manifest().to_bytes())
    for name in (MANIFEST_NAME, DIGEST_NAME):
        good = (path / name).read_bytes()
        for _ in range(60):
            bad = bytearray(good)
            bad[source.randrange(len(bad))] ^= 1 << source.randrange(8)
            (path / name).write_bytes(bad)
            with pytest.raises(CorruptCheckpointError, match="do not belong together") as caught:
                read(str(path))
            assert caught.value.path == str(path / MANIFEST_NAME)
        for wrong in (b"", good[:-1], good + b"\n"):
            (path / name).write_bytes(wrong)
            with pytest.raises(CorruptCheckpointError):
                read(str(path))
        (path / name).write_bytes(good)
    read(str(path))


# ---- a correct digest over wrong content


WRONG: dict[str, dict[str, Any]] = {
    "another format": {"format": "zip"},
    "version is a number": {"format_version": 1.0},
    "version without minor": {"format_version": "1"},
    "version with other digits": {"format_version": "\u0661.0"},
    "version is huge": {"format_version": "1." + "9" * 100},
    "save id is short": {"save_id": "abc"},
    "save id is upper case": {"save_id": HEX.upper()},
    "save id is null": {"save_id": None},
    "step is a string": {"step": "1000"},
    "step is a float": {"step": 1.0},
    "step is a bool": {"step": True},
    "step is too large": {"step": 1 << 63},
    "negative bytes": {"nbytes": -1},
    "bytes are a float": {"nbytes": 1.5},
    "world size does not match": {"world_size": 3},
    "world size is huge": {"world_size": 1 << 40},
    "writers are an object": {"writers": {}},
    "writer is null": {"writers": [None, None]},
    "metadata is a list": {"metadata": []},
    "environment is null": {"environment": None},
}


def test_only_delta_saves_write_the_keys_of_delta_saves(tmp_path: Path) -> None:
    assert list(json.loads(manifest().to_bytes())) == [
        *("format", "format_version", "save_id", "step", "world_size", "nbytes", "writers", "metadata", "environment")
    ]
    delta = manifest(base=Base(HEX, 1, "step-1", 1), shared=(FileEntry(SHARED, 1, HEX),))
    assert list(json.loads(delta.to_bytes()))[6:9] == ["writers", "base", "shared"]
    assert read(str(put(tmp_path / "c", delta.to_bytes()))).shared_by_name == {SHARED: FileEntry(SHARED, 1, HEX)}


def test_a_delta_that_no_reader_takes_is_not_written() -> None:
    for base in (Base(HEX, 1, "", 1), Base(HEX, 1, "a/b", 1), Base("x", 1, "a", 1), Base(HEX, 1, "a", 0)):
        with pytest.raises(ValueError, match=r"not allowed|not a 128-bit|depth"):
            manifest(base=base).to_bytes()
    for name in ("x", "base/", "base/a/b", "base/..", "../x", "/base/x"):
        with pytest.raises(ValueError, match=r"not allowed|is not in 'base'"):
            manifest(shared=(FileEntry(name, 1, HEX),)).to_bytes()


@pytest.mark.parametrize("name", ["rank-00000.data", "rank-00012.carried.data", "rank-123456.data"])
def test_names_of_shared_files_say_where_they_were_written(name: str) -> None:
    shared = shared_name(HEX, name)
    assert shared == f"base/{HEX}.{name}"
    assert origin_of_shared(shared) == (HEX, name)
    assert is_shared_file(shared.removeprefix("base/"))
    assert is_file_of_checkpoint(name)


def test_other_names_are_not_those_of_shared_files() -> None:
    for name in ("", "rank-00000.data", f"{HEX}.rank-00000.data", f"base/{HEX}.rank-00000.index", f"base/{HEX}.x"):
        with pytest.raises(ValueError, match="not the name of a shared file"):
            origin_of_shared(name)
    for component in (
        "",
        "rank-00000.data",
        f"{HEX}.rank-00000.index",
        f"{HEX}.rank-0.data",
        f"x{HEX}.rank-00000.data",
    ):
        assert not is_shared_file(component)
    with pytest.raises(ValueError, match="not the name of a shared file"):
        shared_name("x", "rank-00000.data")
    for name in ("base", f"{HEX}.rank-00000.data", "rank-00000.carried.index", "rank-0.carried.data", "carried.data"):
        assert not is_file_of_checkpoint(name)


@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_field_is_corruption(tmp_path: Path, kind: str) -> None:
    with pytest.raises(CorruptCheckpointError):
        read(str(put(tmp_path / "c", changed(**WRONG[kind]))))


@pytest.mark.parametrize("key", sorted(json.loads(manifest().to_bytes())))
def test_a_missing_field_is_corruption(tmp_path: Path, key: str) -> None:
    document = json.loads(manifest().to_bytes())
    del document[key]
    with pytest.raises(CorruptCheckpointError):
        read(str(put(tmp_path / "c", json.dumps(document).encode())))


@pytest.mark.parametrize(
    "name",
    [
        "../escape",
        "/absolute",
        "a/b",
        "..",
        ".",
        "",
        ".hidden",
        "with space",
        "nul\0",
        "new\nline",
        "ü",
        "x" * 300,
        7,
        None,
    ],
)
def test_a_file_name_that_leaves_the_directory_is_refused(tmp_path: Path, name: Any) -> None:
    for place in ("index", "data"):
        document = json.loads(manifest().to_bytes())
        entry = document["writers"][1]["index"] if place == "index" else document["writers"][1]["data"][0]
        entry["name"] = name
        with pytest.raises(CorruptCheckpointError):
            read(str(put(tmp_path / "c", json.dumps(document).encode())))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"format_version": "one"}, "format_version is 'one'"),
        ({"format_version": "0.9"}, r"the first was 1\.0"),
        ({"writers": {}}, "is not a list"),
        ({"metadata": []}, "is not a dict"),
        ({"world_size": 3}, "writers are not ranks 0 to 2"),
    ],
)
def test_what_is_wrong_is_said(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    with pytest.raises(CorruptCheckpointError, match=said):
        read(str(put(tmp_path / "c", changed(**change))))


def test_two_files_of_one_name_are_refused(tmp_path: Path) -> None:
    document = json.loads(manifest().to_bytes())
    document["writers"][1]["data"][0]["name"] = "rank-00000.data"
    with pytest.raises(CorruptCheckpointError, match="same name"):
        read(str(put(tmp_path / "c", json.dumps(document).encode())))


@pytest.mark.parametrize(
    "data", [b"", b"null", b"[]", b"{", b"\xff", b"[" * 100_000, b'{"format":1,"format":2}', b"NaN"]
)
def test_content_that_is_no_manifest(tmp_path: Path, data: bytes) -> None:
    with pytest.raises(CorruptCheckpointError):
        read(str(put(tmp_path / "c", data)))


def test_a_newer_minor_version_is_read_and_its_unknown_keys_ignored(tmp_path: Path) -> None:
    newer = read(str(put(tmp_path / "c", changed(format_version="1.9", future={"a": [1]}))))
    assert newer.format_version == (1, 9)
    assert newer.writers == manifest().writers


def test_a_newer_major_version_is_refused_as_such(tmp_path: Path) -> None:
    path = put(tmp_path / "c", json.dumps({"format": "snapstone", "format_version": "2.0"}).encode())
    with pytest.raises(IncompatibleCheckpointError, match=r"format 2\.0 is newer.*update snapstone"):
        read(str(path))


# ---- nothing to read


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFoundError) as caught:
        read(str(tmp_path / "none"))
    assert caught.value.path == str(tmp_path / "none")
    with pytest.raises(FileNotFoundError):
        read(str(tmp_path / "none" / "deeper"))


@pytest.mark.parametrize("missing", [MANIFEST_NAME, DIGEST_NAME])
def test_a_directory_without_one_of_the_two_files(tmp_path: Path, missing: str) -> None:
    path = put(tmp_path / "c", manifest().to_bytes())
    (path / missing).unlink()
    with pytest.raises(IncompleteCheckpointError, match=missing):
        read(str(path))
    assert is_checkpoint(str(path)) == (missing == DIGEST_NAME)


def test_a_staging_directory_is_a_save_that_never_committed(tmp_path: Path) -> None:
    (tmp_path / f".staging-{HEX}").mkdir()
    with pytest.raises(IncompleteCheckpointError, match="never committed"):
        read(str(tmp_path / f".staging-{HEX}"))
    put(tmp_path / ".trash-1", manifest().to_bytes())
    assert not is_checkpoint(str(tmp_path / ".trash-1"))


def test_a_plain_file_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(IncompleteCheckpointError, match="not a checkpoint"):
        read(str(tmp_path / "file"))


def test_a_link_or_a_pipe_in_place_of_the_manifest_is_not_followed(tmp_path: Path) -> None:
    good = put(tmp_path / "good", manifest().to_bytes())
    path = put(tmp_path / "c", manifest().to_bytes())
    (path / MANIFEST_NAME).unlink()
    (path / MANIFEST_NAME).symlink_to(good / MANIFEST_NAME)
    with pytest.raises((IncompleteCheckpointError, CorruptCheckpointError)):
        read(str(path))
    (path / MANIFEST_NAME).unlink()
    os.mkfifo(path / MANIFEST_NAME)
    with pytest.raises((IncompleteCheckpointError, CorruptCheckpointError)):
        read(str(path))


def test_a_huge_manifest_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = put(tmp_path / "c", manifest().to_bytes())
    os.truncate(path / MANIFEST_NAME, 1 << 40)  # sparse
    with pytest.raises(CorruptCheckpointError):
        read(str(path))
