"""The training job of ddp.py, fsdp2.py and fsdp2_tp.py: model, optimizer, data and step, the same in every layout.

Its state has the same names and global shapes however the model is laid out over the ranks, so each of the three
continues what any of them saved, on any number of ranks.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from corpus import read_corpus
from gpt import Gpt, GptConfig
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

import snapstone as ss

CONFIG = GptConfig(layers=2, heads=4, width=64, context=32, dropout=0.05)
CORPUS_BYTES = 200_000
ROWS = 8  # of all ranks together, so that the data do not depend on the layout
SEED = 1


def new_model(device: torch.device) -> Gpt:
    """The same weights on every rank."""
    torch.manual_seed(SEED)
    return Gpt(CONFIG).to(device)


class Job:
    """Trains `model` on part number `share` of each batch, which is cut into `shares` parts.

    All randomness comes from one generator, which is alike on all ranks and therefore means the same in any layout: it
    draws the rows of a batch and the seed of the dropout masks.
    """

    def __init__(self, model: nn.Module, device: torch.device, *, share: int, shares: int) -> None:
        if ROWS % shares:
            raise ValueError(f"{ROWS} rows of a batch do not divide into {shares} parts")
        self.model = model
        # foreach=False: a group of parameters may be spread over different meshes, in fsdp2_tp.py.
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, foreach=False)
        self.device = device
        self.rows = slice(share * ROWS // shares, (share + 1) * ROWS // shares)
        self.share = share
        self.text = torch.frombuffer(bytearray(read_corpus(CORPUS_BYTES)), dtype=torch.uint8)
        self.step = 0
        self.position = 0
        self.generator = torch.Generator().manual_seed(SEED)

    def train_step(self) -> float:
        """One step; returns the mean loss of the whole batch before it, in nats per byte, the same on every rank."""
        inputs, targets = self.next_batch()
        torch.manual_seed(int(torch.randint(1 << 62, (), generator=self.generator)) + self.share)
        loss = F.cross_entropy(self.model(inputs).flatten(0, 1), targets.flatten())
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        mean = loss.detach() / dist.get_world_size()
        dist.all_reduce(mean)
        return mean.item()

    def next_batch(self) -> tuple[Tensor, Tensor]:
        """This rank's inputs and targets, int64, each of shape (rows, context); targets are one byte later."""
        starts = self.position + torch.randint(len(self.text), (ROWS,), generator=self.generator)
        self.position += ROWS * CONFIG.context
        offsets = (starts[self.rows, None] + torch.arange(CONFIG.context + 1)) % len(self.text)
        window = self.text[offsets].long().to(self.device)
        return window[:, :-1].contiguous(), window[:, 1:].contiguous()

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds: references to the live tensors, under names that no wrapper of the model changes."""
        model, optimizer = get_state_dict(self.model, self.optimizer)
        progress = {"step": self.step, "position": self.position, "generator": self.generator.get_state()}
        return {"model": model, "optimizer": optimizer, "progress": progress}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a `state_dict()` that a load has filled."""
        set_state_dict(self.model, self.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
        progress = state["progress"]
        self.step, self.position = progress["step"], progress["position"]
        self.generator.set_state(progress["generator"])


def arguments(description: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, required=True, help="where the checkpoints are; resumes from the newest")
    parser.add_argument("--steps", type=int, default=8, help="the last step")
    parser.add_argument("--save-every", type=int, default=4, help="steps")
    return parser


def checkpoint_path(run: Path, step: int) -> Path:
    return run / f"step-{step:08d}"


def newest_checkpoint(run: Path) -> Path | None:
    """The newest checkpoint that verifies. One rank decides, or ranks might resume from different ones."""
    chosen: list[Path | None] = [None]
    if dist.get_rank() == 0:
        paths = sorted(run.glob("step-*"), reverse=True)
        chosen[0] = next((path for path in paths if ss.verify(path, level="quick")), None)
        print(f"resuming from {chosen[0]}" if chosen[0] else "a new run", file=sys.stderr)
    dist.broadcast_object_list(chosen)
    return chosen[0]


def report(step: int, loss: float) -> None:
    """One line of JSON from rank 0; the loss as an exact hexadecimal float."""
    if dist.get_rank() == 0:
        print(json.dumps({"step": step, "loss": loss.hex()}), flush=True)
