"""transformers' Trainer and Accelerate's Accelerator with the engine: `attach(trainer)`, `attach(accelerator)`.

A checkpoint keeps its name and the files that others read, and so `from_pretrained("checkpoint-20")` works:

| in checkpoint-20/ | written |
|---|---|
| config.json, tokenizer files, training_args.bin, scheduler.pt, | by transformers, in the call: they are small |
| rng_state*.pth, trainer_state.json | |
| model.safetensors, or its parts | copied in the call; the same file, written in the background |
| optimizer/ in the place of optimizer.pt | by the engine, in the background: the bulk, read by nobody else |
| pytorch_model_fsdp_0/, optimizer_0/ (FSDP, sharded) | by the engine under DCP, in the background |
| snapstone.json | last of all: size and digest of every file |

All of it is written to a hidden directory beside it, synced, and renamed to checkpoint-20 when every rank has voted. So
a directory of that name is complete, for `get_last_checkpoint` too, and older checkpoints are removed only then.
`resume_from_checkpoint=True` takes the newest one of which every byte verifies, and takes what stock code has saved.
"""

from __future__ import annotations

import os
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch

from .. import Checkpoint, _native
from ..config import SaveOptions
from .versions import require

__all__ = ["attach", "detach", "to_stock"]

Target = TypeVar("Target")

_attached: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()


def attach(target: Target, *, asynchronous: bool = True, **options: Any) -> Target:
    """Lets a `transformers.Trainer`, or an `accelerate.Accelerator`, save and load through the engine. Again is
    nothing. Returns `target`.

    Args:
        target: a Trainer that has not begun to train, or an Accelerator. On every rank.
        asynchronous: let a save return when the state has been copied. Its errors are raised by the next save, at the
            end of training, and by `snapstone.wait()`. With False a checkpoint is durable when its save returns, for
            callbacks that read it in `on_save`.
        options: of `snapstone.save`: codec, allow_pickle (resuming takes it too), host_memory_budget, timeout. For an
            Accelerator, or a Trainer with FSDP, only timeout.

    Raises:
        UnsupportedVersionError: of transformers or accelerate.
        TypeError: another object. ValueError: an option, or a Trainer whose saves are another engine's (DeepSpeed).
    """
    require("accelerate", "1.15", "2")
    from accelerate import Accelerator

    if target in _attached:
        return target
    known = {"codec", "allow_pickle", "host_memory_budget", "timeout"}
    if unknown := sorted(set(options) - known):
        raise ValueError(f"{', '.join(unknown)}: not an option here; {', '.join(sorted(known))} are")
    SaveOptions.of(**options)
    if isinstance(target, Accelerator):
        _refuse_for_dcp(options)
        from .hf_accelerator import AttachedAccelerator

        _attached[target] = AttachedAccelerator(target, asynchronous, options)
        return target
    require("transformers", "5.23", "6")
    from transformers import Trainer

    if not isinstance(target, Trainer):
        raise TypeError(f"attach takes a transformers.Trainer or an accelerate.Accelerator, not {type(target)}")
    if target.is_fsdp_enabled:
        _refuse_for_dcp(options)
    from .hf_trainer import AttachedTrainer

    _attached[target] = AttachedTrainer(target, asynchronous, options)
    return target


def _refuse_for_dcp(options: dict[str, Any]) -> None:
    if unused := sorted(set(options) - {"timeout"}):
        raise ValueError(f"{', '.join(unused)}: not an option here, where accelerate saves through DCP by a bare path")


def detach(target: Target) -> Target:
    """Undoes `attach`, when the save that is under way is durable; raises its error. Again is nothing."""
    attached = _attached.pop(target, None)
    if attached is not None:
        attached.detach()
    return target


def to_stock(checkpoint: str | os.PathLike[str], *, allow_pickle: bool = False) -> str:
    """Writes optimizer.pt into `checkpoint`, so that a Trainer without snapstone resumes from it. Returns its path.

    Args:
        allow_pickle: take values that only pickle can store, which can run code.

    Raises:
        CheckpointNotFoundError: it has no `optimizer` directory of the engine. CorruptCheckpointError: wrong bytes.
    """
    path = os.path.join(checkpoint, "optimizer.pt")
    with Checkpoint.open(os.path.join(checkpoint, "optimizer")) as opened:
        state = opened.state_dict(allow_pickle=allow_pickle)["optimizer"]
    torch.save(state, path + ".new")
    with open(path + ".new", "rb") as file:
        _native.sync_file(file.fileno(), path, "stock_optimizer")
    os.replace(path + ".new", path)
    return path
