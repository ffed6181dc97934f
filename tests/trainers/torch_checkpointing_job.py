"""A small job with torch_checkpointing's own manager, run as a script by torchrun: it trains, is killed, and goes on.

torch_checkpointing_job.py killed --dir D    trains and dies within its second save, which its saver process writes
torch_checkpointing_job.py resumed --dir D   goes on from the first, and trains once more in one go
"""

from __future__ import annotations

import argparse
import json
import os
import signal
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch_checkpointing import CheckpointManager

import snapstone as ss
from snapstone.integrations.torch_checkpointing import StorageConfig

STEPS = 6
EVERY = 2


def manager_of(asynchronous: bool) -> CheckpointManager:
    config = CheckpointManager.Config
    made = config.with_async_save() if asynchronous else config.with_sync_save()
    made.storage_config = StorageConfig()
    return CheckpointManager(made)


class Job:
    def __init__(self) -> None:
        torch.manual_seed(5 + dist.get_rank())
        self.model = torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.Dropout(0.5), torch.nn.Linear(64, 16))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01)
        self.step = 0

    def state(self) -> dict[str, Any]:
        trained = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        return {"job": {**trained, "step": self.step, "rng": ss.capture_rng()}}

    def load(self, state: dict[str, Any]) -> None:
        job = state["job"]
        self.model.load_state_dict(job["model"])
        self.optimizer.load_state_dict(job["optimizer"])
        self.step = job["step"]
        ss.restore_rng(job["rng"])

    def train(self, steps: int, manager: CheckpointManager | None = None, directory: Path | None = None) -> None:
        while self.step < steps:
            self.model(torch.randn(4, 16)).square().mean().backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.step += 1
            if manager is not None and self.step % EVERY == 0:
                future = manager.save(f"{directory}/step-{self.step}", self.state())
                if future is not None:
                    future.result()

    def numbers(self) -> list[float]:
        moments = [entry["exp_avg"] for entry in self.optimizer.state.values()]
        return [
            float(number) for tensor in (*self.model.parameters(), *moments) for number in tensor.detach().flatten()
        ]


def killed(directory: Path) -> None:
    if dist.get_rank() == 0:  # for the saver process, which begins with the manager: one file in each save
        os.environ["SNAPSTONE_FAULT"] = "renameat2:2:kill"
    manager = manager_of(asynchronous=True)
    try:
        Job().train(STEPS, manager, directory)
    finally:
        os.kill(os.getpid(), signal.SIGKILL)


def resumed(directory: Path) -> None:
    manager = manager_of(asynchronous=False)
    job = Job()
    job.load(manager.load(f"{directory}/step-2", {"job": None}))
    at = job.step
    job.train(STEPS, manager, directory)
    straight = Job()
    straight.train(STEPS)
    found = {"at": at, "same": job.numbers() == straight.numbers()}
    (directory / f"result-{dist.get_rank()}.json").write_text(json.dumps(found))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=["killed", "resumed"])
    parser.add_argument("--dir", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    {"killed": killed, "resumed": resumed}[options.what](options.dir)


if __name__ == "__main__":
    main()
