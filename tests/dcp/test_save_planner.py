"""SavePlanner on real ranks: who writes what, and what DCP, its users and other storage see of it."""

from __future__ import annotations

import math
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

import snapstone as ss
from dcp.planned_states import assert_loads, blank, equal, full, save, state
from distributed.ranks import run_ranks, values
from snapstone.dcp import SavePlanner, StorageReader, StorageWriter, save_planner

KIB = 1024 // 4  # elements of float32


def nbytes(planner: SavePlanner) -> int:
    return sum(
        math.prod(item.tensor_data.chunk.sizes) * item.tensor_data.properties.dtype.itemsize
        for item in planner.plan.items
        if item.tensor_data is not None
    )


# Balance --------------------------------------------------------------------------------------------------------------


def _balance(rank: int, run: Path) -> tuple[int, list[str]]:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    saved: dict[str, Any] = {
        # Twice as many rows on rank 0 as on rank 1, of the same global tensor.
        "uneven": distribute_tensor(full(3, 64 * KIB), mesh, [Shard(0)]),
        **{f"replicated {size}": torch.zeros(size * KIB) for size in (8, 64, 24, 32)},
    }
    planner = save(run / "c", saved)
    return nbytes(planner) >> 10, sorted(item.index.fqn for item in planner.plan.items)


def test_replicated_tensors_go_by_the_bytes_that_each_rank_writes(tmp_path: Path) -> None:
    assert values(run_ranks(2, _balance, tmp_path)) == [
        (128 + 32, ["replicated 32", "uneven"]),
        (64 + 64 + 24 + 8, ["replicated 24", "replicated 64", "replicated 8", "uneven"]),
    ]


def _tiny(rank: int, run: Path) -> tuple[int, int]:
    steps = {f"step.{number}": torch.tensor(float(number)) for number in range(200)}
    saved = {**steps, **{f"w.{number}": torch.zeros(4 * KIB) for number in range(6)}}
    planner = save(run / "c", saved)
    names = [item.index.fqn for item in planner.plan.items]
    return sum(name.startswith("w.") for name in names), sum(name.startswith("step.") for name in names)


def test_tiny_tensors_stay_together(tmp_path: Path) -> None:
    assert values(run_ranks(3, _tiny, tmp_path)) == [(2, 200), (2, 0), (2, 0)]


def _values_and_lowest(rank: int, run: Path) -> list[str]:
    saved = {"rank": rank, "a": torch.zeros(64 * KIB), "b": torch.zeros(64 * KIB)}
    spread = save(run / "spread", saved)
    assert len([item for item in spread.plan.items if item.tensor_data]) == 1
    planner = SavePlanner(dedup_save_to_lowest_rank=True)
    dcp.save(saved, storage_writer=StorageWriter(run / "c"), planner=planner)
    return sorted(item.index.fqn for item in planner.plan.items)


def test_the_lowest_rank_has_python_values_and_on_request_all(tmp_path: Path) -> None:
    assert values(run_ranks(2, _values_and_lowest, tmp_path)) == [["a", "b", "rank"], []]
    assert ss.Checkpoint.open(tmp_path / "c").state_dict()["rank"] == 0


# What DCP and its users see -------------------------------------------------------------------------------------------


def _metadata(rank: int, run: Path) -> bool:
    saved = state(1) | {f"own {rank}": torch.zeros(2)}
    for dtype in (torch.float32, torch.bfloat16, torch.bfloat16):
        saved["model"] = state(1, dtype)["model"]
        ours = dcp.save(saved, storage_writer=StorageWriter(run / "ours"), planner=SavePlanner())
        stock = dcp.save(saved, storage_writer=StorageWriter(run / "stock"), planner=dcp.DefaultSavePlanner())
        assert ours.planner_data == stock.planner_data
        assert set(ours.state_dict_metadata) == set(stock.state_dict_metadata)
        for name, entry in stock.state_dict_metadata.items():
            found = ours.state_dict_metadata[name]
            for one in (entry, found):
                if hasattr(one, "chunks"):
                    one.chunks.sort(key=lambda chunk: chunk.offsets)
            assert found == entry
        assert ours.state_dict_metadata["model.sharded"].properties.dtype == dtype
        assert ours.storage_meta.checkpoint_id == run / "ours"
        # Whatever the caller does to it, the next save has its own.
        ours.state_dict_metadata["model.sharded"].chunks.clear()
        del ours.state_dict_metadata["epoch"]
        ours.planner_data.clear()
    return True


def test_metadata_is_that_of_stock_and_of_this_save(tmp_path: Path) -> None:
    assert values(run_ranks(3, _metadata, tmp_path)) == [True] * 3


def _stock_storage(rank: int, run: Path) -> bool:
    for number in range(4):
        saved = state(number)
        for directory, writer in (("stock", dcp.FileSystemWriter), ("ours", StorageWriter)):
            metadata = dcp.save(saved, storage_writer=writer(run / directory), planner=SavePlanner())
        assert metadata.storage_data == {}
        loaded = blank(saved)
        dcp.load(loaded, storage_reader=dcp.FileSystemReader(run / "stock"))
        assert equal(loaded, saved)
        loaded = blank(saved)
        dcp.load(loaded, storage_reader=StorageReader(run / "stock"))  # by an unpickler that knows stock's classes only
        assert equal(loaded, saved)
        assert_loads(run / "ours", saved)
    return True


def test_stock_storage_and_the_engines_share_a_remembered_plan(tmp_path: Path) -> None:
    assert values(run_ranks(3, _stock_storage, tmp_path)) == [True] * 3


def _alone(rank: int, run: Path) -> bool:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for number in range(3):
        sharded = distribute_tensor(full(4, 4, number), mesh, [Shard(0)])
        for directory, writer, reader in (
            ("ours", StorageWriter, StorageReader),
            ("stock", dcp.FileSystemWriter, dcp.FileSystemReader),
        ):
            saved = {"sharded": sharded, "number": number}
            dcp.save(saved, storage_writer=writer(run / directory), planner=SavePlanner(), use_collectives=False)
            loaded = blank(saved)
            dcp.load(loaded, storage_reader=reader(run / directory))
            assert equal(loaded, saved)
        save(run / f"no-dist-{rank}", {"own": full(3, 3, rank + number)}, no_dist=True)
        assert_loads(run / f"no-dist-{rank}", {"own": full(3, 3, rank + number)}, no_dist=True)
        save(run / "together", saved)  # the state whose shard each rank planned alone before
        assert_loads(run / "together", saved)
    return True


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_ranks_that_save_alone_and_together(tmp_path: Path) -> None:
    assert values(run_ranks(2, _alone, tmp_path)) == [True, True]


def _mesh_2d(rank: int, run: Path) -> bool:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    for number in range(2):
        saved = {
            "fsdp + tp": distribute_tensor(full(5, 7, number), mesh, [Shard(0), Shard(1)]),
            "hsdp": distribute_tensor(full(9, 2, number), mesh, [Replicate(), Shard(0)]),
            "both on 0": distribute_tensor(full(10, 3, number), mesh, [Shard(0), Shard(0)]),
        }
        save(run / "c", saved)
        assert_loads(run / "c", saved)
    return True


def test_two_dimensional_meshes(tmp_path: Path) -> None:
    assert values(run_ranks(4, _mesh_2d, tmp_path)) == [True] * 4
    assert ss.verify(tmp_path / "c")


def _refused(rank: int, run: Path, case: str) -> list[str]:
    sharded = distribute_tensor(full(4, 4), init_device_mesh("cpu", (2,)), [Shard(0)])
    own = {
        "shapes": {"t": torch.zeros(3 + rank)},
        "dtypes": {"t": torch.zeros(3, dtype=(torch.float32, torch.float64)[rank])},
        "kinds": {"t": torch.zeros(3) if rank else 3},
        "hole": {"t": sharded} if rank else {"u": 1},
        "knobs": {"t": torch.zeros(3)},
    }[case]
    planner = SavePlanner(enable_plan_caching=case != "knobs" or rank == 0)
    try:
        dcp.save(own, storage_writer=StorageWriter(run / "c"), planner=planner)
    except CheckpointException as error:
        assert save_planner._local_plans.all() == []  # the coordinator may not know them
        return [f"{type(failure).__name__}: {failure}" for failure, _ in error.failures.values()]
    return []


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("shapes", r"IncompatibleCheckpointError: ranks 0 and 1 disagree: .*\[3\] and .*\[4\]; .*tensor='t'"),
        ("dtypes", r"IncompatibleCheckpointError: ranks 0 and 1 disagree: torch.float32\[3\] and torch.float64"),
        ("kinds", r"IncompatibleCheckpointError: ranks 0 and 1 disagree: a Python value and torch"),
        ("hole", r"IncompatibleCheckpointError: shards leave a hole: 8 of 16"),
        ("knobs", r"ValueError: SavePlanner: ranks differ in enable_plan_caching"),
    ],
    ids=["shapes", "dtypes", "kinds", "hole", "knobs"],
)
def test_ranks_that_disagree_are_told_of_it(tmp_path: Path, case: str, message: str) -> None:
    for told in values(run_ranks(2, _refused, tmp_path, case)):
        assert len(told) == 1
        assert re.match(message, told[0])


class Doubling(SavePlanner):
    def transform_object(self, write_item: Any, object: Any) -> Any:
        resolved = super().transform_object(write_item, object)
        return resolved * 2 if isinstance(resolved, torch.Tensor) else resolved


class Listening(SavePlanner):
    """A subclass with a planning step of its own, as torch's documentation shows them."""

    def create_global_plan(self, all_plans: Any) -> Any:
        self.heard = [len(plan.items) for plan in all_plans]
        return super().create_global_plan(all_plans)


def _knobs(rank: int, run: Path) -> Any:
    saved = {"t": full(4, 4), "u": full(8, 8), "nested": {"n": 1}}
    for _ in range(2):
        dcp.save(saved, storage_writer=StorageWriter(run / "c"), planner=Doubling())
    assert_loads(run / "c", {"t": full(4, 4) * 2, "u": full(8, 8) * 2, "nested": {"n": 1}})
    listening = Listening()
    for planner in (SavePlanner(enable_plan_caching=False), listening):
        dcp.save(saved, storage_writer=StorageWriter(run / "c"), planner=planner)
        assert_loads(run / "c", saved)
    flat = SavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False, dedup_replicated_tensors=True)
    metadata = dcp.save({"t": full(4, 4)}, storage_writer=StorageWriter(run / "c"), planner=flat)
    assert metadata.planner_data is None
    return getattr(listening, "heard", None)


def test_stocks_knobs_and_hooks(tmp_path: Path) -> None:
    assert values(run_ranks(2, _knobs, tmp_path)) == [[3, 3], None]


def _asynchronous(rank: int, run: Path) -> bool:
    planner = SavePlanner()
    for number in range(3):
        training = state(number)
        future = dcp.async_save(training, storage_writer=StorageWriter(run / "c"), planner=planner)
        training["model"]["plain"] += 1
        future.result()
        assert_loads(run / "c", state(number))
    return True


def test_asynchronous_saves(tmp_path: Path) -> None:
    assert values(run_ranks(2, _asynchronous, tmp_path)) == [True, True]


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_used_planner_pickles_without_the_state_that_it_saved(tmp_path: Path) -> None:
    planner = save(tmp_path / "c", {"t": torch.zeros(64 * KIB)})
    data = pickle.dumps(planner)  # as the process executor sends it
    assert len(data) < 1024
    copy = pickle.loads(data)
    dcp.save({"t": full(3, 3)}, storage_writer=StorageWriter(tmp_path / "c"), planner=copy)
    assert_loads(tmp_path / "c", {"t": full(3, 3)})
