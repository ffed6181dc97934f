"""One rank of torchtitan_run.py: the real trainer, whose checkpoint manager is another one in each block."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parent))

from interleaved import BASELINE, Block, order
from torchtitan.components.checkpointer import CheckpointManager

from snapstone.integrations.torchtitan import SnapstoneCheckpointManager

MODES = ("disabled", "async")


def measure(trainer: Any) -> None:
    """Before the job's own training, of which nothing is left: blocks, and their times in the file of the job."""
    job = json.loads(os.environ["SNAPSTONE_BENCH_JOB"])
    disabled = trainer.checkpointer
    managers = {BASELINE: disabled}
    for name, kind in (("torchtitan", CheckpointManager), ("snapstone", SnapstoneCheckpointManager)):
        for mode in MODES:
            managers[f"{name}, {mode}"] = _manager(trainer, kind, mode, Path(job["directory"], f"{name}-{mode}"))
    data = trainer.batch_generator(trainer.dataloader)
    for manager in managers.values():  # the first save of each makes what the later ones use
        _block(trainer, manager, data, 1)
    rounds = []
    for number in range(job["rounds"]):
        blocks = {name: _block(trainer, managers[name], data, job["steps"]) for name in order([*managers], number)}
        rounds.append({name: asdict(blocks[name]) for name in managers})
    for manager in managers.values():
        manager.close()
    trainer.checkpointer = disabled
    if dist.get_rank() == 0:
        # Of parameters: state_dict() gathers fused ones, on all ranks together.
        nbytes = sum(one.numel() * one.element_size() for one in trainer.model_parts[0].parameters())
        Path(job["result"]).write_text(json.dumps({"rounds": rounds, "model_nbytes": nbytes}))
    trainer.config.training.steps = trainer.step


def _manager(trainer: Any, kind: Any, mode: str, folder: Path) -> Any:
    config = kind.Config(enable=True, folder=str(folder), interval=1, async_mode=mode, keep_latest_k=0)
    return config.build(
        dataloader=trainer.dataloader,
        model_parts=trainer.model_parts,
        optimizers=trainer.optimizers,
        lr_schedulers=trainer.lr_schedulers,
        states={"train_state": trainer},
        sd_adapter=None,
        base_folder="",
    )


def _block(trainer: Any, manager: Any, data: Any, steps: int) -> Block:
    trainer.checkpointer = manager
    block = Block()
    saved = 0.0
    dist.barrier()
    for number in range(steps):
        begin = time.monotonic()
        trainer.step += 1
        trainer.train_step(data)
        if number == 0:
            saved = time.monotonic()
            manager.save(trainer.step)
            block.call = time.monotonic() - saved
        block.steps.append(time.monotonic() - begin)
    if manager.enable:
        manager.maybe_wait_for_staging()
        manager.maybe_wait_for_saving()
        # A synchronous save was durable when its call returned.
        block.durable = block.call if manager.async_mode == "disabled" else time.monotonic() - saved
    dist.barrier()
    if manager.enable and dist.get_rank() == 0:
        shutil.rmtree(manager.folder)
        os.sync()  # so that no later block pays for this one's pages
    return block
