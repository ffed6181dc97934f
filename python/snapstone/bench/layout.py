"""How a model is spread over ranks: replicated, FSDP2, tensor parallel, or several of these on one mesh."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module

__all__ = ["Layout"]

_COLUMNS = ("query", "key", "value", "gate", "up")
_ROWS = ("out", "down")


@dataclass(frozen=True, slots=True)
class Layout:
    """`fsdp` times `tp` divides `world`; what is left are replicas."""

    world: int
    fsdp: int
    tp: int

    @classmethod
    def of(cls, world: int, fsdp: int, tp: int, key_heads: int) -> Layout:
        """ValueError, with the numbers, for degrees that do not fit the ranks or the model."""
        for name, degree in (("--fsdp", fsdp), ("--tp", tp)):
            if degree < 1:
                raise ValueError(f"{name} {degree}: must be at least 1")
        if world % (fsdp * tp):
            raise ValueError(f"--fsdp {fsdp} times --tp {tp} does not divide the {world} ranks that run")
        if key_heads % tp:
            raise ValueError(f"--tp {tp} does not divide the {key_heads} key heads of the model")
        if tp > 1 and fsdp == 1 and world > tp:
            raise ValueError(f"--tp {tp} on {world} ranks: replicas with tensor parallelism need --fsdp {world // tp}")
        return cls(world, fsdp, tp)

    @property
    def replicas(self) -> int:
        return self.world // (self.fsdp * self.tp)

    def __str__(self) -> str:
        parts = [f"{name} {degree}" for name, degree in (("fsdp", self.fsdp), ("tp", self.tp)) if degree > 1]
        if self.replicas > 1 or not parts:
            parts.insert(0, f"ddp {self.replicas}")
        return ", ".join(parts)

    @property
    def wraps(self) -> bool:
        """Whether gradients are averaged by DistributedDataParallel around the module."""
        return self.replicas > 1 and self.fsdp == 1

    def shard(self, model: nn.Module, device: str) -> None:
        """Cuts the parameters of a module on the meta device; DTensors take their place."""
        if self.fsdp == self.tp == 1:
            return
        mesh: Any = init_device_mesh(
            device, (self.replicas, self.fsdp, self.tp), mesh_dim_names=("replica", "fsdp", "tp")
        )
        blocks: Any = model.blocks
        if self.tp > 1:
            for block in blocks:
                parallelize_module(block, mesh["tp"], _block_plan())
        if self.fsdp > 1:
            over = mesh["replica", "fsdp"] if self.replicas > 1 else mesh["fsdp"]
            for block in blocks:
                fully_shard(block, mesh=over)
            fully_shard(model, mesh=over)

    def data_share(self, rank: int) -> int:
        """Which part of a batch is this rank's; ranks of one tensor-parallel group have the same."""
        return rank // self.tp


def _block_plan() -> dict[str, ParallelStyle]:
    return {name: ColwiseParallel() for name in _COLUMNS} | {name: RowwiseParallel() for name in _ROWS}


def device_of(kind: str, local_rank: int) -> torch.device:
    return torch.device(kind, local_rank) if kind == "cuda" else torch.device(kind)
