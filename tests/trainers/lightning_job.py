"""A small Lightning job, run as a script by one process or by torchrun: it trains, is killed, and goes on.

Dropout uses the random generators, data comes from a loader that saves its position, and the scheduler keeps a Counter.

    lightning_job.py killed --strategy ddp --dir D    trains and dies within its second save
    lightning_job.py resumed --strategy ddp --dir D   goes on from there, and trains once more without a break
    lightning_job.py resharded --strategy mp --dir D  goes on from there in one process, in other ways
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy as StockStrategy
from torch.distributed import fsdp

import snapstone as ss
from snapstone import _native
from snapstone.integrations.lightning import CheckpointIO, FSDPStrategy, ModelParallelStrategy, export

STEPS = 7
EVERY = 2
FAULT = "renameat2:2:kill"  # in place of the commit of the second save


class OnCpu(fsdp.FullyShardedDataParallel):
    """FSDP1 runs on the CPU when it is told to; Lightning does not tell it, as it wants a GPU there."""

    def __init__(self, module: torch.nn.Module, *args: Any, **kwargs: Any) -> None:
        super().__init__(module, *args, **{**kwargs, "device_id": torch.device("cpu")})


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
            fsdp.fully_shard(self.net, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch: torch.Tensor, index: int) -> torch.Tensor:
        loss = self.net(batch).square().mean()
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.01)
        return [optimizer], [torch.optim.lr_scheduler.MultiStepLR(optimizer, [1, 2])]


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


class AtStart(Callback):
    """What the module is when training begins or goes on, and at each step."""

    def __init__(self) -> None:
        self.digests: dict[int, str] = {}
        self.whole: dict[str, torch.Tensor] = {}
        self.momenta: dict[str, torch.Tensor] = {}

    def on_train_start(self, trainer: pl.Trainer, module: Module) -> None:
        self.digests[trainer.global_step] = digest(module)
        self.whole = {name: whole(tensor) for name, tensor in module.state_dict().items()}
        state = trainer.optimizers[0].state
        names = {parameter: name for name, parameter in module.named_parameters()}
        self.momenta = {names[parameter]: whole(entry["exp_avg"]) for parameter, entry in state.items()}

    def on_train_batch_end(self, trainer: pl.Trainer, module: Module, *_: Any) -> None:
        self.digests[trainer.global_step] = digest(module)
        if trainer.global_step == EVERY + 1:
            ss.wait()  # so that the commit that is killed is the second save's


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


def trainer_of(strategy: str, directory: Path, steps: int, callback: Callback) -> pl.Trainer:
    how: dict[str, Any] = {"plugins": [CheckpointIO()]}
    sizes = {"data_parallel_size": world_size(), "tensor_parallel_size": 1}
    if strategy == "ddp":
        how["strategy"] = "ddp"
    if strategy == "mp":
        how = {"strategy": ModelParallelStrategy(**sizes)}
    if strategy == "fsdp":
        fsdp.FullyShardedDataParallel = OnCpu  # type: ignore[misc]
        how = {"strategy": FSDPStrategy()}
    if strategy == "stock":
        how = {"strategy": StockStrategy(**sizes)}
    saving = ModelCheckpoint(
        dirpath=directory, filename="{step}", every_n_train_steps=EVERY, save_top_k=-1, save_last="link"
    )
    return pl.Trainer(
        accelerator="cpu",
        devices=world_size(),
        max_steps=steps,
        logger=False,
        callbacks=[saving, callback],
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        **how,
    )


def digest(module: torch.nn.Module) -> str:
    hashed = hashlib.sha256()
    for name, tensor in sorted(module.named_parameters()):
        local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
        hashed.update(name.encode() + local.detach().contiguous().numpy().tobytes())
    return hashed.hexdigest()


def train(
    strategy: str, directory: Path, resume: str | Path | None = None, steps: int = STEPS
) -> tuple[str, Batches, AtStart]:
    rank = int(os.environ.get("RANK", "0"))
    torch.manual_seed(7)
    module = Module(shard=strategy in ("mp", "stock"))
    pl.seed_everything(70 + rank, verbose=False)
    batches = Batches(5)
    watch = AtStart()
    trainer_of(strategy, directory, steps, watch).fit(module, batches, ckpt_path=resume)
    return digest(module), batches, watch


def resumed(strategy: str, directory: Path) -> None:
    rank = int(os.environ.get("RANK", "0"))
    state, batches, _ = train(strategy, directory / "run", "last")
    straight, _, watch = train(strategy, directory / "straight")
    found = {"resumed": state, "straight": straight, "straight_at_2": watch.digests[2]}
    found["loaded_rank"] = batches.loaded_rank
    if strategy == "mp":
        stock, _, _ = train("stock", directory / "stock", steps=2)
        _, _, watch = train("mp", directory / "from-stock", directory / "stock" / "step=2.ckpt", steps=3)
        found |= {"stock": stock, "from_stock": watch.digests[2]}
    (directory / f"result-{rank}.json").write_text(json.dumps(found))


def resharded(strategy: str, directory: Path) -> None:
    path = directory / "run" / "step=4.ckpt"
    expected = CheckpointIO().load_checkpoint(path)
    model, (optimizer,) = expected["state_dict"], expected["optimizer_states"]
    momenta = dict(zip(model, (optimizer["state"][number]["exp_avg"] for number in range(len(model))), strict=True))

    def check(watch: AtStart) -> None:
        assert watch.whole.keys() == model.keys()
        assert watch.momenta.keys() == momenta.keys()
        assert all(torch.equal(watch.whole[name], model[name]) for name in model)
        assert all(torch.equal(watch.momenta[name], momenta[name]) for name in momenta)

    check(train("single", directory / "single", path, steps=5)[2])
    if strategy == "fsdp":
        return
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        _, batches, watch = train("mp", directory / "one", path, steps=5)
    assert any("seeded anew" in str(one.message) for one in caught), "the generators are of other ranks"
    assert batches.loaded_rank == 0
    check(watch)
    export(path, directory / "back.ckpt")
    _, _, back = train("stock", directory / "back", directory / "back.ckpt", steps=5)
    check(back)
    _, _, stock = train("mp", directory / "of-stock", directory / "stock" / "step=2.ckpt", steps=3)
    assert all(torch.isfinite(tensor).all() for tensor in stock.momenta.values())


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=["killed", "resumed", "resharded"])
    parser.add_argument("--strategy", choices=["single", "ddp", "mp", "fsdp"], required=True)
    parser.add_argument("--dir", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.what == "killed":
        if os.environ.get("RANK", "0") == "0":
            _native.fault_arm(FAULT)
        train(options.strategy, options.dir / "run")
    elif options.what == "resumed":
        resumed(options.strategy, options.dir)
    else:
        resharded(options.strategy, options.dir)


if __name__ == "__main__":
    main()
