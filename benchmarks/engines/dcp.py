"""torch.distributed.checkpoint as it comes: its file system writer syncs files, not directories."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

from states import State
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save, save

from engines.contestant import Engine, Setting, nothing_left, waiting_for

__all__ = ["Dcp", "DcpAsync"]


class Dcp(Engine):
    family = "dcp"
    package = "torch"
    unsynced = "directories"

    def __init__(self, setting: Setting, thread_count: int) -> None:
        self.thread_count = thread_count
        self.label = f"DCP save / load, {thread_count} thread{'s' * (thread_count > 1)}"
        self.loads = thread_count == 1  # the reader has no such option

    def begin(self, state: State, directory: Path) -> Callable[[], None]:
        writer = FileSystemWriter(directory, thread_count=self.thread_count)
        save(state, storage_writer=writer, no_dist=True)
        return nothing_left

    def fill(self, target: State, directory: Path) -> None:
        load(target, storage_reader=FileSystemReader(directory), no_dist=True)


class DcpAsync(Dcp):
    label = "DCP async_save, default"
    asynchronous: ClassVar[bool] = True

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting, thread_count=1)
        self.label = type(self).label
        self.loads = False

    def begin(self, state: State, directory: Path) -> Callable[[], None]:
        response: Any = async_save(state, checkpoint_id=str(directory), no_dist=True)
        if not hasattr(response, "upload_completion"):
            return waiting_for(response)  # a plain future: staging was done by the call
        response.staging_completion.result()
        return waiting_for(response.upload_completion)
