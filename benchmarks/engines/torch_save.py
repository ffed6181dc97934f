"""torch.save of the whole state, and torch.load with mmap=True, copied into the tensors that are there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from states import State

from engines.contestant import Engine, Setting, nothing_left

__all__ = ["TorchSave"]


class TorchSave(Engine):
    label = "torch.save / torch.load(mmap=True)"
    family = "torch"
    package = "torch"
    unsynced = "files"

    def __init__(self, setting: Setting) -> None:
        pass

    def begin(self, state: State, directory: Path) -> Callable[[], None]:
        directory.mkdir()
        torch.save(state, directory / "state.pt")
        return nothing_left

    def fill(self, target: State, directory: Path) -> None:
        loaded = torch.load(directory / "state.pt", mmap=True, weights_only=True)
        for name, tensor in target.items():
            tensor.copy_(loaded[name])
