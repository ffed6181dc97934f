"""Checkpoints that use data files of earlier saves: read like others, self-contained, and damage in them is named.

Invariants:
  1. A delta checkpoint loads bit for bit what was saved: by `load`, the lazy reader, DCP, on several ranks, and by the
     reference reader; through chains of deltas, carried files and references too.
  2. It needs nothing outside its directory: its base may be removed, and a recursive copy is a checkpoint.
  3. A shared file that is missing, short, flipped, replaced or a link is refused or found by `verify`, by its name.
  4. A load opens the files that its chunks are in, once each, and no other.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp

import snapstone as ss
from distributed.ranks import run_ranks, values
from durability import small
from durability.delta import make_delta, rewrite_manifest
from format import reference_reader
from snapstone import _native, manifest, tensors
from snapstone.dcp import StorageReader
from snapstone.index import CHUNK_DTYPE
from snapstone.opening import decode_indexes, encode_indexes
from snapstone.reader import Reader

CHUNK_BYTES = 64 << 10
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SNAPSTONE_CHUNK_BYTES", str(CHUNK_BYTES))


def state(step: int) -> dict[str, Any]:
    """`frozen` never changes, one of the three chunks of `large` and the packed chunk do with every step."""
    generator = torch.Generator().manual_seed(0)
    large = torch.randn(40_000, generator=generator)
    large[step % 3 * 16_384 :][:1000] += step
    return {
        "frozen": torch.randn(300, 200, generator=generator),
        "large": large,
        "half": torch.randn(50_000, generator=generator).to(torch.bfloat16),
        "small": torch.randn(5, 3, generator=generator) + step,
        "scalar": torch.tensor(float(step)),
        "step": step,
    }


def make_chain(directory: Path, length: int, *, codec: str | None = None, **how: Any) -> list[Path]:
    """A full save of step 0 and deltas of the steps after it, each compared with the one before."""
    paths = [directory / "step-0"]
    ss.save(state(0), checkpoint_id=paths[0], step=0, codec=codec)
    for step in range(1, length):
        full = directory / f"full-{step}"
        ss.save(state(step), checkpoint_id=full, step=step, codec=codec)
        paths.append(make_delta(paths[-1], full, directory / f"step-{step}", **how))
    return paths


def load(path: Path, **options: Any) -> small.Bits:
    target = {name: torch.zeros_like(value) if name != "step" else None for name, value in state(0).items()}
    ss.load(target, checkpoint_id=path, **options)
    return small.bits(target)


def assert_holds(path: Path, step: int) -> None:
    expected = small.bits(state(step))
    assert load(path) == expected
    with ss.Checkpoint.open(path) as checkpoint:
        assert small.bits(checkpoint.load_tensors() | {"step": step}) == expected
        assert checkpoint.get_slice("frozen")[7:9, 3].tolist() == state(step)["frozen"][7:9, 3].tolist()
    report = ss.verify(path)
    assert report, report.problems
    contents = reference_reader.read(path)
    assert {name: tensor.data for name, tensor in contents.tensors.items()} == {
        name: value[2] for name, value in expected.items() if name != "step"
    }


@pytest.fixture
def delta(directory: Path) -> Path:
    return make_chain(directory, 2)[1]


def shared_files(path: Path) -> list[Path]:
    return sorted((path / "base").iterdir())


def record_of(path: Path, name: str) -> Any:
    reader = Reader(path)
    place = reader.shards.first(name).stored.place
    return np.frombuffer(reader.indexes[0].table, CHUNK_DTYPE)[place.first_chunk]


@pytest.mark.parametrize("codec", [None, "zstd"])
@pytest.mark.parametrize("carry", [False, True], ids=["linked", "carried"])
@pytest.mark.parametrize("xor", [False, True], ids=["plain", "xor"])
def test_deltas_of_deltas_load_what_was_saved(directory: Path, codec: str | None, carry: bool, xor: bool) -> None:
    paths = make_chain(directory, 4, codec=codec, carry=carry, xor=xor)
    for step, path in enumerate(paths):
        assert_holds(path, step)
    assert bool(Reader(paths[-1]).indexes[0].references) == xor
    last = manifest.read(str(paths[-1]))
    assert last.base is not None
    assert (last.base.depth, last.base.step, last.base.name) == (3, 2, "step-2")
    assert bool(last.shared) != carry
    assert (paths[-1] / "rank-00000.carried.data").exists() == carry
    for entry in last.shared:
        save_id, name = manifest.origin_of_shared(entry.name)
        assert manifest.shared_name(save_id, name) == entry.name


def test_every_checkpoint_stands_alone(directory: Path) -> None:
    *others, path = make_chain(directory, 3)
    for other in (*others, directory / "full-1", directory / "full-2"):
        shutil.rmtree(other)
    copy = Path(shutil.copytree(path, directory / "copy"))
    assert all(file.stat().st_nlink == 1 for file in shared_files(copy))
    assert_holds(path, 2)
    shutil.rmtree(path)
    assert_holds(copy, 2)


def test_own_and_shared_bytes_are_counted_apart(directory: Path) -> None:
    full, delta = make_chain(directory, 2)
    with ss.Checkpoint.open(full) as checkpoint:
        assert checkpoint.shared_nbytes == 0
        everything = checkpoint.own_nbytes
    with ss.Checkpoint.open(delta) as checkpoint:
        assert checkpoint.own_nbytes == 4096 + CHUNK_BYTES  # the packed chunk and the second one of `large`
        assert checkpoint.own_nbytes + checkpoint.shared_nbytes == everything
    assert ss.verify(delta).checked_bytes >= everything


@pytest.mark.parametrize("rung", small.RUNGS)
def test_every_way_of_reading_reads_shared_files(use_rung: Callable[[str], Path], rung: str) -> None:
    path = make_chain(use_rung(rung), 2)[1]
    assert load(path) == small.bits(state(1))
    assert ss.verify(path)


def test_dcp_loads_a_delta(delta: Path) -> None:
    target = {name: torch.zeros_like(value) if name != "step" else 0 for name, value in state(0).items()}
    dcp.load(target, storage_reader=StorageReader(delta), no_dist=True)
    assert small.bits(target) == small.bits(state(1))
    stored = StorageReader(delta).read_metadata().storage_data
    files = {index.fqn: info.relative_path for index, info in stored.items()}
    assert files["frozen"].startswith("base/")
    assert files["small"] == "rank-00000.data"


def _save_part(rank: int, path: str, step: int) -> None:
    ss.save({f"rank-{rank}": state(step), "both": torch.arange(30_000) + 7}, checkpoint_id=path, step=step)


def _load_part(rank: int, path: str, strategy: str) -> bool:
    target: dict[str, Any] = {f"rank-{one}": state(9) for one in range(2)} | {"both": torch.zeros(30_000).long()}
    ss.load(target, checkpoint_id=path, strategy=strategy)
    assert small.bits(target["rank-0"]) == small.bits(target["rank-1"]) == small.bits(state(1))
    assert torch.equal(target["both"], torch.arange(30_000) + 7)
    dcp.load(target, storage_reader=StorageReader(path, strategy=strategy))
    return True


@pytest.mark.parametrize("strategy", ["direct", "broadcast", "scatter"])
def test_several_ranks_write_and_others_read(directory: Path, strategy: str) -> None:
    env = {"SNAPSTONE_CHUNK_BYTES": str(CHUNK_BYTES)}
    for step in range(2):
        values(run_ranks(2, _save_part, str(directory / f"full-{step}"), step, env=env))
    path = make_delta(directory / "full-0", directory / "full-1", directory / "delta")
    document = manifest.read(str(path))
    assert len(document.shared) == 2
    assert values(run_ranks(3, _load_part, str(path), strategy)) == [True] * 3
    assert ss.verify(path)
    reference_reader.read(path)


def test_indexes_with_references_and_shared_files_travel_between_ranks(delta: Path) -> None:
    indexes = Reader(delta).indexes
    copies, _ = decode_indexes(encode_indexes(indexes, set()), {})
    assert [(one.files, one.references, one.table) for one in copies] == [
        (one.files, one.references, one.table) for one in indexes
    ]


# Opening ------------------------------------------------------------------------------------------------------------


def opens_of(path: Path, names: list[str]) -> int:
    """System calls of a load that open something, without those that open the checkpoint."""
    reader = Reader(path)
    targets = [shard for name in names for shard in tensors.describe(name, torch.zeros_like(state(0)[name]))]
    _ = reader.rung
    _native.fault_arm("open:1000000:errno=EIO")  # counts from here on
    reader.fill(targets)
    seen = int(_native.fault_seen("open"))
    _native.fault_disarm()
    return seen


def test_a_load_opens_only_the_files_that_its_chunks_are_in(directory: Path) -> None:
    path = make_chain(directory, 6)[-1]
    assert len(shared_files(path)) == 2
    directories, in_base = 1, 1
    assert opens_of(path, ["frozen"]) == directories + in_base + 1
    assert opens_of(path, ["small"]) == directories + 1
    assert opens_of(path, ["frozen", "half", "small"]) == directories + in_base + 2


# Damage -------------------------------------------------------------------------------------------------------------


def replaced(path: Path, data: bytes) -> None:
    """In this checkpoint only: the links of others keep what they had."""
    path.unlink()
    path.write_bytes(data)


def test_a_missing_shared_file_is_named(delta: Path) -> None:
    (file,) = shared_files(delta)
    file.unlink()
    with pytest.raises(ss.IncompleteCheckpointError, match="data file is missing") as caught:
        load(delta)
    assert (caught.value.path, caught.value.rank) == (str(file), 0)
    report = ss.verify(delta, level="quick")
    assert report.problems == (f"{file}: data file is missing (rank 0)",)


def test_a_missing_base_directory_is_named(delta: Path) -> None:
    shutil.rmtree(delta / "base")
    with pytest.raises(ss.IncompleteCheckpointError, match="data file is missing") as caught:
        load(delta)
    assert (caught.value.path, caught.value.rank) == (str(delta / "base"), 0)
    assert "data file is missing" in ss.verify(delta).problems[0]


def test_a_shared_file_of_another_size_is_named(delta: Path) -> None:
    (file,) = shared_files(delta)
    size = file.stat().st_size
    replaced(file, file.read_bytes()[:-4096])
    with pytest.raises(ss.CorruptCheckpointError, match="wrong size") as caught:
        load(delta)
    assert (caught.value.path, caught.value.rank) == (str(file), 0)
    assert f"expected {size} bytes (rank 0)" in ss.verify(delta, level="quick").problems[0]


def test_a_flipped_byte_of_a_shared_file_is_found_and_named(delta: Path) -> None:
    (file,) = shared_files(delta)
    data = bytearray(file.read_bytes())
    data[CHUNK_BYTES + 100] ^= 1
    replaced(file, bytes(data))
    with pytest.raises(ss.CorruptCheckpointError, match="digest mismatch") as caught:
        load(delta)
    error = caught.value
    assert (error.path, error.tensor, error.chunk, error.rank) == (str(file), "frozen", 1, 0)
    (problem,) = ss.verify(delta).problems
    assert "tensor='frozen', chunk=1, rank=0" in problem
    assert str(file) in problem


def test_bytes_of_a_shared_file_that_this_checkpoint_does_not_use_may_be_anything(directory: Path) -> None:
    full, delta = make_chain(directory, 2)
    (file,) = shared_files(delta)
    data = bytearray(file.read_bytes())
    data[int(record_of(full, "scalar")["offset"])] ^= 1
    replaced(file, bytes(data))
    assert ss.verify(delta)
    assert load(delta) == small.bits(state(1))


def test_the_rank_that_used_a_damaged_chunk_is_named_where_ranks_share_a_file(directory: Path) -> None:
    """Chunk 0 of both ranks is in one file; that of rank 1 is damaged, in a frame, which no digest tells apart."""
    env = {"SNAPSTONE_CHUNK_BYTES": str(CHUNK_BYTES), "SNAPSTONE_CODEC": "zstd"}
    parts = {f"rank-{rank}": torch.full((20_000,), float(rank)) for rank in range(2)}
    ss.save(parts, checkpoint_id=directory / "one", codec="zstd")
    values(run_ranks(2, _save_own, str(directory / "two"), env=env))
    path = make_delta(directory / "one", directory / "two", directory / "delta")
    (file,) = shared_files(path)
    offset = int(record_of(directory / "one", "rank-1")["offset"])
    data = bytearray(file.read_bytes())
    data[offset : offset + 4] = b"\0\0\0\0"
    replaced(file, bytes(data))
    with pytest.raises(ss.CorruptCheckpointError, match="not a zstd frame") as caught:
        ss.load({name: torch.zeros_like(value) for name, value in parts.items()}, checkpoint_id=path)
    error = caught.value
    assert (error.path, error.tensor, error.chunk, error.rank) == (str(file), "rank-1", 0, 1)
    (problem,) = ss.verify(path).problems
    assert "tensor='rank-1', chunk=0, rank=1" in problem


def _save_own(rank: int, path: str) -> None:
    ss.save({f"rank-{rank}": torch.full((20_000,), float(rank))}, checkpoint_id=path, codec="zstd")


def test_a_damaged_reference_is_found_and_named(directory: Path) -> None:
    """No shard is in it, but a chunk of `large` is its difference from it."""
    path = make_chain(directory, 2, xor=True)[1]
    (index,) = Reader(path).indexes
    reference = np.frombuffer(index.table, CHUNK_DTYPE)[-1]
    (file,) = shared_files(path)
    data = bytearray(file.read_bytes())
    data[int(reference["offset"]) + 9] ^= 1
    replaced(file, bytes(data))
    with pytest.raises(ss.CorruptCheckpointError, match="digest mismatch") as caught:
        load(path)
    assert (caught.value.tensor, caught.value.rank) == ("large", 0)
    problems = ss.verify(path).problems
    assert any(str(file) in problem for problem in problems), problems
    assert any("tensor='large'" in problem for problem in problems), problems


@pytest.mark.parametrize("kind", ["file", "directory", "dangling", "fifo"])
def test_what_stands_in_the_place_of_a_shared_file_is_not_followed(delta: Path, directory: Path, kind: str) -> None:
    (file,) = shared_files(delta)
    elsewhere = directory / "elsewhere"
    file.rename(elsewhere)
    if kind == "file":
        file.symlink_to(elsewhere)
    elif kind == "directory":
        file.mkdir()
    elif kind == "dangling":
        file.symlink_to(directory / "absent")
    else:
        os.mkfifo(file)
    with pytest.raises(ss.CorruptCheckpointError) as caught:
        load(delta)
    assert (caught.value.path, caught.value.rank) == (str(file), 0)
    assert "not a regular file" in ss.verify(delta).problems[0]


@pytest.mark.parametrize("kind", ["link", "file", "fifo"])
def test_a_base_that_is_not_a_directory_is_refused(delta: Path, directory: Path, kind: str) -> None:
    base = delta / "base"
    base.rename(directory / "elsewhere")
    if kind == "link":
        base.symlink_to(directory / "elsewhere")
    elif kind == "file":
        base.write_bytes(b"")
    else:
        os.mkfifo(base)
    with pytest.raises(ss.CorruptCheckpointError) as caught:
        load(delta)
    assert (caught.value.path, caught.value.rank) == (str(base), 0)
    assert f"{base}: not a directory" in ss.verify(delta).problems


def test_verify_names_what_does_not_belong_there(directory: Path) -> None:
    full, delta = make_chain(directory, 2)
    (delta / "base" / "stray").write_bytes(b"")
    assert ss.verify(delta).problems == (f"{delta / 'base' / 'stray'}: not part of the checkpoint",)
    (full / "base").mkdir()
    assert ss.verify(full).problems == (f"{full / 'base'}: not part of the checkpoint",)


def test_verify_finds_own_files_that_chunks_do_not_cover(directory: Path) -> None:
    """Equal rows are one chunk; a page that no row names is found, of own files only."""
    path = make_chain(directory, 2, carry=True)[1]
    assert ss.verify(path)
    own = path / "rank-00000.data"
    own.write_bytes(own.read_bytes() + bytes(4096))

    def grow(document: dict[str, Any]) -> None:
        document["writers"][0]["data"][0]["nbytes"] += 4096

    rewrite_manifest(path, grow)
    assert ss.verify(path).problems == (f"{own}: chunks do not cover the file exactly (rank 0)",)


def test_equal_rows_of_an_own_file_are_one_chunk(directory: Path) -> None:
    twins = {name: torch.arange(30_000.0) for name in ("a", "b")}
    for name in ("before", "after"):
        ss.save(twins, checkpoint_id=directory / name)
    path = make_delta(directory / "before", directory / "after", directory / "delta", carry=True)
    table = np.frombuffer(Reader(path).indexes[0].table, CHUNK_DTYPE)
    assert (len(table), len(np.unique(table))) == (4, 2)
    assert ss.verify(path)
    reference_reader.read(path)
    assert ss.Checkpoint.open(path).load_tensors()["b"].equal(twins["b"])


# Around it ----------------------------------------------------------------------------------------------------------


def test_a_delta_can_be_overwritten(delta: Path, directory: Path) -> None:
    ss.save(state(5), checkpoint_id=delta, overwrite=True)
    assert_holds(delta, 5)
    assert not (delta / "base").exists()
    assert small.leftovers(directory) == []


@pytest.mark.parametrize("kind", ["foreign file", "foreign directory", "link", "link as base"])
def test_a_delta_that_holds_other_things_is_not_overwritten(delta: Path, directory: Path, kind: str) -> None:
    base = delta / "base"
    if kind == "foreign file":
        (base / "notes.txt").write_text("mine")
    elif kind == "foreign directory":
        (base / f"{'0' * 32}.rank-00000.data").mkdir()
    elif kind == "link":
        (base / f"{'0' * 32}.rank-00000.data").symlink_to(directory / "step-0")
    else:
        base.rename(directory / "elsewhere")
        base.symlink_to(directory / "elsewhere")
    with pytest.raises(FileExistsError, match="holds other things"):
        ss.save(state(5), checkpoint_id=delta, overwrite=True)
    assert base.exists()


def test_diff_tells_deltas_apart_without_reading_what_is_equal(directory: Path) -> None:
    paths = make_chain(directory, 3)
    for name in ("full-1", "full-2"):
        shutil.rmtree(directory / name)
    assert not ss.Checkpoint.open(paths[1]).diff(paths[1])
    difference = ss.Checkpoint.open(paths[0]).diff(paths[2])
    assert [change.name for change in difference.changed] == ["large", "scalar", "small"]
    assert difference.same_tensors == 2
    for path in paths:
        for file in path.glob("**/*.data"):
            replaced(file, b"")  # so that reading would fail
    difference = ss.Checkpoint.open(paths[0]).diff(Path(shutil.copytree(paths[0], directory / "copy")))
    assert not difference
    assert difference.same_tensors == 5
