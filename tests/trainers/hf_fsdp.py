"""Shims by which Accelerate's FSDP2 code runs on CPU: it knows FSDP on devices only, its functions need none."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard


def pretend_launched(rank: int, world_size: int) -> None:
    """The variables of a launcher; the process group is there already."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    os.environ.update(LOCAL_WORLD_SIZE=str(world_size), MASTER_ADDR="127.0.0.1", MASTER_PORT="1")


def plugin() -> FullyShardedDataParallelPlugin:
    return FullyShardedDataParallelPlugin(
        fsdp_version=2, state_dict_type="SHARDED_STATE_DICT", auto_wrap_policy="no_wrap"
    )


def stub() -> Any:
    """What `save_fsdp_model` and its like ask of an accelerator."""
    PartialState(cpu=True)
    rank = dist.get_rank()
    return SimpleNamespace(
        num_processes=dist.get_world_size(),
        process_index=rank,
        is_fsdp2=True,
        is_main_process=rank == 0,
        wait_for_everyone=dist.barrier,
    )


def accelerator(model: Any, optimizer: Any, **arguments: Any) -> Accelerator:
    """A real one, which takes model and optimizer for its own, sharded with FSDP2."""
    found = Accelerator(cpu=True, **arguments)
    AcceleratorState._shared_state["distributed_type"] = DistributedType.FSDP
    AcceleratorState._shared_state["fsdp_plugin"] = plugin()
    found._models, found._optimizers = [model], [optimizer]
    assert found.distributed_type == DistributedType.FSDP
    return found


def sharded(seed: int, steps: int = 1) -> tuple[Any, Any]:
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(6, 10), torch.nn.ReLU(), torch.nn.Linear(10, 3))
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for _ in range(steps):
        model(torch.randn(4, 6)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def local(model: Any, optimizer: Any) -> dict[str, Any]:
    """This rank's part of everything, copied."""
    moments = {
        f"{number}.{key}": (value.to_local() if hasattr(value, "to_local") else value).clone()
        for number, entry in optimizer.state_dict()["state"].items()
        for key, value in entry.items()
    }
    return {name: one.to_local().clone() for name, one in model.state_dict().items()} | moments
