"""LoadPlanner: any sharding from any other, in place, and no silent conversion."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import snapstone as ss
from distributed.ranks import run_ranks, values
from snapstone.dcp import LoadPlanner, StorageReader, StorageWriter


def load(state: dict[str, Any], path: Path, **options: Any) -> None:
    dcp.load(state, storage_reader=StorageReader(path), planner=LoadPlanner(**options), no_dist=True)


def failure(state: dict[str, Any], path: Path, **options: Any) -> BaseException:
    with pytest.raises(CheckpointException) as caught:
        load(state, path, **options)
    return caught.value.failures[0][0]


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    ss.save({"w": torch.arange(12.0).reshape(3, 4), "b": torch.ones(2), "step": 3}, checkpoint_id=tmp_path / "c")
    return tmp_path / "c"


def test_another_dtype_is_an_error_unless_a_cast_is_asked_for(saved: Path) -> None:
    target = {"w": torch.zeros(3, 4, dtype=torch.bfloat16), "b": torch.zeros(2, dtype=torch.float64), "step": 0}
    error = failure(target, saved)
    assert isinstance(error, ss.IncompatibleCheckpointError)
    assert "w: saved as torch.float32, wanted as torch.bfloat16" in str(error)
    assert "b: saved as torch.float32, wanted as torch.float64" in str(error)
    assert not target["w"].any()
    load(target, saved, cast=True)
    assert torch.equal(target["w"], torch.arange(12.0).reshape(3, 4).bfloat16())
    assert torch.equal(target["b"], torch.ones(2, dtype=torch.float64))


def test_every_key_that_does_not_fit_is_named_at_once(saved: Path) -> None:
    target = {"w": torch.zeros(3, 5), "b": 7, "step": torch.zeros(1), "more": torch.zeros(1), "again": torch.zeros(1)}
    text = str(failure(target, saved))
    for problem in (
        "5 keys do not fit",
        "w: saved with shape [3, 4], wanted [3, 5]",
        "b: saved as a tensor, wanted as a value",
        "step: saved as a value, wanted as a tensor",
        "Missing key in checkpoint state_dict: more",
        "Missing key in checkpoint state_dict: again",
    ):
        assert problem in text


def test_a_partial_load_leaves_alone_what_was_not_saved(saved: Path) -> None:
    target = {"w": torch.zeros(3, 4), "more": torch.full((2,), 5.0)}
    load(target, saved, allow_partial_load=True)
    assert torch.equal(target["w"], torch.arange(12.0).reshape(3, 4))
    assert torch.equal(target["more"], torch.full((2,), 5.0))


def test_targets_are_filled_in_place_whatever_their_memory(saved: Path) -> None:
    memory = torch.zeros(4, 6)
    parameter = torch.nn.Parameter(torch.zeros(2))
    target = {"w": memory.t()[1:4], "b": parameter, "step": 0}
    load(target, saved)
    assert torch.equal(memory.t()[1:4], torch.arange(12.0).reshape(3, 4))
    assert not memory.t()[[0, 4, 5]].any()
    assert torch.equal(parameter.detach(), torch.ones(2))
    assert target["b"] is parameter
    assert target["step"] == 3


def test_a_stock_checkpoint_loads_strictly_too(tmp_path: Path) -> None:
    dcp.save({"w": torch.ones(3)}, storage_writer=dcp.FileSystemWriter(tmp_path / "c"), no_dist=True)
    target = {"w": torch.zeros(3)}
    load(target, tmp_path / "c")
    assert torch.equal(target["w"], torch.ones(3))
    assert "wanted as torch.float16" in str(failure({"w": torch.zeros(3, dtype=torch.float16)}, tmp_path / "c"))


def full(rows: int = 13, columns: int = 7) -> torch.Tensor:
    return torch.arange(float(rows * columns)).reshape(rows, columns)


def _save_sharded(rank: int, path: Path) -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    dcp.save({"w": distribute_tensor(full(), mesh, [Shard(0)])}, storage_writer=StorageWriter(path))


def _load_everywhere(rank: int, path: Path, shape: tuple[int, int]) -> int:
    mesh = init_device_mesh("cpu", shape)
    checked = 0
    for placements in (
        (Shard(0), Shard(1)),
        (Shard(1), Shard(0)),
        (Shard(0), Shard(0)),
        (Shard(1), Shard(1)),
        (Replicate(), Shard(1)),
        (Shard(0), Replicate()),
        (Replicate(), Replicate()),
    ):
        for strategy in ("direct", "scatter", "broadcast"):
            target = distribute_tensor(torch.zeros(13, 7), mesh, placements)
            reader = StorageReader(path, strategy=strategy)
            dcp.load({"w": target}, storage_reader=reader, planner=LoadPlanner())
            assert torch.equal(target.full_tensor(), full()), (placements, strategy)
            assert reader.stats["strategy"] == strategy
            checked += 1
    return checked


def test_uneven_shards_load_into_every_placement_of_a_2_d_mesh(tmp_path: Path) -> None:
    values(run_ranks(3, _save_sharded, tmp_path / "c"))
    assert values(run_ranks(4, _load_everywhere, tmp_path / "c", (2, 2))) == [21] * 4


def _fsdp_over_tp(seed: int) -> torch.nn.Module:
    """Uneven on purpose: 10 rows over 2 x 2."""
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(6, 10), torch.nn.Linear(10, 6))
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    parallelize_module(model, mesh["tp"], {"0": ColwiseParallel(), "1": RowwiseParallel()})
    return fully_shard(model, mesh=mesh["dp"])


def _strided(rank: int, path: Path) -> bool:
    source = _fsdp_over_tp(1)
    ss.save({"model": source.state_dict()}, checkpoint_id=path)
    target = _fsdp_over_tp(2)
    dcp.load({"model": target.state_dict()}, storage_reader=StorageReader(path), planner=LoadPlanner())
    pairs = zip(source.parameters(), target.parameters(), strict=True)
    return all(torch.equal(a.full_tensor(), b.full_tensor()) for a, b in pairs)


def test_strided_shards_of_fsdp_over_tensor_parallel_are_filled(tmp_path: Path) -> None:
    assert values(run_ranks(4, _strided, tmp_path / "c")) == [True] * 4


def test_numpy_values_are_values(tmp_path: Path) -> None:
    saved = {"lr": np.float64(0.5), "table": np.arange(4), "w": torch.ones(2)}
    dcp.save(saved, storage_writer=StorageWriter(tmp_path / "c"), no_dist=True)
    target = {"lr": np.float64(0), "table": np.zeros(4, np.int64), "w": torch.zeros(2)}
    load(target, tmp_path / "c")
    assert target["lr"] == 0.5
    assert np.array_equal(target["table"], np.arange(4))
    assert "table: saved as a value, wanted as a tensor" in str(failure({"table": torch.zeros(4)}, tmp_path / "c"))
