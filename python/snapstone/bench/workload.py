"""What is being checkpointed: a training loop whose optimizer really steps, or its state alone.

The state is one flat dictionary of tensors, the same objects from save to save, changed in place: parameters as
"model.NAME", Adam's tensors as "optimizer.NAME.SLOT", DTensors where the layout shards them.
"""

from __future__ import annotations

import hashlib
import time
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from .layout import Layout, device_of
from .models import Precision, build, shape_of
from .optimizer import ByteStep, MasterAdamW, local

__all__ = ["ADDED", "Plan", "Workload", "digests", "local_nbytes"]

ADDED = "model.added.weight"  # the tensor that changes the plan
_DIGEST_BYTES = 16


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything that makes a workload; the same plan makes the same names, shapes and shards in any process."""

    model: str
    precision: Precision
    fsdp: int
    tp: int
    device: str  # "cpu" or "cuda"
    local_rank: int
    state_only: bool
    step_seconds: float  # of the stand-in for computing, with state_only
    batch: int
    length: int
    seed: int


class Workload:
    """One rank's part. Needs a process group.

    Raises:
        ValueError: a layout that the ranks or the model do not allow.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.shape = shape_of(plan.model)
        self.rank = dist.get_rank()
        self.layout = Layout.of(dist.get_world_size(), plan.fsdp, plan.tp, self.shape.key_heads)
        self.device = device_of(plan.device, plan.local_rank)
        model = build(self.shape)
        if plan.precision == "bf16":
            model = model.to(torch.bfloat16)
        self.layout.shard(model, plan.device)
        model = model.to_empty(device=self.device)
        self._names = {parameter: name for name, parameter in model.named_parameters()}
        self._initialise()
        self.optimizer: torch.optim.Optimizer
        if plan.state_only:
            self.optimizer = ByteStep(model.parameters(), plan.precision)
        elif plan.precision == "bf16":
            self.optimizer = MasterAdamW(model.parameters())
        else:
            self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        self._model: Any = model
        if not plan.state_only and self.layout.wraps:
            self._model = DistributedDataParallel(model)
        self._tokens = torch.Generator().manual_seed(plan.seed + 1 + self.layout.data_share(self.rank))
        if not plan.state_only:
            self.compute()
            self.update()  # Adam's tensors exist from the first step on
        self.state = self._flat()
        if plan.state_only:
            self.fill()

    @torch.no_grad()
    def _initialise(self) -> None:
        """Norms are 1, matrices small and random."""
        for parameter, name in self._names.items():
            if parameter.dim() == 1:
                local(parameter).fill_(1.0)
            else:
                self._randomise(name, parameter)

    def _randomise(self, name: str, tensor: Tensor) -> None:
        """By seed, name and place on the mesh, so that replicas get the same numbers and shards others."""
        place: list[int] = []
        if isinstance(tensor, DTensor):
            coordinate = tensor.device_mesh.get_coordinate() or ()
            place = [at for at, how in zip(coordinate, tensor.placements, strict=True) if not how.is_replicate()]
        seed = zlib.crc32(f"{self.plan.seed} {name} {place}".encode())
        piece = local(tensor)
        piece.uniform_(-0.05, 0.05, generator=torch.Generator(piece.device).manual_seed(seed))

    def _flat(self) -> dict[str, Tensor]:
        state: dict[str, Tensor] = {}
        for parameter, name in self._names.items():
            state[f"model.{name}"] = parameter.detach()
            for slot, tensor in self.optimizer.state[parameter].items():
                state[f"optimizer.{name}.{slot}"] = tensor
        return state

    def compute(self) -> None:
        """Everything of a step that leaves the state alone: forward and backward, or a pause that ranks end together.

        With state_only the pause stands for work on an accelerator: this process has nothing to do, and waits.
        """
        if self.plan.state_only:
            time.sleep(self.plan.step_seconds)
            if self.layout.world > 1:
                dist.all_reduce(torch.zeros(1, device=self.device))
            return
        size = (self.plan.batch, self.plan.length + 1)
        tokens = torch.randint(self.shape.vocabulary, size, generator=self._tokens).to(self.device)
        logits = self._model(tokens[:, :-1])
        F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten()).backward()  # type: ignore[no-untyped-call]

    def update(self) -> None:
        """The optimizer's step: every tensor of the state changes."""
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def synchronize(self) -> None:
        """Waits for the step, so that a clock read next has it in it; not for copies that run beside it."""
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()

    def change_plan(self, on: bool) -> None:
        """Adds a tensor to the state, or takes it away again: what ranks agreed on before no longer holds."""
        if on:
            self.state[ADDED] = torch.full((1024,), 0.5, device=self.device)
        else:
            del self.state[ADDED]

    def blank(self) -> dict[str, Tensor]:
        """Tensors like those of the state, filled with ones, to load into."""
        return {name: torch.ones_like(tensor) for name, tensor in self.state.items()}

    @torch.no_grad()
    def fill(self) -> None:
        """Random numbers by seed, name and place: the same state in every process with the same plan and layout."""
        for name, tensor in self.state.items():
            self._randomise(name, tensor)

    @property
    def nbytes(self) -> int:
        """Of one checkpoint: every tensor once, however many ranks hold it."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.state.values())


def local_nbytes(state: Mapping[str, Tensor]) -> int:
    """Bytes that this rank holds of `state`."""
    return sum(local(tensor).nbytes for tensor in state.values())


def digests(state: Mapping[str, Tensor]) -> dict[str, str]:
    """BLAKE2b-128 of this rank's bytes of every tensor: an independent copy of the state, for comparing bit for bit."""
    found: dict[str, str] = {}
    for name, tensor in state.items():
        piece = local(tensor.detach()).cpu().contiguous().flatten().view(torch.uint8)
        found[name] = hashlib.blake2b(piece.numpy().data, digest_size=_DIGEST_BYTES).hexdigest()
    return found
