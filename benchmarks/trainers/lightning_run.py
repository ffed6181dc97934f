"""Step time and stall of a Lightning run, with Lightning's checkpoint plugins and with snapstone's, in one run.

    python benchmarks/trainers/lightning_run.py            # about four minutes on two cores
    python benchmarks/trainers/lightning_run.py --quick    # tiny sizes, one round: shows that it works, not how fast

One process trains one model with one Trainer. It trains in blocks of a few steps; at the beginning of each the state is
saved, through the plugin whose turn it is, and at the end the save is waited for. The order rotates every round, so
that all of them meet the machine in the same moods. "none" saves nothing. Lightning's plugins do not sync what they
write; that of snapstone returns from a save when the snapshot is taken, and has synced everything when it has ended.

Writes one JSON, with every sample: of each block the stall (seconds in `save_checkpoint`), its steps, and the wait for
what was left of the save.
"""

from __future__ import annotations

import argparse
import datetime
import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.plugins import AsyncCheckpointIO

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import machine  # noqa: E402

import snapstone  # noqa: E402
from snapstone.integrations.lightning import CheckpointIO  # noqa: E402

THEME = "lightning"
SETTINGS = ("rounds", "steps", "width", "batch")
CONTENDERS: dict[str, tuple[str, Callable[[], Any] | None]] = {
    "none": ("no checkpoints", None),
    "stock": ("Lightning, TorchCheckpointIO", TorchCheckpointIO),
    "stock-async": ("Lightning, AsyncCheckpointIO", lambda: AsyncCheckpointIO(TorchCheckpointIO())),
    "snapstone": ("snapstone CheckpointIO", CheckpointIO),
}


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--directory", type=Path, default=HERE.parents[1] / "build" / "bench", help="on the disk to use"
    )
    parser.add_argument("--results", type=Path, default=HERE.parent / "results", help="where the JSON goes")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=8, help="in a block")
    parser.add_argument("--width", type=int, default=2048, help="of each of eight layers")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args(arguments)
    plain = parser.parse_args([])
    options.command = "python benchmarks/trainers/lightning_run.py" + (" --quick" if options.quick else "")
    for name in SETTINGS:
        if getattr(options, name) != getattr(plain, name):
            options.command += f" --{name} {getattr(options, name)}"
    if options.quick:
        options.rounds, options.steps, options.width, options.batch = 1, 2, 64, 8
    return options


class Model(pl.LightningModule):
    def __init__(self, width: int) -> None:
        super().__init__()
        layers = [layer for _ in range(8) for layer in (torch.nn.Linear(width, width), torch.nn.GELU())]
        self.layers = torch.nn.Sequential(*layers)

    def training_step(self, batch: torch.Tensor, index: int) -> torch.Tensor:
        return (self.layers(batch) - batch).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-4)


class Batches:
    def __init__(self, count: int, batch: int, width: int) -> None:
        self.count = count
        self.batch = torch.randn(batch, width)

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[torch.Tensor]:
        return iter([self.batch] * self.count)


class Blocks(pl.Callback):
    """Saves at the beginning of each block and waits at its end; the first block only warms up."""

    def __init__(self, rounds: int, steps: int, directory: Path) -> None:
        names = list(CONTENDERS)
        turns = [names[turn % len(names) :] + names[: turn % len(names)] for turn in range(rounds)]
        self.turns = [*names, *(name for turn in turns for name in turn)]
        self.warm_up = len(names)
        self.steps = steps
        self.directory = directory
        self.samples: dict[str, dict[str, list[Any]]] = {
            name: {"stall_seconds": [], "step_seconds": [], "drain_seconds": []} for name in names
        }
        self.nbytes = 0
        self._begin = 0.0
        self._stall = 0.0
        self._seconds: list[float] = []

    @property
    def total_steps(self) -> int:
        return len(self.turns) * self.steps + 1  # one step before the first save: optimizers are empty until then

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, index: int) -> None:
        if index and (index - 1) % self.steps == 0:
            self._save(trainer, (index - 1) // self.steps)
        self._begin = time.perf_counter()

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, out: Any, batch: Any, i: int) -> None:
        self._seconds.append(time.perf_counter() - self._begin)
        if i and i % self.steps == 0:
            self._drain(trainer, (i - 1) // self.steps)

    def _save(self, trainer: pl.Trainer, block: int) -> None:
        self._seconds = []
        make = CONTENDERS[self.turns[block]][1]
        begin = time.perf_counter()
        if make is not None:
            trainer.strategy.checkpoint_io = make()
            begin = time.perf_counter()
            trainer.save_checkpoint(self.directory / f"block-{block}.ckpt", weights_only=False)
        self._stall = time.perf_counter() - begin

    def _drain(self, trainer: pl.Trainer, block: int) -> None:
        begin = time.perf_counter()
        trainer.strategy.checkpoint_io.teardown()
        drain = time.perf_counter() - begin
        path = self.directory / f"block-{block}.ckpt"
        name = self.turns[block]
        if path.is_dir():
            self.nbytes = snapstone.Checkpoint.open(path).nbytes
            shutil.rmtree(path)
        elif name != "none":
            path.unlink()
        trainer.strategy.checkpoint_io = TorchCheckpointIO()
        if block >= self.warm_up:
            found = self.samples[name]
            found["stall_seconds"].append(round(self._stall, 6))
            found["step_seconds"].append([round(seconds, 6) for seconds in self._seconds])
            found["drain_seconds"].append(round(drain, 6))


def measure(options: argparse.Namespace, directory: Path) -> dict[str, Any]:
    pl.seed_everything(1, verbose=False)
    blocks = Blocks(options.rounds, options.steps, directory)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=1,
        logger=False,
        callbacks=[blocks],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Model(options.width), Batches(blocks.total_steps, options.batch, options.width))
    contenders = {name: {"label": CONTENDERS[name][0], "samples": found} for name, found in blocks.samples.items()}
    return {"state_bytes": blocks.nbytes, "contenders": contenders}


def table(document: dict[str, Any]) -> str:
    lines = [f"{'':30}{'stall ms':>12}{'step ms':>12}{'block s':>12}"]
    for entry in document["contenders"].values():
        samples = entry["samples"]
        stall = statistics.median(samples["stall_seconds"])
        step = statistics.median(seconds for block in samples["step_seconds"] for seconds in block)
        parts = zip(samples["stall_seconds"], samples["step_seconds"], samples["drain_seconds"], strict=True)
        whole = statistics.median(stall + sum(steps) + drain for stall, steps, drain in parts)
        lines.append(f"{entry['label']:30}{1e3 * stall:12.1f}{1e3 * step:12.1f}{whole:12.2f}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    options.directory.mkdir(parents=True, exist_ok=True)
    now = datetime.datetime.now(datetime.UTC)
    document: dict[str, Any] = {
        "theme": THEME if not options.quick else f"quick-{THEME}",
        "date": now.isoformat(timespec="seconds"),
        "command": options.command,
        "snapstone": snapstone.__version__,
        "lightning": machine.version_of("lightning"),
        "machine": {**machine.facts(), "file_system": machine.file_system(options.directory)},
        "settings": {name: getattr(options, name) for name in SETTINGS},
    }
    with tempfile.TemporaryDirectory(prefix="lightning-", dir=options.directory) as directory:
        document |= measure(options, Path(directory))
    options.results.mkdir(parents=True, exist_ok=True)
    path = options.results / f"{document['theme']}_{machine.cpu_slug()}_{now:%Y%m%d}.json"
    path.write_text(json.dumps(document, indent=1) + "\n")
    print(table(document))
    print(path)


if __name__ == "__main__":
    main()
