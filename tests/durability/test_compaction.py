"""Compaction: a checkpoint gets files of its own, or stays as it was. test_compaction_faults.py has what can fail.

Invariants:
  1. What `compact` returns has the tensors, values, step and metadata that it had, verifies, and shares no file.
  2. No other checkpoint changes, nor what it shares.
  3. A byte that is not what was saved is named and not copied for good.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import snapstone as ss
from distributed import ranks
from durability import small
from durability.chain import (
    CHUNK_BYTES,
    assert_step,
    assert_unchanged,
    contents,
    flip_bit,
    make_chain,
    names_in,
    shared_files,
    state_at,
)
from durability.seam import calls_of
from snapstone import _native, index
from snapstone.compaction import _plan
from snapstone.index import CHUNK_DTYPE

PAGE_BYTES = 4096
XOR_CODEC = 5  # and above

pytestmark = pytest.mark.usefixtures("small_chunks")


# What comes out ------------------------------------------------------------------------------------------------------


def test_a_compacted_checkpoint_is_the_same_and_stands_alone(directory: Path) -> None:
    first, second, third = make_chain(directory)
    before, others = ss.Checkpoint.open(third), contents(first, second)
    assert len(shared_files(third)) == 2
    after = ss.compact(third)
    assert names_in(third) == ["MANIFEST.json", "MANIFEST.xxh128", "rank-00000.data", "rank-00000.index"]
    assert all(file.stat().st_nlink == 1 for file in third.iterdir())
    document = json.loads((third / "MANIFEST.json").read_bytes())
    assert {"base", "shared"} & document.keys() == set()
    assert after.save_id == document["save_id"] != before.save_id
    same = ("step", "metadata", "world_size", "nbytes", "format_version")
    assert [getattr(after, name) for name in same] == [getattr(before, name) for name in same]
    assert after.manifest.environment == before.manifest.environment
    assert after.stats["copied_bytes"] == (third / "rank-00000.data").stat().st_size
    assert_step(third, 3)
    assert contents(first, second) == others
    shutil.rmtree(first)
    shutil.rmtree(second)
    assert_step(third, 3)
    assert small.leftovers(directory) == []


def test_only_what_is_used_is_copied_each_chunk_once_in_the_order_of_the_table(directory: Path) -> None:
    _, _, third = make_chain(directory)
    old = ss.Checkpoint.open(third).reader.indexes[0]
    ss.compact(third)
    new = ss.Checkpoint.open(third).reader.indexes[0]
    before, after = (np.frombuffer(one.table, CHUNK_DTYPE) for one in (old, new))
    assert (new.tensors, new.objects, new.chunk_bytes) == (old.tensors, old.objects, old.chunk_bytes)
    for column in ("stored_bytes", "raw_bytes", "codec", "digest"):
        assert (before[column] == after[column]).all()
    sizes = index.padded(after["stored_bytes"])
    assert after["offset"].tolist() == [0, *np.cumsum(sizes).tolist()[:-1]]
    assert (third / "rank-00000.data").stat().st_size == sizes.sum()


def test_the_middle_of_a_chain_leaves_both_neighbours_alone(directory: Path) -> None:
    first, second, third = make_chain(directory)
    others = contents(first, third)
    ss.compact(second)
    assert contents(first, third) == others
    for path, step in ((first, 1), (second, 2), (third, 3)):
        assert_step(path, step)


def test_a_checkpoint_that_shares_nothing_is_left_alone(directory: Path) -> None:
    (path,) = make_chain(directory, 1)
    before = contents(path)
    counts = calls_of(lambda: ss.compact(path))
    assert ss.compact(path).save_id == ss.Checkpoint.open(path).save_id
    assert contents(path) == before
    assert counts.keys() & {"mkdir", "pwrite", "copy_file_range", "renameat2"} == set()


def test_compacting_twice_is_compacting_once(directory: Path) -> None:
    path = make_chain(directory)[-1]
    ss.compact(path)
    before = contents(path)
    ss.compact(path)
    assert contents(path) == before


@pytest.mark.parametrize("codec", ["zstd", "xor-zstd"])
def test_compressed_chunks_stay_as_they_are(directory: Path, codec: str) -> None:
    third = make_chain(directory, codec=codec)[-1]
    before = ss.Checkpoint.open(third).reader.indexes[0]
    ss.compact(third)
    after = ss.Checkpoint.open(third).reader.indexes[0]
    codecs = [np.frombuffer(one.table, CHUNK_DTYPE)["codec"].tolist() for one in (before, after)]
    assert codecs[0] == codecs[1]
    assert any(codecs[0])
    assert before.references == after.references == sum(number >= XOR_CODEC for number in codecs[0])
    assert (before.references > 0) == (codec == "xor-zstd")
    assert_step(third, 3)


def test_a_save_that_found_nothing_changed_gets_all_bytes(directory: Path) -> None:
    (first,) = make_chain(directory, 1)
    ss.save(state_at(1), checkpoint_id=directory / "same", base=first, on_unchanged="ignore")
    assert (directory / "same" / "rank-00000.data").stat().st_size == 0
    ss.compact(directory / "same")
    assert_step(directory / "same", 1)


def save_on_two_ranks(rank: int, run: str) -> None:
    for step in (1, 2):
        state = {f"large-{rank}": state_at(step)["large"] + rank, "both": torch.ones(20_000), "rank": rank}
        for path, base in ((f"full-{step}", None), (f"delta-{step}", "delta-1" if step == 2 else None)):
            ss.save(state, checkpoint_id=Path(run, path), step=step, base=base and Path(run, base))


def test_every_writer_gets_a_data_file(tmp_path: Path) -> None:
    environment = {"SNAPSTONE_CHUNK_BYTES": str(CHUNK_BYTES)}
    ranks.values(ranks.run_ranks(2, save_on_two_ranks, str(tmp_path), env=environment))
    path = tmp_path / "delta-2"
    assert len(shared_files(path)) == 2
    ss.compact(path)
    names = ["rank-00000.data", "rank-00000.index", "rank-00001.data", "rank-00001.index"]
    assert names_in(path) == ["MANIFEST.json", "MANIFEST.xxh128", *names]
    assert ss.verify(path)
    expected, found = ss.Checkpoint.open(tmp_path / "full-2"), ss.Checkpoint.open(path)
    assert (found.step, found.world_size) == (2, 2)
    for rank in range(2):
        assert found.objects(rank) == expected.objects(rank)
    assert small.bits(found.load_tensors()) == small.bits(expected.load_tensors())


def test_the_marker_for_trainers_is_carried_over(directory: Path) -> None:
    path = make_chain(directory)[-1]
    (path / ".metadata").write_bytes(b"marker")
    ss.compact(path)
    assert (path / ".metadata").read_bytes() == b"marker"


def test_a_link_to_a_checkpoint_compacts_the_checkpoint(directory: Path) -> None:
    path = make_chain(directory)[-1]
    (directory / "latest").symlink_to(path.name)
    assert ss.compact(directory / "latest").path == str(path.resolve())
    assert (directory / "latest").is_symlink()
    assert not (path / "base").exists()


def test_rows_that_are_equal_stay_one_chunk() -> None:
    """A reference record may be the same chunk as an ordinary one."""
    table = np.zeros(5, CHUNK_DTYPE)
    table["file"] = [1, 0, 1, 2, 1]
    table["offset"] = [8192, 0, 8192, 4096, 0]
    table["stored_bytes"] = table["raw_bytes"] = [5000, 100, 5000, 4096, 1]
    one = index.Index("0" * 32, 0, 1, ("a", "b", "c"), CHUNK_BYTES, (), {}, table.tobytes(), 1)
    plan = _plan(one)
    assert plan.ranges.tolist() == [[1, 8192, 8192], [0, 0, 4096], [2, 4096, 4096], [1, 0, 4096]]
    assert plan.nbytes == 5 * PAGE_BYTES
    copied = np.frombuffer(plan.table, CHUNK_DTYPE)
    assert copied["file"].tolist() == [0] * 5
    assert copied["offset"].tolist() == [0, 8192, 0, 12288, 16384]
    assert copied["stored_bytes"].tolist() == table["stored_bytes"].tolist()


def test_a_table_without_chunks_is_an_empty_file() -> None:
    plan = _plan(index.Index("0" * 32, 0, 1, ("a",), CHUNK_BYTES, (), {}, b""))
    assert (plan.ranges.shape, plan.table, plan.nbytes) == ((0, 3), b"", 0)


def test_progress_counts_each_byte_twice(directory: Path) -> None:
    path = make_chain(directory)[-1]
    seen: list[tuple[int, int]] = []
    copied = ss.compact(path, progress=lambda done, total: seen.append((done, total))).stats["copied_bytes"]
    assert seen == sorted(seen)
    assert (copied, 2 * copied) in seen
    assert seen[-1] == (2 * copied, 2 * copied)


# What is refused -----------------------------------------------------------------------------------------------------


def test_a_flipped_bit_in_a_shared_file_is_named_and_not_copied(directory: Path) -> None:
    first, _, third = make_chain(directory)
    used = next(file for file in shared_files(third) if file.samefile(first / "rank-00000.data"))
    table = np.frombuffer(ss.Checkpoint.open(third).reader.indexes[0].table, CHUNK_DTYPE)
    names = ss.Checkpoint.open(third).reader.indexes[0].files
    row = next(row for row in table if names[row["file"]].endswith(used.name))
    flip_bit(used, int(row["offset"]) + 100)
    before = contents(third)
    with pytest.raises(ss.CorruptCheckpointError, match="digest mismatch") as caught:
        ss.compact(third)
    assert (caught.value.path, caught.value.rank) == (str(used), 0)
    assert caught.value.tensor is not None
    assert_unchanged(third, before)


def test_a_flipped_bit_in_a_reference_is_named_and_not_what_refers_to_it(directory: Path) -> None:
    third = make_chain(directory, codec="xor-zstd")[-1]
    parsed = ss.Checkpoint.open(third).reader.indexes[0]
    reference = np.frombuffer(parsed.table, CHUNK_DTYPE)[-parsed.references :][-1]
    damaged = third / parsed.files[reference["file"]]
    flip_bit(damaged, int(reference["offset"]) + int(reference["stored_bytes"]) // 2)
    before = contents(third)
    with pytest.raises(ss.CorruptCheckpointError) as caught:
        ss.compact(third)
    assert caught.value.path == str(damaged)
    assert_unchanged(third, before)


def test_a_flipped_bit_in_an_own_file_is_named(directory: Path) -> None:
    third = make_chain(directory)[-1]
    flip_bit(third / "rank-00000.data", 17)
    before = contents(third)
    with pytest.raises(ss.CorruptCheckpointError) as caught:
        ss.compact(third)
    assert (caught.value.path, caught.value.tensor) == (str(third / "rank-00000.data"), "large")
    assert_unchanged(third, before)


def test_a_flipped_bit_that_nothing_uses_is_left_behind(directory: Path) -> None:
    """In the chunk of the first save that every later one has replaced."""
    first, second, _ = make_chain(directory)
    tables = [ss.Checkpoint.open(path).reader.indexes[0].table for path in (first, second)]
    rows, later = (np.frombuffer(table, CHUNK_DTYPE) for table in tables)
    replaced = next(row for row in rows if row["digest"].tobytes() not in {one.tobytes() for one in later["digest"]})
    flip_bit(first / "rank-00000.data", int(replaced["offset"]) + 100)
    assert not ss.verify(first)
    ss.compact(second)
    assert_step(second, 2)


def test_a_copy_that_went_wrong_is_not_blamed_on_the_source(directory: Path) -> None:
    path = make_chain(directory)[-1]
    before = contents(path)

    def flip(done: int, total: int) -> None:
        if done == total // 2:  # the last byte is copied, none is verified
            (staging,) = directory.glob(".staging-*")
            flip_bit(staging / "rank-00000.data", 100)

    with pytest.raises(ss.CorruptCheckpointError, match="digest mismatch") as caught:
        ss.compact(path, progress=flip)
    assert "/.staging-" in str(caught.value.path)
    assert_unchanged(path, before)


def test_an_index_that_lost_a_value_on_its_way_is_not_committed(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_chain(directory)[-1]
    before, encode = contents(path), index.encode

    def encode_less(*, objects: dict[str, Any], **rest: Any) -> bytes:
        return encode(objects={name: value for name, value in objects.items() if name != "step"}, **rest)

    monkeypatch.setattr(index, "encode", encode_less)
    with pytest.raises(ss.CheckpointError, match="would not hold the same tensors and values") as caught:
        ss.compact(path)
    assert caught.value.path == str(path)
    assert_unchanged(path, before)


def test_a_missing_shared_file_is_named(directory: Path) -> None:
    path = make_chain(directory)[-1]
    gone = shared_files(path)[0]
    gone.unlink()
    before = contents(path)
    with pytest.raises(ss.IncompleteCheckpointError) as caught:
        ss.compact(path)
    assert (caught.value.path, caught.value.rank) == (str(gone), 0)
    assert_unchanged(path, before)


def test_a_link_in_the_place_of_a_shared_file_is_refused(directory: Path) -> None:
    path = make_chain(directory)[-1]
    file = shared_files(path)[0]
    file.rename(directory / "elsewhere")
    file.symlink_to(directory / "elsewhere")
    with pytest.raises((ss.CheckpointError, FileExistsError)):
        ss.compact(path)
    assert file.is_symlink()
    assert small.leftovers(directory) == []


@pytest.mark.parametrize("kind", ["link", "directory", "fifo"])
def test_what_is_no_regular_file_in_the_place_of_an_own_file_is_named(directory: Path, kind: str) -> None:
    path = make_chain(directory)[-1]
    file = path / "rank-00000.data"
    file.rename(directory / "elsewhere")
    if kind == "link":
        file.symlink_to(directory / "elsewhere")
    elif kind == "directory":
        file.mkdir()
    else:
        os.mkfifo(file)
    with pytest.raises(ss.CorruptCheckpointError, match="data file cannot be opened") as caught:
        ss.compact(path)
    assert (caught.value.path, caught.value.rank) == (str(file), 0)
    assert (path / "base").exists()
    assert small.leftovers(directory) == []


def test_a_shared_file_that_ends_early_is_named(directory: Path) -> None:
    path = make_chain(directory)[-1]
    short = shared_files(path)[0]
    os.truncate(short, PAGE_BYTES)
    before = contents(path)
    with pytest.raises(ss.CorruptCheckpointError) as caught:
        ss.compact(path)
    assert caught.value.path == str(short)
    assert_unchanged(path, before)


def test_somebodys_own_file_in_the_directory_is_not_deleted(directory: Path) -> None:
    path = make_chain(directory)[-1]
    (path / "notes.txt").write_text("precious")
    before = contents(path)
    with pytest.raises(FileExistsError, match="other things"):
        ss.compact(path)
    assert_unchanged(path, before)


def test_a_newer_minor_format_would_lose_what_is_new(directory: Path) -> None:
    path = make_chain(directory)[-1]
    text = (path / "MANIFEST.json").read_bytes().replace(b'"1.0"', b'"1.7"')
    (path / "MANIFEST.json").write_bytes(text)
    (path / "MANIFEST.xxh128").write_text(f"{_native.digest_hex(text)}  MANIFEST.json\n")
    before = contents(path)
    with pytest.raises(ss.IncompatibleCheckpointError, match=r"format 1\.7"):
        ss.compact(path)
    assert_unchanged(path, before)


def test_nothing_there_and_nothing_committed_are_told_apart(directory: Path) -> None:
    with pytest.raises(ss.CheckpointNotFoundError):
        ss.compact(directory / "absent")
    (directory / "empty").mkdir()
    with pytest.raises(ss.IncompleteCheckpointError):
        ss.compact(directory / "empty")


def test_the_deadline_leaves_everything_as_it_was(directory: Path) -> None:
    path = make_chain(directory)[-1]
    before = contents(path)
    with pytest.raises(ss.CheckpointError, match="longer than the timeout"):
        ss.compact(path, timeout=1e-6)
    assert_unchanged(path, before)
    with pytest.raises(ValueError, match="timeout"):
        ss.compact(path, timeout=0)


@pytest.mark.parametrize("share", [0.1, 1.0])
def test_nothing_is_done_after_the_deadline(directory: Path, share: float) -> None:
    path = make_chain(directory)[-1]
    before = contents(path)
    end = time.monotonic() + 2
    lingered = []

    def linger(done: int, total: int) -> None:
        if done >= share * total:
            lingered.append(done)
            time.sleep(max(0.0, end - time.monotonic()))

    with pytest.raises(ss.CheckpointError, match="longer than the timeout"):
        ss.compact(path, timeout=2, progress=linger)
    assert_unchanged(path, before)
    assert len(lingered) == 1


@pytest.mark.parametrize("share", [0.1, 0.5, 1.0])
def test_ctrl_c_leaves_everything_as_it_was(directory: Path, share: float) -> None:
    path = make_chain(directory)[-1]
    before = contents(path)

    def interrupt(done: int, total: int) -> None:
        if done >= share * total:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        ss.compact(path, progress=interrupt)
    assert_unchanged(path, before)


# Others at the same checkpoint ---------------------------------------------------------------------------------------


def test_an_open_reader_gets_the_bytes_or_a_typed_error(directory: Path) -> None:
    path = make_chain(directory)[-1]
    opened = ss.Checkpoint.open(path)
    ss.compact(path)
    try:
        found = small.bits(opened.load_tensors())
    except ss.CheckpointError:
        return
    assert found == {name: bits for name, bits in small.bits(state_at(3)).items() if name in found}


def test_a_save_that_takes_the_place_meanwhile_is_not_undone(directory: Path) -> None:
    path = make_chain(directory)[-1]

    def replace(done: int, total: int) -> None:
        if done == total // 2:
            ss.save(small.state(9), checkpoint_id=path, overwrite=True)

    with pytest.raises(ss.CheckpointError, match="took its place"):
        ss.compact(path, progress=replace)
    small.assert_holds(path, 9)
    assert small.leftovers(directory) == []


def test_a_checkpoint_that_is_removed_meanwhile_stays_removed(directory: Path) -> None:
    path = make_chain(directory)[-1]
    with pytest.raises(ss.CheckpointNotFoundError):
        ss.compact(path, progress=lambda done, total: shutil.rmtree(path) if done == total else None)
    assert not path.exists()
    assert small.leftovers(directory) == []
