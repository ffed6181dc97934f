"""One rank's training run: model and optimizer sharded over the ranks, its data, its generators, and their state.

A resumed run continues bit for bit only if every one of these comes back: weights, Adam moments, schedule, step,
and, for each rank on its own, the position in the data and three random generators.
"""

from __future__ import annotations

import hashlib
import math
import random
import time
from typing import Any, Self

import numpy as np
import torch
import torch.nn.functional as F
from backends import State
from corpus import Batches
from gpt import Gpt, GptConfig
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

SEED = 20260


def sharded_gpt(config: GptConfig, mesh: DeviceMesh) -> Gpt:
    """The same initial weights on every rank, of which each keeps its share."""
    torch.manual_seed(SEED)
    model = Gpt(config)
    for block in model.blocks:
        fully_shard(block, mesh=mesh, reshard_after_forward=False)
    fully_shard(model, mesh=mesh)
    return model


class TimedAdamW(torch.optim.AdamW):
    """Knows when its update began. What lies between calling step() and that was spent in pre-step hooks, which is
    where a save with `fence=optimizer` makes training wait."""

    began = 0.0

    def step(self, closure: Any = None) -> Any:
        self.began = time.perf_counter()
        return super().step(closure)

    @classmethod
    def of(cls, model: Gpt, learning_rate: float) -> Self:
        return cls(model.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.1, fused=True)


class Trainer:
    def __init__(
        self, model: Gpt, batches: Batches, *, steps: int, warmup_steps: int, learning_rate: float, rank: int
    ) -> None:
        self.model = model
        self.batches = batches
        self.rank = rank
        self.step = 0
        self.optimizer = TimedAdamW.of(model, learning_rate)
        self.hook_s = 0.0  # what the latest step waited in pre-step hooks

        def rate(step: int) -> float:
            if step < warmup_steps:
                return (step + 1) / warmup_steps
            return 0.55 + 0.45 * math.cos(math.pi * (step - warmup_steps) / max(1, steps - warmup_steps))

        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, rate)
        for seed in (torch.manual_seed, np.random.seed, random.seed):
            seed(SEED + 1 + rank)

    def train_step(self) -> float:
        """One step; returns this rank's loss in nats per byte, before the update."""
        inputs, targets = self.batches.next()
        loss = F.cross_entropy(self.model(inputs).flatten(0, 1), targets.flatten())
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        started = time.perf_counter()
        self.optimizer.step()
        self.hook_s = self.optimizer.began - started
        self.optimizer.zero_grad()
        self.schedule.step()
        self.step += 1
        return loss.item()

    def state(self) -> State:
        """References to the live weights and moments, no copies; what differs per rank has the rank in its name."""
        weights, moments = get_state_dict(self.model, self.optimizer)
        return {
            "model": weights,
            "optimizer": moments,
            "schedule": self.schedule.state_dict(),
            "progress": {"step": self.step},
            f"rank-{self.rank}": {"position": self.batches.position, "generators": capture_generators()},
        }

    def adopt(self, state: State) -> None:
        """Continue from `state`, which was made by state() and then filled by a load."""
        set_state_dict(self.model, self.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.step = state["progress"]["step"]
        own = state[f"rank-{self.rank}"]
        self.batches.position = own["position"]
        restore_generators(own["generators"])


def capture_generators() -> State:
    """torch, NumPy and Python generators as tensors and plain numbers, so that no engine needs pickle for them."""
    _, keys, index, has_gauss, gauss = np.random.get_state(legacy=True)
    version, words, python_gauss = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "numpy": {
            "keys": torch.from_numpy(np.asarray(keys).astype(np.int64)),
            "index": int(index),
            "has_gauss": int(has_gauss),
            "gauss": float(gauss),
        },
        "python": {"version": version, "words": torch.tensor(words, dtype=torch.int64), "gauss": python_gauss},
    }


def restore_generators(state: State) -> None:
    torch.set_rng_state(state["torch"])
    numpy = state["numpy"]
    keys = numpy["keys"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", keys, numpy["index"], numpy["has_gauss"], numpy["gauss"]))
    python = state["python"]
    random.setstate((python["version"], tuple(python["words"].tolist()), python["gauss"]))


def local_digest(state: Any) -> str:
    """SHA-256 over the local bytes of every tensor in nested dicts, with their names, in the order of the names."""
    digest = hashlib.sha256()

    def visit(name: str, value: Any) -> None:
        if isinstance(value, dict):
            for key in sorted(value, key=str):
                visit(f"{name}/{key}", value[key])
        elif isinstance(value, torch.Tensor):
            local = value.to_local() if isinstance(value, DTensor) else value
            digest.update(name.encode())
            digest.update(local.detach().contiguous().flatten().view(torch.uint8).numpy().data)

    visit("", state)
    return digest.hexdigest()


def weights_digest(model: torch.nn.Module) -> str:
    """SHA-256 of the whole weights, sharded or not. A collective when they are sharded."""
    whole = {
        name: value.full_tensor() if isinstance(value, DTensor) else value for name, value in model.state_dict().items()
    }
    return local_digest(whole)
