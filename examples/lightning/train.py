"""The shortest Lightning job that saves through the engine, and goes on where it stopped.

python examples/lightning/train.py --dir run --steps 20
python examples/lightning/train.py --dir run --steps 40                                        # goes on at step 20
torchrun --nproc-per-node 2 examples/lightning/train.py --dir sharded --steps 20 --shard       # FSDP2
torchrun --nproc-per-node 1 examples/lightning/train.py --dir sharded --steps 40 --shard       # on one process
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.distributed.fsdp import fully_shard

from snapstone.integrations.lightning import CheckpointIO, ModelParallelStrategy


class Numbers:
    """Batches with a position, which Lightning saves with the rest."""

    def __init__(self) -> None:
        self.at = 0

    def __iter__(self) -> Iterator[torch.Tensor]:
        while True:
            self.at += 1
            yield torch.randn(16, 32, generator=torch.Generator().manual_seed(self.at))

    def state_dict(self) -> dict[str, int]:
        return {"at": self.at - 1}  # without a length Lightning fetches one batch ahead

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.at = state["at"]


class Model(pl.LightningModule):
    def __init__(self, shard: bool = False) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.layers = torch.nn.Sequential(torch.nn.Linear(32, 256), torch.nn.Dropout(0.1), torch.nn.Linear(256, 32))

    def configure_model(self) -> None:
        if self.hparams.shard:
            fully_shard(self.layers, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch: torch.Tensor, index: int) -> torch.Tensor:
        loss = (self.layers(batch) - batch).square().mean()
        print(f"step {self.global_step + 1} loss {loss.item():.6f}")
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", required=True)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--shard", action="store_true")
    options = parser.parse_args()
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    pl.seed_everything(1, verbose=False)
    how: dict[str, Any] = {"plugins": [CheckpointIO()]}
    if options.shard:
        how = {"strategy": ModelParallelStrategy(data_parallel_size=ranks, tensor_parallel_size=1)}
    saving = ModelCheckpoint(dirpath=options.dir, every_n_train_steps=10, save_top_k=0, save_last=True)
    trainer = pl.Trainer(
        devices=ranks,
        max_steps=options.steps,
        callbacks=[saving],
        logger=False,
        enable_progress_bar=False,
        use_distributed_sampler=False,
        **how,
    )
    trainer.fit(Model(shard=options.shard), Numbers(), ckpt_path="last")


if __name__ == "__main__":
    main()
