"""torch_checkpointing: stages in a thread, writes in a process of its own, renames the directory at the end.

Its direct I/O is off: 0.1.1 fails with it on file systems that refuse an unaligned tail. It syncs nothing. Ranks give
it their local shards, a file each: it is not asked to reshard.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from ..results import Option
from .engine import Engine, Pending, Setting

__all__ = ["TorchCheckpointing"]


class TorchCheckpointing(Engine):
    title = "torch_checkpointing, async"
    distribution = "torch-checkpointing"
    module = "torch_checkpointing"
    options: ClassVar[tuple[Option, ...]] = (
        {"name": "save", "value": "AsyncCheckpointSaverConfig", "why": "copy and write run beside the training"},
        {"name": "use_pinned_memory", "value": "with CUDA only", "why": "there is nothing to pin for on a CPU"},
        {"name": "use_direct_io", "value": "False", "why": "0.1.1 fails with it on ext4"},
    )
    syncs = False

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        from torch_checkpointing import CheckpointManager
        from torch_checkpointing.config import AsyncCheckpointSaverConfig
        from torch_checkpointing.staging import CheckpointStagerConfig
        from torch_checkpointing.storage.filesystem import LocalFileSystemStorageConfig

        cuda = setting.device == "cuda"
        staging = CheckpointStagerConfig(use_pinned_memory=cuda, use_non_blocking_copy=cuda)
        self._manager = CheckpointManager(
            CheckpointManager.Config(
                storage_config=LocalFileSystemStorageConfig(use_direct_io=False),
                save=AsyncCheckpointSaverConfig(staging_config=staging),
            )
        )

    def save(self, state: Mapping[str, Any], directory: Path, step: int) -> Pending | None:
        from ..optimizer import local

        saved: Any = self._manager.save(str(directory), {"state": {name: local(one) for name, one in state.items()}})

        def fence() -> None:
            with self._manager.lock():  # held by the copy until the state may change
                pass

        return Pending(fence=fence, wait=saved.result)

    def load(self, state: dict[str, Any], directory: Path) -> None:
        from ..optimizer import local

        target = {name: local(one) for name, one in state.items()}
        loaded: Any = self._manager.load(str(directory), into={"state": target})["state"]
        for name, tensor in target.items():
            if loaded[name].data_ptr() != tensor.data_ptr():
                tensor.copy_(loaded[name])

    def is_complete(self, directory: Path) -> bool:
        return directory.is_dir()  # renamed when all ranks have written

    def close(self) -> None:
        self._manager.close()
