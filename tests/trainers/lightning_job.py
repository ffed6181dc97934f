"""A small Lightning job, run as a script by one process or by torchrun: it trains, is killed, and goes on.

Dropout uses the random generators, data comes from a loader that saves its position, and the scheduler keeps a Counter.

    lightning_job.py killed --strategy ddp --dir D    trains and dies within its second save
    lightning_job.py resumed --strategy ddp --dir D   goes on from there, trains once more without a break, compares
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

STEPS = 7
EVERY = 2
FAULT = "renameat2:2:kill"  # in place of the commit of the second save

if __name__ == "__main__" and sys.argv[1] == "killed" and os.environ.get("RANK", "0") == "0":
    os.environ["SNAPSTONE_FAULT"] = FAULT

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.distributed.fsdp import fully_shard

from snapstone.integrations.lightning import CheckpointIO, ModelParallelStrategy


class Batches:
    """Batches of a rank, made from their number; knows where it is."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.at = 0

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[torch.Tensor]:
        while self.at < self.count:
            self.at += 1
            rank = int(os.environ.get("RANK", "0"))
            yield torch.randn(4, 16, generator=torch.Generator().manual_seed(1000 * rank + self.at))
        self.at = 0

    def state_dict(self) -> dict[str, Any]:
        return {"at": self.at, "rank": int(os.environ.get("RANK", "0"))}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.at = state["at"]
        self.loaded_rank = state["rank"]


class Module(pl.LightningModule):
    def __init__(self, width: int = 32, name: str = "job", shard: bool = False) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = torch.nn.Sequential(
            torch.nn.Linear(16, width), torch.nn.Dropout(0.5), torch.nn.ReLU(), torch.nn.Linear(width, 16)
        )

    def configure_model(self) -> None:
        if self.hparams.shard and not hasattr(self.net[0].weight, "placements"):
            fully_shard(self.net, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch: torch.Tensor, index: int) -> torch.Tensor:
        loss = self.net(batch).square().mean()
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.01)
        return [optimizer], [torch.optim.lr_scheduler.MultiStepLR(optimizer, [1, 2])]


def trainer_of(strategy: str, directory: Path, steps: int = STEPS, **options: Any) -> pl.Trainer:
    world = int(os.environ.get("WORLD_SIZE", "1"))
    how: dict[str, Any] = {"plugins": [CheckpointIO()]}
    if strategy == "ddp":
        how["strategy"] = "ddp"
    if strategy == "mp":
        how = {"strategy": ModelParallelStrategy(data_parallel_size=world, tensor_parallel_size=1)}
    callback = ModelCheckpoint(
        dirpath=directory, filename="{step}", every_n_train_steps=EVERY, save_top_k=-1, save_last="link"
    )
    return pl.Trainer(
        accelerator="cpu",
        devices=world,
        max_steps=steps,
        logger=False,
        callbacks=[callback],
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        **{**how, **options},
    )


def digest(module: torch.nn.Module) -> str:
    hashed = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
        hashed.update(name.encode() + local.detach().contiguous().numpy().tobytes())
    return hashed.hexdigest()


def train(strategy: str, directory: Path, resume: str | None = None) -> tuple[str, Batches]:
    pl.seed_everything(7 + int(os.environ.get("RANK", "0")), verbose=False)
    torch.manual_seed(7)
    module = Module(shard=strategy == "mp")
    torch.manual_seed(70 + int(os.environ.get("RANK", "0")))
    batches = Batches(5)
    trainer_of(strategy, directory).fit(module, batches, ckpt_path=resume)
    return digest(module), batches


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=["killed", "resumed"])
    parser.add_argument("--strategy", choices=["single", "ddp", "mp"], required=True)
    parser.add_argument("--dir", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.what == "killed":
        train(options.strategy, options.dir / "run")
        return
    resumed, batches = train(options.strategy, options.dir / "run", "last")
    straight, _ = train(options.strategy, options.dir / "straight")
    rank = int(os.environ.get("RANK", "0"))
    found = {"resumed": resumed, "straight": straight, "loaded_rank": batches.loaded_rank, "rank": rank}
    (options.dir / f"result-{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
