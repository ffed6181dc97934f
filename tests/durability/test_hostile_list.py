"""What a checkpoint made to do harm can be, item by item, and the test that shows how it ends.

`ITEMS` is the whole list: of each file its tests, and what each stands for. The tests that stand here are those that no
other file of this folder has. Every test of the list asks for a typed error in less than 100 ms of CPU and 64 MiB of
memory (see `hostile.limited`).
"""

from __future__ import annotations

import json
import os
import re
import struct
from pathlib import Path
from typing import Any

import pytest
import torch

import snapstone as ss
from durability import hostile, small
from durability.forge import DIGEST, Forge, write_manifest
from durability.hostile import assert_refused, try_everything
from snapstone.run_directory import find_checkpoints

DOCUMENTS = "durability/test_hostile_documents.py"
FILES = "durability/test_hostile_files.py"
TENSORS = "durability/test_hostile_tensors.py"
CHUNKS = "durability/test_hostile_chunks.py"
DELTAS = "durability/test_hostile_deltas.py"
BASES = "durability/test_delta_forged_bases.py"
HERE = "durability/test_hostile_list.py"
FUZZED = "fuzz/test_targets.py"

ITEMS = {
    DOCUMENTS: {
        "test_manifests_that_are_not_json_as_defined": (
            "manifest: empty, one byte, NUL, not UTF-8, byte-order mark; manifest: nested 100,000 deep"
        ),
        "test_huge_sparse_files_are_refused_before_they_are_read": ("manifest: larger than the limit"),
        "test_nesting_near_the_limit_of_the_stack": ("manifest: nested as deep as the stack"),
        "test_versions_that_are_none_are_corrupt": ("version: 0, a large one, none"),
        "test_index_files_that_are_too_short_or_not_one": ("wrong magic"),
        "test_sizes_beyond_what_files_have": ("right digest and wrong length"),
        "test_index_headers_that_are_not_json_as_defined": ("garbage behind"),
        "test_world_sizes_that_do_not_match_the_writers": ("world size: 0, negative, 2^31"),
        "test_many_tensors_without_bytes_take_memory_in_proportion": ("many tensors"),
        "test_names_that_lead_elsewhere_are_refused": (
            "file names: empty, dots, slashes, NUL, long, escaped, with spaces"
        ),
        "test_header_lengths_that_do_not_fit": ("index: empty, shorter than its head, header length 2^63"),
    },
    HERE: {
        "test_white_space_costs_what_reading_it_costs": ("manifest: white space without end"),
        "test_a_key_stands_once_in_every_object": (
            "duplicate keys, at the top and in the object of a tensor, file or writer"
        ),
        "test_digest_files_that_are_none_are_refused": ("digest that is none"),
        "test_integers_are_integers_of_64_bits": (
            "numbers: NaN, infinity, 1e400, fractions, out of 64 bits, a million digits"
        ),
        "test_ranks_stand_once_each_and_in_order": ("ranks: one missing, one twice, out of order"),
        "test_dtypes_have_one_name_and_whole_bytes": ("dtypes: unknown, upper case, another name, parts of a byte"),
        "test_names_that_look_alike_are_two": ("tensor names: other case or normal form"),
        "test_file_names_are_taken_letter_by_letter": ("file names: a dot or a letter of another case at the end"),
        "test_links_planted_in_a_run_are_no_checkpoints": ("a run's links that lead nowhere, outside or in a circle"),
        "test_a_file_that_is_cut_after_it_was_opened_is_an_error": ("cut while it is read"),
    },
    FILES: {
        "test_a_newer_major_is_incompatible_whatever_else_changed": ("version: newer"),
        "test_any_flipped_byte_of_manifest_digest_or_index_is_found": ("wrong digest of itself"),
        "test_what_stands_in_place_of_a_file_is_refused": (
            "links, pipes, devices, directories and sockets in place of files"
        ),
        "test_a_staging_directory_is_refused_even_when_it_looks_whole": ("never committed"),
        "test_files_swapped_between_steps_are_refused": ("chunk: of another step"),
        "test_files_swapped_between_ranks_are_refused_and_the_rank_is_named": ("chunk: of another rank"),
        "test_a_chunk_of_the_same_checkpoint_in_the_wrong_place_is_refused": ("chunk: right digest in the wrong place"),
        "test_any_flipped_byte_of_data_is_found_and_named": ("padding that is not zero"),
        "test_truncated_and_extended_files_are_refused": ("cut by a byte, at every boundary, longer"),
    },
    TENSORS: {
        "test_shards_that_overlap_leave_a_hole_or_disagree": ("shards: overlapping, with holes, outside"),
        "test_tensors_that_cannot_be": ("shapes: overflow, negative, zero beside huge"),
        "test_names_that_confuse_are_only_names": ("tensor names: empty, long, NUL, newline, right-to-left, __proto__"),
    },
    DELTAS: {
        "test_any_value_of_base_and_shared_replaced_or_removed": ("delta: base and depth of any value"),
        "test_names_of_shared_files_do_not_leave_base": ("delta: files outside base"),
        "test_circles_of_references_are_refused": ("delta: chains of references, long ones and circles"),
        "test_chains_of_references_are_bounded": ("delta: too many references in a chain"),
    },
    BASES: {
        "test_a_base_that_says_other_things_under_its_old_save_id_is_read_again": (
            "delta: base of another run, or changed"
        ),
        "test_a_base_with_more_deltas_behind_it_than_a_number_holds": ("delta: a depth beyond all numbers"),
    },
    CHUNKS: {
        "test_records_outside_the_limits_are_refused": ("chunk: sizes of 0, huge, or that do not match"),
        "test_records_that_point_at_other_bytes_are_refused": ("chunk: swapped, twice, of another place"),
        "test_frames_that_no_writer_writes": ("frames: bombs, windows, dictionaries, cut, two"),
    },
    FUZZED: {
        "test_metadata_of_other_writers_takes_memory_in_proportion_and_only_corrupt_errors_come_out": (
            "metadata of torch's own checkpoints"
        ),
    },
}


def test_every_item_of_the_list_has_its_test() -> None:
    tests = Path(__file__).resolve().parents[1]
    for file, items in ITEMS.items():
        text = (tests / file).read_text()
        for test, item in items.items():
            assert re.search(rf"^def {test}\(", text, re.MULTILINE), item


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
