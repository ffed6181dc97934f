"""snapstone: its own verbs, under torch.distributed.checkpoint, and against the checkpoint before."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, ClassVar

from ..results import Option
from .engine import Engine, Pending, Setting, future_pending
from .inner_stages import InnerSpan, traced_saves

__all__ = ["Snapstone", "SnapstoneDcp", "SnapstoneDelta"]

_FENCE: Option = {"name": "fence", "value": "the optimizer", "why": "the copy runs behind forward and backward"}
_BUDGET: Option = {
    "name": "host_memory_budget",
    "value": "what the rank holds, and 64 MiB",
    "why": "the fence then waits for a copy in memory and not for the disk; others keep such a copy too",
}


class Snapstone(Engine):
    title = "snapstone async_save"
    distribution = "snapstone"
    module = "snapstone"
    options: ClassVar[tuple[Option, ...]] = (_FENCE, _BUDGET)
    syncs = True
    more: ClassVar[Mapping[str, Any]] = {}

    @property
    def fence(self) -> Any:
        return self.setting.optimizer

    def save(self, state: Mapping[str, Any], directory: Path, step: int) -> Pending | None:
        from ... import async_save

        handle = async_save(
            state,
            checkpoint_id=directory,
            step=step,
            fence=self.fence,
            process_group=self.setting.group,
            host_memory_budget=self.budget(state),
            **self.more,
        )
        # On a device streams wait for the copies, as the fence has told them to; the training thread waits for nothing.
        staged = handle.staging_completion if self.setting.device == "cpu" else None
        return future_pending(staged, handle.upload_completion)

    def budget(self, state: Mapping[str, Any]) -> int:
        """On a device, a MiB for the last chunk of every tensor besides, which takes a whole slot."""
        slots = len(state) if self.setting.device == "cuda" else 0
        return self.setting.nbytes_of_rank + ((64 + slots) << 20)

    def load(self, state: dict[str, Any], directory: Path) -> None:
        from ... import load

        load(state, checkpoint_id=directory, process_group=self.setting.group)

    def is_complete(self, directory: Path) -> bool:
        return directory.is_dir()  # it appears by the rename that commits it

    def traced(self) -> AbstractContextManager[list[InnerSpan]] | None:
        return traced_saves()


class SnapstoneDelta(Snapstone):
    title = "snapstone async_save, delta"
    options: ClassVar[tuple[Option, ...]] = (
        _FENCE,
        _BUDGET,
        {"name": "base", "value": "auto", "why": "chunks that did not change are linked and not written again"},
        {"name": "codec", "value": "none", "why": "compression takes cores that training wants"},
    )
    more: ClassVar[Mapping[str, Any]] = {"base": "auto"}


class SnapstoneDcp(Engine):
    title = "snapstone under dcp.async_save"
    distribution = "snapstone"
    module = "snapstone"
    options: ClassVar[tuple[Option, ...]] = (
        {
            "name": "async_stager",
            "value": "snapstone.dcp.Stager",
            "why": "copies on a thread, into memory that it keeps",
        },
    )
    syncs = True

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        from ...dcp import Stager

        self._stager = Stager()

    def save(self, state: Mapping[str, Any], directory: Path, step: int) -> Pending | None:
        from torch.distributed.checkpoint import state_dict_saver

        from ...dcp import StorageWriter

        response: Any = state_dict_saver.async_save(
            dict(state),
            storage_writer=StorageWriter(directory),
            async_stager=self._stager,
            process_group=self.setting.group,
        )
        return future_pending(response.staging_completion, response.upload_completion)

    def load(self, state: dict[str, Any], directory: Path) -> None:
        from torch.distributed.checkpoint import state_dict_loader

        from ...dcp import StorageReader

        state_dict_loader.load(state, storage_reader=StorageReader(directory), process_group=self.setting.group)

    def is_complete(self, directory: Path) -> bool:
        return directory.is_dir()

    def traced(self) -> AbstractContextManager[list[InnerSpan]] | None:
        return traced_saves()

    def close(self) -> None:
        self._stager.close()
