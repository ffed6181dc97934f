"""What a checkpoint is loaded into, and whether what then stands there is what was saved."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from .. import _native

__all__ = ["LAYOUTS", "Layout", "Targets", "nbytes_of_rank"]

Layout = Literal["replicated", "sharded"]
LAYOUTS: tuple[Layout, ...] = ("replicated", "sharded")

_STALE = 0xA5  # in every byte before a load: what a load does not write is not what was saved


@dataclass(slots=True)
class _Target:
    name: str
    memory: torch.Tensor  # uint8, this rank's bytes
    tensor: torch.Tensor  # the same memory: the whole tensor, or this rank's rows of it
    digest: str


class Targets:
    """Memory of one rank for every tensor that is to be loaded. Every rank of the group makes one.

    "replicated": each rank has the whole tensors. "sharded": each has its part along dimension 0, as FSDP2 has, and
    the whole of tensors without dimensions. What should stand there is learned from `saved_tensors`, an independent
    read, of which only digests are kept.
    """

    def __init__(
        self, saved_tensors: Iterable[tuple[str, torch.Tensor]], layout: Layout, rank: int, world: int
    ) -> None:
        mesh = init_device_mesh("cpu", (world,)) if layout == "sharded" and world > 1 else None
        self.state: dict[str, Any] = {}
        self._targets: list[_Target] = []
        for name, saved in saved_tensors:
            whole = saved if mesh is None or saved.dim() == 0 else _part(saved, rank, world)
            part = whole.contiguous()
            memory = torch.empty(part.nbytes, dtype=torch.uint8)
            tensor = memory.view(part.dtype).view(part.shape)
            digest = _native.digest_memory(part.data_ptr(), part.nbytes)
            self._targets.append(_Target(name, memory, tensor, digest))
            if mesh is None or saved.dim() == 0:
                self.state[name] = tensor
            else:
                self.state[name] = DTensor.from_local(
                    tensor, mesh, [Shard(0)], run_check=False, shape=saved.shape, stride=saved.stride()
                )

    @property
    def nbytes(self) -> int:
        return sum(target.memory.nbytes for target in self._targets)

    def forget(self) -> None:
        """Overwrites all of it."""
        for target in self._targets:
            target.memory.fill_(_STALE)

    def wrong(self) -> list[str]:
        """Names of tensors that do not hold, bit for bit, what was saved."""
        return [
            target.name
            for target in self._targets
            if _native.digest_memory(target.memory.data_ptr(), target.memory.nbytes) != target.digest
        ]


def _part(tensor: torch.Tensor, rank: int, world: int) -> torch.Tensor:
    """This rank's rows; none for the last ranks of a short tensor."""
    parts = torch.chunk(tensor, world)
    return parts[rank] if rank < len(parts) else tensor[:0]


def nbytes_of_rank(nbytes: int, layout: Layout, world: int) -> int:
    """About: what the targets of one rank take for a checkpoint of so many bytes."""
    return nbytes if layout == "replicated" else math.ceil(nbytes / world)
