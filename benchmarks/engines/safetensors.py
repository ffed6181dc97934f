"""safetensors' save_file and load_file; what it maps lazily is copied into the tensors that are there."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from machine import version_of
from states import State

from engines.contestant import Engine, Setting, nothing_left

__all__ = ["Safetensors"]


class Safetensors(Engine):
    label = "safetensors save_file / load_file"
    family = "safetensors"
    package = "safetensors"
    unsynced = "files"

    def __init__(self, setting: Setting) -> None:
        self._torch: Any = None

    def unavailable(self) -> str | None:
        if version_of("safetensors") is None:
            return "safetensors is not installed"
        self._torch = importlib.import_module("safetensors.torch")
        return None

    def begin(self, state: State, directory: Path) -> Callable[[], None]:
        directory.mkdir()
        self._torch.save_file(state, directory / "state.safetensors")
        return nothing_left

    def fill(self, target: State, directory: Path) -> None:
        loaded = self._torch.load_file(directory / "state.safetensors")
        for name, tensor in target.items():
            tensor.copy_(loaded[name])
