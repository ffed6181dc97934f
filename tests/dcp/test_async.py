"""`dcp.async_save` through the engine: a checkpoint holds the state of the call, whatever the training does next, and a
failure is seen where the user looks.
"""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed._shard.sharded_tensor import ShardedTensor, init_from_local_shards
from torch.distributed._shard.sharded_tensor.shard import Shard as LocalShard
from torch.distributed.checkpoint.state_dict_saver import AsyncSaveResponse
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import snapstone as ss
from distributed.ranks import run_ranks, values
from snapstone import _native
from snapstone.dcp import Stager, StorageReader, StorageWriter


def full(number: int) -> torch.Tensor:
    return torch.arange(7 * 6, dtype=torch.float32).reshape(7, 6) + number


def training(number: int) -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    return {
        "sharded": distribute_tensor(full(number), mesh, [Shard(0)]),
        "replicated": distribute_tensor(full(number), mesh, [Replicate()]),
        "plain": full(number),
        "step": number,
    }


def proceed(state: dict[str, Any]) -> None:
    """One step of training."""
    for tensor in state.values():
        if isinstance(tensor, DTensor):
            tensor.to_local().add_(1)
        elif isinstance(tensor, torch.Tensor):
            tensor.add_(1)
    state["step"] += 1


def assert_holds(path: Path, number: int) -> None:
    loaded = ss.Checkpoint.open(path).state_dict()
    assert loaded.pop("step") == number
    assert len(loaded) == 3
    assert all(torch.equal(tensor, full(number)) for tensor in loaded.values())


def _in_a_row(rank: int, run: Path, blocking: bool) -> bool:
    stager, writer, state = Stager(blocking=blocking), StorageWriter(run / "last"), training(0)
    uploads = []
    for _ in range(4):
        response = dcp.async_save(state, storage_writer=writer, async_stager=stager)
        if not blocking:
            response.staging_completion.result()
            response = response.upload_completion
        uploads.append(response)
        proceed(state)
    for upload in uploads:
        upload.result()
    dcp.async_save(state, storage_writer=StorageWriter(run / "next"), async_stager=stager)
    stager.synchronize_staging()
    proceed(state)
    stager.close()
    return True


@pytest.mark.parametrize("blocking", [False, True])
def test_saves_in_a_row_through_one_writer_and_stager_hold_the_states_of_their_calls(
    tmp_path: Path, blocking: bool
) -> None:
    assert values(run_ranks(2, _in_a_row, tmp_path, blocking)) == [True] * 2
    assert_holds(tmp_path / "last", 3)
    assert_holds(tmp_path / "next", 4)
    assert sorted(os.listdir(tmp_path)) == ["last", "next"]


def _own_planner_and_held_errors(rank: int, run: Path, blocking: bool) -> list[str]:
    stager, state, planner = Stager(blocking=blocking, timeout=20), training(0), dcp.DefaultSavePlanner()
    held: list[Any] = []
    errors = []

    def save(**options: Any) -> None:
        response = dcp.async_save(
            state, storage_writer=StorageWriter(run / "c", **options), async_stager=stager, planner=planner
        )
        upload = response if blocking else response.upload_completion
        held.append((response, upload.exception()))
        errors.append(type(held[-1][1]).__name__)
        proceed(state)

    save()
    save(overwrite=False)
    save()
    if rank == 1:
        _native.fault_arm("fsync:1+:errno=EIO")
    save()
    _native.fault_disarm()
    save()
    stager.close()
    return errors


@pytest.mark.parametrize("blocking", [False, True])
def test_a_failed_save_whose_error_is_kept_does_not_hold_up_the_next(tmp_path: Path, blocking: bool) -> None:
    failed, none = "CheckpointException", "NoneType"
    errors = values(run_ranks(2, _own_planner_and_held_errors, tmp_path, blocking))
    assert errors == [[none, failed, none, failed, none]] * 2
    assert_holds(tmp_path / "c", 4)


class Uncopyable(torch.Tensor):
    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.copy_:
            raise ArithmeticError("no copies")
        return super().__torch_function__(func, types, args, kwargs or {})


def _staging_error(rank: int, run: Path) -> list[str]:
    class Late(Stager):
        """The staging has failed before `async_save` looks at its future."""

        def stage(self, state_dict: dict[str, Any]) -> Any:
            future = super().stage(state_dict)
            time.sleep(0.2)
            return future

    found = []
    for kind in (Stager, Late):
        stager = kind()
        state = {"bad": torch.ones(3).as_subclass(Uncopyable)}
        response = dcp.async_save(state, storage_writer=StorageWriter(run / "c"), async_stager=stager)
        assert isinstance(response, AsyncSaveResponse)
        found.append(type(response.staging_completion.exception(20)).__name__)
        found.append(type(response.upload_completion.exception(20)).__name__)
        state = {"t": torch.ones(3)}
        try:
            dcp.async_save(state, storage_writer=StorageWriter(run / "c"), async_stager=stager)
        except ArithmeticError:
            found.append("raised by the next call")
        response = dcp.async_save(state, storage_writer=StorageWriter(run / "c"), async_stager=stager)
        response.upload_completion.result()
        stager.close()
    return found


def test_a_staging_error_reaches_both_futures_and_the_next_call(tmp_path: Path) -> None:
    (found,) = values(run_ranks(1, _staging_error, tmp_path))
    assert found == ["ArithmeticError", "ArithmeticError", "raised by the next call"] * 2
    assert (ss.Checkpoint.open(tmp_path / "c").get_tensor("t") == 1).all()


class Held(StorageWriter):
    """Writes when it is let."""

    let = threading.Event()

    def write_data(self, plan: Any, planner: Any) -> Any:
        assert self.let.wait(20)
        return super().write_data(plan, planner)


def _rejected(rank: int, run: Path) -> bool:
    stager, state = Stager(on_busy="reject"), training(0)
    for number in range(3):
        Held.let.clear()
        response = dcp.async_save(state, storage_writer=Held(run / "c"), async_stager=stager)
        for wait in (response.staging_completion.result, lambda: time.sleep(0.1)):
            wait()
            with pytest.raises(RuntimeError, match="still reads the staging buffer"):
                dcp.async_save(state, storage_writer=StorageWriter(run / "d"), async_stager=stager)
        proceed(state)
        Held.let.set()
        response.upload_completion.result()  # and the buffer is free at once
        assert_holds(run / "c", number)
        dist.barrier()
    stager.close()
    return True


def test_a_save_is_rejected_exactly_while_the_one_before_runs(tmp_path: Path) -> None:
    assert values(run_ranks(2, _rejected, tmp_path)) == [True] * 2
    assert not (tmp_path / "d").exists()


def _stocks_stager(rank: int, run: Path) -> bool:
    state, writer = training(0), StorageWriter(run / "c")
    for _ in range(2):
        future = dcp.async_save(state, storage_writer=writer)
        proceed(state)
        future.result()
    return True


def test_stocks_own_stager(tmp_path: Path) -> None:
    assert values(run_ranks(2, _stocks_stager, tmp_path)) == [True] * 2
    assert_holds(tmp_path / "c", 1)


def _stocks_writer(rank: int, run: Path) -> bool:
    state, stager = training(0), Stager()
    for _ in range(2):
        writer = dcp.FileSystemWriter(run / "c")
        response = dcp.async_save(state, storage_writer=writer, async_stager=stager)
        response.staging_completion.result()
        proceed(state)
    response.upload_completion.result()
    stager.close()
    loaded = training(50)
    dcp.load(loaded, storage_reader=StorageReader(run / "c"))
    return loaded["step"] == 1 and torch.equal(loaded["sharded"].full_tensor(), full(1))


def test_stocks_own_writer(tmp_path: Path) -> None:
    assert values(run_ranks(2, _stocks_writer, tmp_path)) == [True] * 2


def _sharded_tensor(rank: int, run: Path) -> bool:
    rows = full(0)[:6]
    sharded = init_from_local_shards(
        [LocalShard.from_tensor_and_offsets(rows[3 * rank : 3 * rank + 3].clone(), [3 * rank, 0], rank)], 6, 6
    )
    stager = Stager()
    response = dcp.async_save({"s": sharded}, storage_writer=StorageWriter(run / "c"), async_stager=stager)
    response.staging_completion.result()
    sharded.local_shards()[0].tensor.zero_()
    response.upload_completion.result()
    staged = stager.stage({"s": sharded}).result()["s"]
    assert type(staged) is ShardedTensor
    assert staged.metadata() == sharded.metadata()
    stager.close()
    return torch.equal(ss.Checkpoint.open(run / "c").get_tensor("s"), rows)


def test_sharded_tensors_are_staged(tmp_path: Path) -> None:
    assert values(run_ranks(2, _sharded_tensor, tmp_path)) == [True] * 2


def test_the_process_executor_maps_one_segment_and_survives_failures(tmp_path: Path) -> None:
    script = Path(__file__).with_name("async_process.py")
    env = {**os.environ, "MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path)], env=env, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["found"] == [[number, number, number, number] for number in (1, 2, 3, 4)]
    assert report["counts"][3] <= report["counts"][1]
    assert "Checkpoint already exists" in report["error"]
    assert report["segments"] <= 2
    assert report["left"] == 0


def _in_flight(rank: int, run: Path) -> bool:
    writer = StorageWriter(run / "c")
    planner = dcp.DefaultSavePlanner()
    planner.set_up_planner({"t": torch.ones(3)}, is_coordinator=True)
    writer.set_up_storage_writer(True, rank=0)
    plans, metadata = planner.create_global_plan([writer.prepare_local_plan(planner.create_local_plan())])
    (plan,) = writer.prepare_global_plan(plans)
    copy = pickle.loads(pickle.dumps(writer))
    allowed = (str, int, bool, Path, type(None), type(writer.fs))
    assert all(isinstance(value, allowed) for value in copy.__dict__.values())
    dcp.save({"t": torch.zeros(3)}, storage_writer=copy, checkpoint_id=run / "d")
    writer.finish(metadata, [writer.write_data(plan, planner).value()])
    return bool((ss.Checkpoint.open(run / "c").get_tensor("t") == 1).all())


def test_a_pickled_writer_has_no_part_in_the_save_of_its_original(tmp_path: Path) -> None:
    assert values(run_ranks(1, _in_flight, tmp_path)) == [True]
    assert sorted(os.listdir(tmp_path)) == ["c", "d"]
