"""Delta saves of several ranks: unchanged bytes are found wherever shards line up, and all ranks agree on what stays.

Invariants: every tensor comes back bit for bit whatever the world size of either save; a rank that cannot use the base
saves its share in full, and the others need not know; a rank that fails between the votes is named by all.
"""

from __future__ import annotations

import os
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from rank_states import AT_ONCE_S, assert_holds, attempt, hidden, leaked, resources, said, save, state
from ranks import run_ranks, values
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import snapstone as ss
from snapstone import _native
from snapstone.dcp import StorageWriter

pytestmark = [pytest.mark.timeout(60), pytest.mark.usefixtures("small_chunks")]

ROWS, COLUMNS = 1024, 256  # a row is 1 KiB: 64 rows are a chunk
NBYTES = ROWS * COLUMNS * 4


def full(name: str) -> torch.Tensor:
    return torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(len(name)))


def sharded(dim: int, changed_rows: int = 0) -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    tensors = {"rows": full("rows"), "replica": full("replica")}
    tensors["rows"][:changed_rows] += 1
    return {
        "rows": distribute_tensor(tensors["rows"], mesh, [Shard(dim)], src_data_rank=None),
        "replica": tensors["replica"],
        "step": changed_rows,
    }


def _save(rank: int, path: Path, base: Path | None, dim: int, changed_rows: int) -> dict[str, Any]:
    saved = ss.save(sharded(dim, changed_rows), checkpoint_id=path, base=base)
    return {"own": saved.own_nbytes, "stats": {key: saved.stats.get(key) for key in ("live_fraction", "shared_bytes")}}


def assert_is(path: Path, changed_rows: int) -> None:
    checkpoint = ss.Checkpoint.open(path)
    expected = full("rows")
    expected[:changed_rows] += 1
    assert torch.equal(checkpoint.get_tensor("rows"), expected)
    assert torch.equal(checkpoint.get_tensor("replica"), full("replica"))
    report = ss.verify(path)
    assert report, report.problems


@pytest.mark.parametrize(("before", "after"), [(2, 2), (2, 1), (1, 2), (4, 2), (2, 4), (3, 2)])
def test_unchanged_rows_are_found_in_any_world_size(tmp_path: Path, before: int, after: int) -> None:
    values(run_ranks(before, _save, tmp_path / "a", None, 0, 0))
    saved = values(run_ranks(after, _save, tmp_path / "b", tmp_path / "a", 0, 64))
    assert len({one["own"] for one in saved}) == 1
    if before == 3:  # 342 rows: only the first of the three parts begins on a chunk of the other grid
        assert saved[0]["own"] < 2 * NBYTES
    else:
        assert saved[0]["own"] == 64 << 10
    assert_is(tmp_path / "b", 64)
    shutil.rmtree(tmp_path / "a")
    assert_is(tmp_path / "b", 64)


def test_columns_line_up_with_themselves_and_not_with_rows(tmp_path: Path) -> None:
    values(run_ranks(2, _save, tmp_path / "a", None, 1, 0))
    same = values(run_ranks(2, _save, tmp_path / "b", tmp_path / "a", 1, 0))
    assert same[0]["own"] == 0
    turned = values(run_ranks(2, _save, tmp_path / "c", tmp_path / "a", 0, 0))
    assert turned[0]["own"] == NBYTES
    for name in ("a", "b", "c"):
        assert_is(tmp_path / name, 0)


def test_a_file_that_two_ranks_use_by_a_third_each_stays(tmp_path: Path) -> None:
    """Each alone uses less than half of it."""
    values(run_ranks(1, _save, tmp_path / "a", None, 0, 0))
    saved = values(run_ranks(2, _save, tmp_path / "b", tmp_path / "a", 0, 512))
    assert os.listdir(tmp_path / "b" / "base")
    assert saved[0]["stats"] == saved[1]["stats"]
    assert saved[0]["stats"]["live_fraction"] == 0.75
    assert_is(tmp_path / "b", 512)


def test_what_little_all_ranks_use_together_is_carried_over(tmp_path: Path) -> None:
    def names(path: Path) -> list[str]:
        return sorted(name for name in os.listdir(path) if "carried" in name)

    values(run_ranks(1, _save_rows, tmp_path / "a", None, 0))
    values(run_ranks(2, _save_rows, tmp_path / "b", tmp_path / "a", 640))
    assert not (tmp_path / "b" / "base").exists()
    assert names(tmp_path / "b") == ["rank-00001.carried.data"]
    expected = full("rows")
    expected[:640] += 1
    assert torch.equal(ss.Checkpoint.open(tmp_path / "b").get_tensor("rows"), expected)
    assert ss.verify(tmp_path / "b")


def _save_rows(rank: int, path: Path, base: Path | None, changed_rows: int) -> None:
    ss.save({"rows": sharded(0, changed_rows)["rows"]}, checkpoint_id=path, base=base)


# ---- failures


def _one_cannot_link(rank: int, run: Path) -> dict[str, Any]:
    save(rank, run, 1)
    dist.barrier()
    if rank == 1:
        _native.fault_arm("link:1:errno=EPERM")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        saved = ss.save(state(rank, 1), checkpoint_id=run / "step-2", base="auto", timeout=20)
    _native.fault_disarm()
    return {"warned": [str(one.message) for one in caught], "own": [w.data[0].nbytes for w in saved.manifest.writers]}


def test_a_rank_that_cannot_link_saves_its_share_in_full(tmp_path: Path) -> None:
    first, second = values(run_ranks(2, _one_cannot_link, tmp_path))
    assert (len(first["warned"]), len(second["warned"])) == (0, 1)
    assert "rank 1 saves in full" in second["warned"][0]
    assert first["own"] == second["own"]
    assert first["own"][0] == 0 < first["own"][1]
    shutil.rmtree(tmp_path / "step-1")
    assert_holds(tmp_path / "step-2", 2, 1)


FAULTS = {
    "linking, and then everything": (1, "link:1:errno=EIO;fsync:1+:errno=EIO"),
    "carrying over": (0, "copy_file_range:1:errno=EIO"),
    "a full disk while carrying over": (1, "copy_file_range:1:errno=ENOSPC"),
    "writing": (1, "uring_write:1:errno=EIO;pwrite:1:errno=EIO"),
    "the index": (2, "fsync:2:errno=EIO"),
}


def _a_delta_fails(rank: int, run: Path, failing: int, faults: str) -> dict[str, Any]:
    """Steps 1 and 2 share less than half of each file, so that the rest is carried over."""
    save(rank, run, 1)
    dist.barrier()
    before = resources()
    if rank == failing:
        _native.fault_arm(faults)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ended = attempt(lambda: ss.save(_partly(rank), checkpoint_id=run / "step-2", base="auto", timeout=20))
    _native.fault_disarm()
    ended["leaked"] = leaked(before)
    save(rank, run, 3)
    return ended


def _partly(rank: int) -> dict[str, Any]:
    changed = state(rank, 1)
    return {**changed, "weight": changed["weight"] + 1, "other": changed["other"] + 1}


@pytest.mark.parametrize("name", FAULTS)
def test_a_rank_that_fails_in_a_delta_save_is_named_by_all(tmp_path: Path, name: str) -> None:
    failing, faults = FAULTS[name]
    results = values(run_ranks(3, _a_delta_fails, tmp_path, failing, faults))
    said(results, failing)
    for ended in results:
        assert ended["seconds"] < AT_ONCE_S, ended
        assert ended["leaked"] == [0, 0]
    assert hidden(tmp_path) == []
    assert sorted(os.listdir(tmp_path)) == ["step-1", "step-3"]
    for step in (1, 3):
        assert_holds(tmp_path / f"step-{step}", 3, step)


def _bases_differ(rank: int, run: Path) -> dict[str, Any]:
    save(rank, run, 1)
    return attempt(lambda: ss.save(state(rank, 2), checkpoint_id=run / "step-2", base="auto" if rank else None))


def test_ranks_that_give_different_bases_are_told(tmp_path: Path) -> None:
    for ended in values(run_ranks(2, _bases_differ, tmp_path)):
        assert ended["error"] == "ValueError"
    assert os.listdir(tmp_path) == ["step-1"]


def _stale(rank: int, run: Path) -> dict[str, Any]:
    optimizer = {"state": {rank: {"exp_avg": torch.ones(50_000)}}, "param_groups": [{"lr": 0.1}]}
    ss.save({"o": optimizer}, checkpoint_id=run / "1", step=1)
    if rank == 1:
        optimizer["state"][1]["exp_avg"] += 1  # type: ignore[index]
    ss.save({"o": optimizer}, checkpoint_id=run / "2", step=2, base="auto", on_unchanged="raise")
    return attempt(
        lambda: ss.save({"o": optimizer}, checkpoint_id=run / "3", step=3, base="auto", on_unchanged="raise")
    )


def test_a_state_is_stale_when_nothing_changed_on_any_rank(tmp_path: Path) -> None:
    for ended in values(run_ranks(2, _stale, tmp_path)):
        assert ended["error"] == "CheckpointError"
    assert sorted(os.listdir(tmp_path)) == ["1", "2"]


# ---- through torch.distributed.checkpoint


def _mixed_precision(rank: int, run: Path) -> list[int]:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    master = distribute_tensor(full("rows"), mesh, [Shard(0)], src_data_rank=None)
    state = {"weight": master.bfloat16(), "master": master}
    for name, derive in (("stored", False), ("derived", True)):
        dcp.save(state, storage_writer=StorageWriter(run / name, derive=derive))
        dist.barrier()
    return [ss.Checkpoint.open(run / name).own_nbytes for name in ("stored", "derived")]


def test_a_storage_writer_that_derives_weights_from_masters(tmp_path: Path) -> None:
    for stored, derived in values(run_ranks(2, _mixed_precision, tmp_path)):
        assert (stored, derived) == (NBYTES * 3 // 2, NBYTES)
    checkpoint = ss.Checkpoint.open(tmp_path / "derived")
    assert torch.equal(checkpoint.get_tensor("weight"), full("rows").bfloat16())
    assert ss.verify(tmp_path / "derived")


def _through_dcp(rank: int, run: Path) -> list[int]:
    sizes = []
    for step in (0, 64, 128):
        tensors = {name: value for name, value in sharded(0, step).items() if name != "step"}
        writer = StorageWriter(run / str(step), base="auto")
        dcp.save({"model": tensors}, storage_writer=writer)
        dist.barrier()
        sizes.append(ss.Checkpoint.open(run / str(step)).own_nbytes)
    return sizes


def test_a_storage_writer_with_a_base(tmp_path: Path) -> None:
    for sizes in values(run_ranks(2, _through_dcp, tmp_path)):
        assert sizes == [2 * NBYTES, 64 << 10, 64 << 10]
    for step in (0, 64):
        shutil.rmtree(tmp_path / str(step))
    expected = full("rows")
    expected[:128] += 1
    checkpoint = ss.Checkpoint.open(tmp_path / "128")
    assert torch.equal(checkpoint.get_tensor("model.rows"), expected)
    assert ss.verify(tmp_path / "128")
