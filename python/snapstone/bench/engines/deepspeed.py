"""DeepSpeed's checkpoint engines, in the order of calls of its `save_checkpoint`: create, save, commit, `latest`.

Ranks give them their local shards, a file each, as they do with ZeRO's optimizer states. `latest` names the checkpoint
to resume from, beside the checkpoints; as there, rank 0 writes it when itself is done, whatever the others do. Nothing
syncs directories and `latest`.
"""

from __future__ import annotations

import logging
import os
from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

from ..results import Option
from .engine import Engine, Pending, Setting

__all__ = ["DeepSpeed", "DeepSpeedDecoupled", "DeepSpeedFast"]

_SHARDS: Option = {"name": "one file per rank", "value": "of its shards", "why": "ranks write side by side"}
_WRITER: tuple[Option, ...] = (
    {"name": "writer.type", "value": "fast", "why": "direct, asynchronous I/O from a pinned buffer"},
    {"name": "writer.io_buffer_double", "value": "True", "why": "one half is filled while the other is written"},
    {"name": "checkpoint_serialization", "value": "False", "why": "the format that it writes in the largest pieces"},
)


class _Checkpoints(Engine):
    distribution = "deepspeed"
    module = "deepspeed"
    syncs = False

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        os.environ.setdefault("DS_ACCELERATOR", setting.device)  # or it looks for one, and tells
        from deepspeed.utils import logger

        logger.setLevel(logging.WARNING)  # it tells of every file, on the output
        self._engine: Any = self.open()

    @abstractmethod
    def open(self) -> Any:
        """A deepspeed.runtime.checkpoint_engine.CheckpointEngine."""

    def begin(self, state: Mapping[str, Any], directory: Path) -> Any:
        """Hands the shards of this rank over; what commit is given."""
        import torch.distributed as dist
        from deepspeed.runtime.checkpoint_engine import CheckpointCommitInfo

        from ..optimizer import local

        info = CheckpointCommitInfo(tag=directory.name, save_dir=str(directory.parent), save_latest=True)
        if self.setting.rank == 0:
            self._engine.makedirs(str(directory), exist_ok=True)
        dist.barrier(self.setting.group)
        self._engine.create(info)
        self._engine.save({name: local(one) for name, one in state.items()}, str(self._path(directory)))
        return info

    def commit(self, info: Any) -> None:
        import torch.distributed as dist

        self._engine.commit(info)
        if self.setting.rank == 0:
            (Path(info.save_dir) / "latest").write_text(info.tag)
        dist.barrier(self.setting.group)

    def save(self, state: Mapping[str, Any], directory: Path, step: int) -> Pending | None:
        self.commit(self.begin(state, directory))
        return Pending()

    def load(self, state: dict[str, Any], directory: Path) -> None:
        from ..optimizer import local

        for name, found in self._engine.load(str(self._path(directory)), map_location="cpu").items():
            local(state[name]).copy_(found)

    def is_complete(self, directory: Path) -> bool:
        latest = directory.parent / "latest"
        return latest.exists() and latest.read_text().strip() == directory.name

    def close(self) -> None:
        self._engine.cleanup()

    def _path(self, directory: Path) -> Path:
        return directory / f"zero_pp_rank_{self.setting.rank}_mp_rank_00_optim_states.pt"


class DeepSpeed(_Checkpoints):
    title = "DeepSpeed TorchCheckpointEngine"
    options: ClassVar[tuple[Option, ...]] = (
        _SHARDS,
        {"name": "checkpoint_serialization", "value": "True", "why": "its default, torch.save's own format"},
    )

    def open(self) -> Any:
        from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine

        return TorchCheckpointEngine(SimpleNamespace(checkpoint_config={"checkpoint_serialization": True}))


class DeepSpeedFast(_Checkpoints):
    """FastFileWriter needs an operator that DeepSpeed builds for CUDA and not for CPUs."""

    title = "DeepSpeed FastCheckpointEngine"
    options: ClassVar[tuple[Option, ...]] = (_SHARDS, *_WRITER)
    needs_cuda = True
    writer: ClassVar[str] = "fast"

    def open(self) -> Any:
        from deepspeed.runtime.checkpoint_engine import FastCheckpointEngine

        return FastCheckpointEngine(*self.arguments())

    def arguments(self) -> tuple[Any, Any, bool]:
        """Its configuration, this rank as a writer of its own file, and that no other rank writes parts of that."""
        from deepspeed.runtime.model_checkpointing.config import get_checkpoint_config
        from deepspeed.runtime.model_checkpointing.data_parallel_writer_factory import DataParallelWriterConfig
        from deepspeed.runtime.swap_tensor.aio_config import get_aio_config

        checkpoint = {"checkpoint_serialization": False, "writer": {"type": self.writer}}
        config = SimpleNamespace(
            checkpoint_config=get_checkpoint_config({"checkpoint": checkpoint}), aio_config=get_aio_config({})
        )
        rank = self.setting.rank
        writer = DataParallelWriterConfig(world_size=1, rank=0, global_rank=rank, local_rank=rank, pure_dp=True)
        return config, writer, False


class DeepSpeedDecoupled(DeepSpeedFast):
    """Its process reads the tensors themselves, so it is waited for before the optimizer may step: the fence."""

    title = "DeepSpeed DecoupledCheckpointEngine"
    options: ClassVar[tuple[Option, ...]] = (
        _SHARDS,
        *_WRITER,
        {"name": "writer.decoupled", "value": "True", "why": "a process writes behind forward and backward"},
    )

    def open(self) -> Any:
        import deepspeed
        from deepspeed.runtime.checkpoint_engine import DecoupledCheckpointEngine

        deepspeed.init_distributed(dist_init_required=False)  # it talks between ranks by that alone
        return DecoupledCheckpointEngine(*self.arguments())

    def save(self, state: Mapping[str, Any], directory: Path, step: int) -> Pending | None:
        info = self.begin(state, directory)
        return Pending(fence=lambda: self.commit(info))
