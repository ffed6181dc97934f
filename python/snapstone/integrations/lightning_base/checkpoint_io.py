"""`CheckpointIO` without its base class, which is of whichever package the trainer is of."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch

from .directory import is_directory, packed_state, read
from .saves import Saves

__all__ = ["EngineIO"]

Path = str | os.PathLike[str]


class EngineIO:
    """Checkpoints of one process for all, as DDP and single devices have them: directories instead of files.

    Saves happen on rank 0 alone. What cannot be stored without pickle is stored with `torch.save`, value by value, and
    loads like a stock checkpoint: where `torch.load(weights_only=True)` takes it, or with weights_only=False.

    Args:
        asynchronous: return from a save when the snapshot is taken. An error is raised by the next save, by the next
            load, or at the end of `fit`. Saves outside of `fit` and those of SLURM's requeueing always wait.
        save_options: arguments of `snapstone.save`: base, codec, full_every, keyframe_every, derive, on_unchanged,
            host_memory_budget, timeout.
    """

    stock: Any  # makes the plugin that reads everything else

    def __init__(self, *, asynchronous: bool = True, save_options: Mapping[str, Any] | None = None) -> None:
        self.snapstone_saves = Saves(asynchronous=asynchronous, options=save_options)

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Path, storage_options: Any | None = None) -> None:
        if storage_options is not None:
            raise TypeError(f"{type(self).__name__} takes no storage_options; give it save_options when it is made")
        step = checkpoint.get("global_step")
        state = packed_state(checkpoint)
        self.snapstone_saves.save(state, path, step=step if type(step) is int else None, no_dist=True, lead=True)

    def load_checkpoint(
        self, path: Path, map_location: Any | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """What a directory holds, or a stock file, with nothing unpickled unless weights_only=False.

        Args:
            map_location: a device, or its name, for all tensors of a directory; functions and dicts leave them on the
                CPU, since a directory does not record devices.
        """
        self.snapstone_saves.wait()
        weights_only = True if weights_only is None else weights_only
        if not is_directory(path):
            location = "cpu" if map_location is None else map_location
            loaded: dict[str, Any] = self.stock().load_checkpoint(path, location, weights_only=weights_only)
            return loaded
        device = map_location if isinstance(map_location, str | torch.device) else "cpu"
        return read(path, weights_only=weights_only, device=device)

    def remove_checkpoint(self, path: Path) -> None:
        """Removes a directory or a file, once the save begun last is durable."""
        self.snapstone_saves.remove(path)

    def teardown(self) -> None:
        self.snapstone_saves.close()
