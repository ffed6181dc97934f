"""States that several ranks save with SavePlanner, and what the tests of this folder ask of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

import snapstone as ss
from snapstone.dcp import SavePlanner, StorageReader, StorageWriter


def full(rows: int, columns: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).to(dtype)


def state(seed: int = 0, dtype: torch.dtype = torch.float32, placement: Any = None) -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    return {
        "model": {
            "sharded": distribute_tensor(full(7, 6, seed, dtype), mesh, [placement or Shard(0)]),
            "few rows": distribute_tensor(full(1, 5, seed + 1, dtype), mesh, [Shard(0)]),  # empty on most ranks
            "replicated": distribute_tensor(full(8, 3, seed + 2, dtype), mesh, [Replicate()]),
            "plain": full(5, 2, seed + 3, dtype),
        },
        "optim": {"step": torch.tensor(float(seed)), "empty": torch.zeros(0, 3, dtype=dtype), "groups": [{"lr": 0.1}]},
        "epoch": seed,
    }


def blank(like: dict[str, Any]) -> dict[str, Any]:
    def zero(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return torch.zeros_like(value)
        if isinstance(value, dict):
            return {key: zero(item) for key, item in value.items()}
        return [zero(item) for item in value] if isinstance(value, list) else type(value)()

    blanked: dict[str, Any] = zero(like)
    return blanked


def equal(found: Any, expected: Any) -> bool:
    if isinstance(expected, torch.Tensor):
        pair = [getattr(tensor, "_local_tensor", tensor) for tensor in (found, expected)]
        return found.dtype == expected.dtype and torch.equal(*pair)
    if isinstance(expected, dict):
        return found.keys() == expected.keys() and all(equal(found[key], value) for key, value in expected.items())
    return type(found) is type(expected) and bool(found == expected)


def assert_loads(path: Path, expected: dict[str, Any], **options: Any) -> None:
    through_dcp, through_engine = blank(expected), blank(expected)
    dcp.load(through_dcp, storage_reader=StorageReader(path), **options)
    assert equal(through_dcp, expected)
    ss.load(through_engine, checkpoint_id=path, **options)
    assert equal(through_engine, expected)


def save(path: Path, saved: dict[str, Any], **options: Any) -> SavePlanner:
    """With a planner of its own."""
    planner = SavePlanner()
    dcp.save(saved, storage_writer=StorageWriter(path), planner=planner, **options)
    return planner
