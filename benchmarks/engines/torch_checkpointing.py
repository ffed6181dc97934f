"""torch_checkpointing without a GPU: no pinned memory, and buffered files.

Its O_DIRECT default fails at close on ext4 (0.1.1): the unaligned tail is refused. It stages into shared memory in a
thread and writes in a process of its own; it syncs nothing.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

from machine import version_of
from states import State

from engines.contestant import Engine, Setting, waiting_for

__all__ = ["TorchCheckpointing"]


class TorchCheckpointing(Engine):
    label = "torch_checkpointing, async, buffered"
    family = "torch-checkpointing"
    package = "torch-checkpointing"
    asynchronous: ClassVar[bool] = True
    unsynced = "files"

    def __init__(self, setting: Setting) -> None:
        self._manager: Any = None

    def unavailable(self) -> str | None:
        return None if version_of("torch-checkpointing") else "torch_checkpointing is not installed"

    def _open(self) -> Any:
        if self._manager is None:
            package, config, staging, storage = (
                importlib.import_module(f"torch_checkpointing{name}")
                for name in ("", ".config", ".staging", ".storage.filesystem")
            )
            self._manager = package.CheckpointManager(
                package.CheckpointManager.Config(
                    storage_config=storage.LocalFileSystemStorageConfig(use_direct_io=False),
                    save=config.AsyncCheckpointSaverConfig(
                        staging_config=staging.CheckpointStagerConfig(
                            use_pinned_memory=False, use_non_blocking_copy=False
                        )
                    ),
                )
            )
        return self._manager

    def begin(self, state: State, directory: Path) -> Callable[[], None]:
        manager = self._open()
        written = manager.save(str(directory), {"state": state})
        with manager.lock():  # held by the copy until the state may change
            pass
        return waiting_for(written)

    def fill(self, target: State, directory: Path) -> None:
        loaded = self._open().load(str(directory), into={"state": target})["state"]
        for name, tensor in target.items():
            if loaded[name].data_ptr() != tensor.data_ptr():
                tensor.copy_(loaded[name])

    def close(self) -> None:
        if self._manager is not None:
            self._manager.close()
            self._manager = None
