"""torch.save and safetensors: a file per rank, synced and renamed here, as a job that wants to resume must do."""

from __future__ import annotations

import os
from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from ..results import Option
from .engine import Engine, Pending

__all__ = ["Safetensors", "TorchSave"]

_OPTIONS: tuple[Option, ...] = (
    {"name": "one file per rank", "value": "of its shards", "why": "ranks write side by side"},
    {"name": "fsync, rename", "value": "by the adapter", "why": "neither syncs; a name that stands means a whole file"},
)


class _FilePerRank(Engine):
    options: ClassVar[tuple[Option, ...]] = _OPTIONS
    syncs = True
    suffix: ClassVar[str]

    def save(self, state: Mapping[str, Any], directory: Path, step: int) -> Pending | None:
        import torch.distributed as dist

        from ..optimizer import local

        directory.mkdir(exist_ok=True)
        path = self._path(directory)
        part = path.with_name(path.name + ".part")
        self.write({name: local(tensor) for name, tensor in state.items()}, part)
        _sync(part)
        part.rename(path)
        _sync(directory)
        dist.barrier(self.setting.group)
        if self.setting.rank == 0:
            (directory / "complete").touch()
            _sync(directory)
            _sync(directory.parent)
        dist.barrier(self.setting.group)
        return Pending()

    def load(self, state: dict[str, Any], directory: Path) -> None:
        from ..optimizer import local

        for name, tensor in self.read(self._path(directory)).items():
            local(state[name]).copy_(tensor)

    def is_complete(self, directory: Path) -> bool:
        return (directory / "complete").exists()

    def _path(self, directory: Path) -> Path:
        return directory / f"rank-{self.setting.rank:05d}.{self.suffix}"

    @abstractmethod
    def write(self, state: dict[str, Any], path: Path) -> None: ...

    @abstractmethod
    def read(self, path: Path) -> dict[str, Any]: ...


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class TorchSave(_FilePerRank):
    title = "torch.save, fsync"
    distribution = "torch"
    module = "torch"
    suffix = "pt"

    def write(self, state: dict[str, Any], path: Path) -> None:
        import torch

        torch.save(state, path)

    def read(self, path: Path) -> dict[str, Any]:
        import torch

        loaded: dict[str, Any] = torch.load(path, mmap=True, weights_only=True)
        return loaded


class Safetensors(_FilePerRank):
    title = "safetensors save_file, fsync"
    distribution = "safetensors"
    module = "safetensors"
    suffix = "safetensors"

    def write(self, state: dict[str, Any], path: Path) -> None:
        from safetensors.torch import save_file

        save_file({name: tensor.contiguous() for name, tensor in state.items()}, path)

    def read(self, path: Path) -> dict[str, Any]:
        from safetensors.torch import load_file

        return dict(load_file(path))
