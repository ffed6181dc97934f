"""The layout examples: saved by one, at one layout and number of ranks, continued by another, at another.

Invariants, all on exact losses (`float.hex`):
- at the layout that saved, a run that ended at step CUT and was continued by new processes has the losses of one that
  ran through, which saved and loaded nothing;
- at any other layout, the continued run has the losses of a run at that layout which got the very same state without
  snapstone: gathered by `get_state_dict(full_state_dict=True)`, stored by `torch.save`, and handed out by
  `set_model_state_dict(broadcast_from_rank0=True)`. Losses of different layouts are only close: dropout masks differ,
  and sums have another order.
"""

from __future__ import annotations

import functools
import gc
import importlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from distributed.ranks import Result, at_store, run_ranks, serve_store, values

EXAMPLES = Path(__file__).parents[2] / "examples"
CUT, END = 2, 6  # steps

Losses = dict[int, str]  # step -> float.hex()


@dataclass(frozen=True)
class Layout:
    """An example, and the sizes of its mesh."""

    example: str
    dp: int
    tp: int = 1

    @property
    def world_size(self) -> int:
        return self.dp * self.tp

    @property
    def options(self) -> list[str]:
        return ["--tp", str(self.tp)] if self.example == "fsdp2_tp" else []

    def __str__(self) -> str:
        return f"{self.example}-{self.dp}x{self.tp}"


DDP_2, DDP_4 = Layout("ddp", 2), Layout("ddp", 4)
FSDP_2, FSDP_4 = Layout("fsdp2", 2), Layout("fsdp2", 4)
TP_1X2, TP_2X1, TP_2X2 = Layout("fsdp2_tp", 1, 2), Layout("fsdp2_tp", 2, 1), Layout("fsdp2_tp", 2, 2)


@dataclass(frozen=True)
class Source:
    """What was saved at CUT, and the losses of a run that went on at the same layout."""

    checkpoints: Path
    full_state: Path
    losses: Losses


# In a rank ------------------------------------------------------------------------------------------------------------


def meet(rank: int, world_size: int, port: int) -> None:
    sys.path.insert(0, str(EXAMPLES))
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    os.environ.update(at_store(port), GLOO_SOCKET_IFNAME="lo")


def part() -> None:
    """Once nothing refers to the group any more: DDP's reducer may drop it last, and joins a thread of gloo while it
    holds the interpreter lock that this thread may want (torch 2.13).
    """
    gc.collect()
    dist.destroy_process_group()


def laid_out(layout: Layout) -> Any:
    device = importlib.import_module("group").join("cpu")
    example = importlib.import_module(layout.example)
    return example.laid_out(device, layout.tp) if layout.options else example.laid_out(device)


def run_example(layout: Layout, run: Path, steps: int) -> None:
    arguments = ["--dir", str(run), "--steps", str(steps), "--save-every", str(CUT), *layout.options]
    importlib.import_module(layout.example).main(arguments)


def straight(layout: Layout, full_state: Path) -> list[str]:
    """Losses of a run that is never interrupted; its whole state at CUT goes to a file, without snapstone."""
    job = laid_out(layout)
    losses = []
    while job.step < END:
        losses.append(job.train_step().hex())
        if job.step == CUT:
            gathered = get_state_dict(
                job.model, job.optimizer, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
            )
            if dist.get_rank() == 0:
                progress = {"position": job.position, "generator": job.generator.get_state()}
                torch.save((*gathered, progress), full_state)
    return losses


def handed_over(layout: Layout, full_state: Path) -> list[str]:
    """Losses of a run that begins with the state in that file."""
    job = laid_out(layout)
    model, optimizer, progress = torch.load(full_state, weights_only=True)
    if dist.get_rank() != 0:
        model, optimizer = {}, {}
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(job.model, model, options=options)
    set_optimizer_state_dict(job.model, job.optimizer, optimizer, options=options)
    job.step, job.position = CUT, progress["position"]
    job.generator.set_state(progress["generator"])
    return [job.train_step().hex() for _ in range(CUT, END)]


def _source(rank: int, layout: Layout, directory: Path, ports: list[int]) -> list[str]:
    meet(rank, layout.world_size, ports[0])
    run_example(layout, directory / "run", CUT)
    part()
    meet(rank, layout.world_size, ports[1])
    losses = straight(layout, directory / "full.pt")
    part()
    return losses


def _continue(rank: int, layout: Layout, run: Path, full_state: Path, ports: list[int]) -> list[str]:
    meet(rank, layout.world_size, ports[0])
    run_example(layout, run, END)
    part()
    meet(rank, layout.world_size, ports[1])
    losses = handed_over(layout, full_state)
    part()
    return losses


# Outside --------------------------------------------------------------------------------------------------------------


def on_ranks(layout: Layout, function: Callable[..., list[str]], *args: Any) -> list[Result]:
    """Calls `function(rank, layout, *args, ports)` on the layout's ranks, which meet twice."""
    stores = [serve_store() for _ in range(2)]
    ports = [store.port for store in stores]
    return run_ranks(layout.world_size, function, layout, *args, ports, store="none", timeout=30.0)


def printed(output: str) -> Losses:
    lines = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    return {line["step"]: line["loss"] for line in lines}


def numbered(losses: list[str], first: int) -> Losses:
    return dict(enumerate(losses, start=first))


def after_cut(losses: Losses) -> Losses:
    return {step: loss for step, loss in losses.items() if step > CUT}


@pytest.fixture(scope="module")
def source_of(tmp_path_factory: pytest.TempPathFactory) -> Any:
    @functools.cache
    def source_of(layout: Layout) -> Source:
        directory = tmp_path_factory.mktemp(str(layout))
        results = on_ranks(layout, _source, directory)
        losses = numbered(values(results)[0], first=1)
        assert len(set(losses.values())) == END  # it trains, and data and dropout vary
        assert printed(results[0].output) == {step: losses[step] for step in range(1, CUT + 1)}
        assert [path.name for path in (directory / "run").glob("step-*")] == [f"step-{CUT:08d}"]
        return Source(directory / "run", directory / "full.pt", losses)

    return source_of


@pytest.mark.parametrize("layout", [DDP_2, FSDP_2, TP_2X2], ids=str)
def test_a_run_continued_at_its_layout_has_the_losses_of_one_never_interrupted(
    source_of: Any, layout: Layout, tmp_path: Path
) -> None:
    """Under torchrun, as users start it."""
    source = source_of(layout)
    shutil.copytree(source.checkpoints, tmp_path / "run")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    command += [str(layout.world_size), str(EXAMPLES / f"{layout.example}.py"), *layout.options]
    command += ["--dir", str(tmp_path / "run"), "--steps", str(END), "--save-every", str(CUT)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)
    assert process.returncode == 0, process.stderr
    assert printed(process.stdout) == after_cut(source.losses)
    assert len(list((tmp_path / "run").glob("step-*"))) == END // CUT


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (DDP_2, DDP_4),
        (FSDP_4, FSDP_2),
        (FSDP_2, FSDP_4),
        (TP_2X2, TP_1X2),
        (TP_2X2, TP_2X1),
        (FSDP_4, TP_2X2),
        (TP_2X2, DDP_2),
        (DDP_2, TP_1X2),
    ],
    ids=str,
)
def test_a_run_continued_at_another_layout_has_the_losses_of_the_same_state_there(
    source_of: Any, before: Layout, after: Layout, tmp_path: Path
) -> None:
    source = source_of(before)
    shutil.copytree(source.checkpoints, tmp_path / "run")
    results = on_ranks(after, _continue, tmp_path / "run", source.full_state)
    reference = numbered(values(results)[0], first=CUT + 1)
    continued = printed(results[0].output)
    assert continued == reference
    for step, loss in after_cut(source.losses).items():
        assert abs(float.fromhex(continued[step]) - float.fromhex(loss)) < 0.1
