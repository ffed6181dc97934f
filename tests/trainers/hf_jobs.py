"""Real Trainers on a tiny GPT-2, in forks of one process that has imported transformers and done nothing else."""

from __future__ import annotations

import json
import os
import signal
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments

import snapstone as ss
from snapstone import _native
from snapstone.integrations import hf, publication

STEPS = 8


class Tokens(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        tokens = torch.randint(0, 50, (8,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": tokens, "labels": tokens}


def model() -> GPT2LMHeadModel:
    """With dropout, so that the random generators matter."""
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=50, n_positions=8, n_embd=16, n_layer=2, n_head=2))


def trainer(run: Path, **changes: Any) -> Trainer:
    arguments: dict[str, Any] = {
        "output_dir": str(run),
        "max_steps": STEPS,
        "save_steps": 2,
        "save_total_limit": 1,
        "per_device_train_batch_size": 4,
        "report_to": [],
        "use_cpu": True,
        "logging_steps": 1,
        "disable_tqdm": True,
        "seed": 1,
    }
    return Trainer(model(), TrainingArguments(**(arguments | changes)), train_dataset=Tokens(), eval_dataset=Tokens())


def child(function: Callable[[], Any]) -> int:
    """Runs it in a fork; the exit code, negative for a signal."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            torch.set_num_threads(1)
            function()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def train(run: Path, resume: Any = None, **changes: Any) -> None:
    attached = hf.attach(trainer(run, **changes))
    attached.train(resume_from_checkpoint=resume)


def train_stock(run: Path, resume: Any = None, **changes: Any) -> None:
    trainer(run, **changes).train(resume_from_checkpoint=resume)


def die(*_: Any, **__: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_in_the_engine(run: Path) -> None:
    """In the second checkpoint, when the engine commits the optimizer, which happens in the background."""
    _native.fault_arm("renameat2:2:kill")
    train(run)


def die_before_the_name(run: Path) -> None:
    """All of the second checkpoint is written; it lacks its name."""
    stock = publication.Publication.publish

    def publish(self: Any) -> None:
        if self.final.endswith("-4"):
            die()
        stock(self)

    publication.Publication.publish = publish  # type: ignore[method-assign]
    train(run)


def die_while_deleting(run: Path) -> None:
    """The second checkpoint is there; the first is to go."""
    publication.shutil.rmtree = die
    train(run)


def die_between_two_renames(run: Path) -> None:
    """A checkpoint is saved once more, and its directory has lost its old name and not got the new one."""
    train(run, max_steps=4)
    rename = os.rename
    replaced = str(run / "checkpoint-4")

    def once(source: Any, target: Any) -> None:
        if os.fspath(target) == replaced:
            die()
        rename(source, target)  # of the old one, and of files that others write

    saved = hf.attach(trainer(run, max_steps=4))
    saved.add_callback(Resave(saved, lambda: setattr(publication.os, "rename", once)))
    saved.train(resume_from_checkpoint=True)


class Resave(TrainerCallback):  # type: ignore[misc]
    """Saves once more what was resumed from."""

    def __init__(self, owner: Trainer, before: Callable[[], None]) -> None:
        self.owner = owner
        self.before = before

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.before()
        self.owner._save_checkpoint(self.owner.model, None)
        ss.wait()


class Before(TrainerCallback):  # type: ignore[misc]
    """Calls something before the checkpoint of a step."""

    def __init__(self, step: int, call: Callable[[], None]) -> None:
        self.step = step
        self.call = call

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            self.call()


def die_in_stock(run: Path) -> None:
    """A stock Trainer, when half of the second optimizer.pt is written."""
    save, count = torch.save, [0]

    def half(value: Any, path: Any, *args: Any, **kwargs: Any) -> None:
        save(value, path, *args, **kwargs)
        if str(path).endswith("optimizer.pt"):
            count[0] += 1
            if count[0] == 2:
                os.truncate(path, os.path.getsize(path) // 2)
                die()

    torch.save = half  # type: ignore[assignment]
    train_stock(run)


def names(run: Path) -> list[str]:
    return sorted(one.name for one in run.glob("checkpoint-*"))


def state(run: Path, step: int = STEPS) -> dict[str, Any]:
    """What a run has come to: weights, optimizer, schedule, generators, losses."""
    path = run / f"checkpoint-{step}"
    history = json.loads((path / "trainer_state.json").read_text())["log_history"]
    if (path / "optimizer").is_dir():
        optimizer = ss.Checkpoint.open(path / "optimizer").state_dict()["optimizer"]
    else:
        optimizer = torch.load(path / "optimizer.pt", weights_only=True)
    return {
        "model": load_file(path / "model.safetensors"),
        "optimizer": optimizer,
        "scheduler": torch.load(path / "scheduler.pt", weights_only=True),
        "rng": torch.load(path / "rng_state.pth", weights_only=False),
        "losses": [(one["step"], one["loss"], one["grad_norm"]) for one in history if "loss" in one],
    }
