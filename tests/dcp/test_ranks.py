"""Several ranks through `dcp.save` and `dcp.load` with the engine's storage: one checkpoint, or an error everywhere."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard

import snapstone as ss
from distributed.ranks import run_ranks, values
from snapstone import _native
from snapstone.dcp import LoadPlanner, StorageReader, StorageWriter, installed, rendezvous


def full(number: int) -> torch.Tensor:
    return torch.arange(7 * 6, dtype=torch.float32).reshape(7, 6) + number


def state(number: int, placement: Any) -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    return {
        "model": {
            "sharded": distribute_tensor(full(number), mesh, [placement]),
            "replicated": distribute_tensor(full(number + 100), mesh, [Replicate()]),
            "plain": full(number + 200),
        },
        "step": number,
    }


def assert_is(found: dict[str, Any], number: int) -> None:
    model = found["model"]
    assert torch.equal(model["sharded"].full_tensor(), full(number))
    assert torch.equal(model["replicated"].to_local(), full(number + 100))
    assert torch.equal(model["plain"], full(number + 200))
    assert found["step"] == number


def _save(rank: int, run: Path) -> str:
    writer = StorageWriter(run / "c")
    for number in range(3):  # without reset; the planner replays its cached plans
        planner = dcp.DefaultSavePlanner(enable_plan_caching=True)
        dcp.save(state(number, Shard(0)), storage_writer=writer, planner=planner)
    return writer.save_id


def _load(rank: int, run: Path) -> bool:
    for placement in (Shard(0), Shard(1)):
        through_dcp = state(50, placement)
        dcp.load(through_dcp, storage_reader=StorageReader(run / "c"))
        assert_is(through_dcp, 2)
        through_engine = state(50, placement)
        ss.load(through_engine, checkpoint_id=run / "c")
        assert_is(through_engine, 2)
    return True


@pytest.mark.parametrize(("before", "after"), [(2, 3), (4, 2), (3, 1)])
def test_saved_on_some_ranks_and_loaded_on_others(tmp_path: Path, before: int, after: int) -> None:
    save_ids = set(values(run_ranks(before, _save, tmp_path)))
    assert save_ids == {ss.Checkpoint.open(tmp_path / "c").save_id}
    assert ss.verify(tmp_path / "c")
    assert os.listdir(tmp_path) == ["c"]
    assert values(run_ranks(after, _load, tmp_path)) == [True] * after


def _fail(rank: int, run: Path, failing: int, rule: str) -> list[int]:
    writer = StorageWriter(run / "c")
    dcp.save(state(1, Shard(0)), storage_writer=writer)
    if rank == failing:
        _native.fault_arm(rule)
    try:
        dcp.save(state(2, Shard(0)), storage_writer=writer)
    except CheckpointException as error:
        failed = sorted(error.failures)
    else:
        failed = []
    _native.fault_disarm()
    kept = state(50, Shard(0))
    dcp.load(kept, storage_reader=StorageReader(run / "c"))
    assert_is(kept, 1)
    dist.barrier()
    dcp.save(state(3, Shard(0)), storage_writer=writer)
    return failed


@pytest.mark.parametrize("failing", [0, 1])
@pytest.mark.parametrize("rule", ["fallocate:1:errno=ENOSPC", "fsync:1+:errno=EIO"])
def test_a_rank_that_cannot_write_fails_the_save_everywhere(tmp_path: Path, failing: int, rule: str) -> None:
    assert values(run_ranks(2, _fail, tmp_path, failing, rule)) == [[failing]] * 2
    assert ss.Checkpoint.open(tmp_path / "c").state_dict()["step"] == 3
    assert os.listdir(tmp_path) == ["c"]


def _read_badly(rank: int, run: Path, failing: int) -> list[int]:
    dcp.save(state(1, Shard(0)), storage_writer=StorageWriter(run / "c"))
    loaded = state(50, Shard(0))
    if rank == failing:
        _native.fault_arm("open:1:errno=EIO")
    try:
        dcp.load(loaded, storage_reader=StorageReader(run / "c"))
    except CheckpointException as error:
        failed = sorted(error.failures)
    else:
        failed = []
    _native.fault_disarm()
    dcp.load(loaded, storage_reader=StorageReader(run / "c"))
    assert_is(loaded, 1)
    return failed


@pytest.mark.parametrize("failing", [0, 1])
def test_metadata_that_one_rank_cannot_read_once_fails_the_load_everywhere(tmp_path: Path, failing: int) -> None:
    """DCP asks that rank again, and where it gets an answer then, leaves it out of what the others do together."""
    assert values(run_ranks(2, _read_badly, tmp_path, failing, timeout=60)) == [[failing]] * 2


def _killed(rank: int, run: Path) -> None:
    if rank == 0:
        _native.fault_arm("fallocate:1:kill")
    dcp.save(state(1, Shard(0)), storage_writer=StorageWriter(run / "killed"))


def _saved(rank: int, run: Path, name: str) -> None:
    dcp.save(state(2, Shard(0)), storage_writer=StorageWriter(run / name))


def test_the_note_of_a_killed_save_goes_with_a_later_one_once_it_is_old(tmp_path: Path) -> None:
    killed, other = run_ranks(2, _killed, tmp_path)
    assert (killed.exitcode, other.outcome) == (-signal.SIGKILL, "raised")
    note = tmp_path / ".saving-killed"
    values(run_ranks(2, _saved, tmp_path, "young"))
    assert sorted(os.listdir(tmp_path)) == [note.name, "young"]
    os.utime(note, (time.time() - 660, time.time() - 660))
    values(run_ranks(2, _saved, tmp_path, "old"))
    assert sorted(os.listdir(tmp_path)) == ["old", "young"]


def test_only_old_notes_of_saves_that_are_over_are_removed(tmp_path: Path) -> None:
    live = "a" * 32
    (tmp_path / f".staging-{live}").mkdir()
    over = '{"save_id": "%s", "world_size": 2}' % ("b" * 32)
    notes = {
        "live": over.replace("b" * 32, live),
        "over": over,
        "empty": "",
        "somebody's": over[:20],
        f"torn.{'b' * 32}": over[:20],
        "not-a-note": "x" * 70_000,
    }
    for name, text in notes.items():
        (tmp_path / f".saving-{name}").write_text(text)
    (tmp_path / ".saving-directory").mkdir()
    (tmp_path / "elsewhere").write_text(over)
    (tmp_path / ".saving-link").symlink_to("elsewhere")
    before = sorted(os.listdir(tmp_path))
    rendezvous.Note.remove_stale(str(tmp_path))
    assert sorted(os.listdir(tmp_path)) == before
    for name in before:
        os.utime(tmp_path / name, (0, 0), follow_symlinks=False)
    rendezvous.Note.remove_stale(str(tmp_path))
    kept = {".saving-live", ".saving-somebody's", ".saving-not-a-note", ".saving-directory", ".saving-link"}
    kept |= {"elsewhere", f".staging-{live}"}
    assert set(os.listdir(tmp_path)) == kept


def _subgroup(rank: int, run: Path) -> bool:
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    mine = groups[rank // 2]
    tensors = {f"rank-{rank}": torch.full((5,), float(rank)), "common": torch.ones(3)}
    dcp.save(tensors, storage_writer=StorageWriter(run / f"group-{rank // 2}"), process_group=mine)
    loaded = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    dcp.load(loaded, storage_reader=StorageReader(run / f"group-{rank // 2}"), process_group=mine)
    return all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())


def test_subgroups_save_side_by_side(tmp_path: Path) -> None:
    assert values(run_ranks(4, _subgroup, tmp_path)) == [True] * 4
    assert sorted(os.listdir(tmp_path)) == ["group-0", "group-1"]


def _alone(rank: int, run: Path) -> bool:
    tensors = {"mine": torch.full((5,), float(rank))}
    dcp.save(tensors, storage_writer=StorageWriter(run / "c"), use_collectives=False)
    loaded = {"mine": torch.zeros(5)}
    dcp.load(loaded, storage_reader=StorageReader(run / "c"))
    return torch.equal(loaded["mine"], tensors["mine"])


def test_without_collectives_every_rank_has_a_checkpoint_of_its_own(tmp_path: Path) -> None:
    assert values(run_ranks(2, _alone, tmp_path)) == [True] * 2
    assert sorted(os.listdir(tmp_path / "c")) == ["rank-00000", "rank-00001"]


def _bare(rank: int, run: Path) -> bool:
    with installed():
        training = state(7, Shard(0))
        future = dcp.async_save(training, checkpoint_id=run / "c")
        training["model"]["plain"] += 1
        future.result()
        loaded = state(50, Shard(0))
        dcp.load(loaded, checkpoint_id=run / "c")
    assert_is(loaded, 7)
    return True


def test_bare_asynchronous_calls(tmp_path: Path) -> None:
    assert values(run_ranks(2, _bare, tmp_path)) == [True] * 2


def _strided(rank: int, run: Path) -> list[str]:
    """Rows of the first half and rows of the second, on each rank; DCP's planner takes them for one block."""
    mesh = init_device_mesh("cpu", (2, 2))
    mine = torch.arange(16).reshape(2, 2, 4)[:, rank // 2].flatten()
    saved, target = (
        DTensor.from_local(
            local, mesh, [_StridedShard(0, split_factor=2), Replicate()], run_check=False, shape=(16, 3), stride=(3, 1)
        )
        for local in (torch.arange(48.0).reshape(16, 3)[mine], torch.full((8, 3), -1.0))
    )
    ss.save({"t": saved}, checkpoint_id=run / "c")
    errors = []
    try:
        dcp.load({"t": target}, storage_reader=StorageReader(run / "c"))
    except CheckpointException as error:
        errors = [str(failure) for failure, _ in error.failures.values()]
        assert torch.equal(target.to_local(), torch.full((8, 3), -1.0))
    dcp.load({"t": target}, storage_reader=StorageReader(run / "c"), planner=LoadPlanner())
    assert torch.equal(target.to_local(), saved.to_local())
    target.to_local().zero_()
    ss.load({"t": target}, checkpoint_id=run / "c")
    assert torch.equal(target.to_local(), saved.to_local())
    return errors


def test_a_placement_that_the_stock_planner_gets_wrong_is_refused_and_ours_plans_it(tmp_path: Path) -> None:
    for errors in values(run_ranks(4, _strided, tmp_path)):
        assert len(errors) == 4
        assert all("use snapstone.dcp.LoadPlanner" in error for error in errors)
