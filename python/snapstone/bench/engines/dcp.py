"""torch.distributed.checkpoint with its own file system writer.

The writer syncs data files, not the directories, and not its metadata's name: the harness syncs the file system.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from ..results import Option
from .engine import Engine, Pending, Setting, future_pending

__all__ = ["Dcp", "DcpAsync", "DcpPinned", "DcpProcess"]

_WRITER: Option = {"name": "thread_count", "value": "2", "why": "two threads write while one serializes"}


class Dcp(Engine):
    title = "DCP save"
    distribution = "torch"
    module = "torch"
    options: ClassVar[tuple[Option, ...]] = (_WRITER,)
    syncs = False

    def save(self, state: Mapping[str, Any], directory: Path, step: int) -> Pending | None:
        from torch.distributed.checkpoint import state_dict_saver

        state_dict_saver.save(dict(state), storage_writer=self._writer(directory), process_group=self.setting.group)
        return Pending()

    def _writer(self, directory: Path) -> Any:
        from torch.distributed.checkpoint.filesystem import FileSystemWriter

        return FileSystemWriter(directory, thread_count=2)

    def load(self, state: dict[str, Any], directory: Path) -> None:
        from torch.distributed.checkpoint import state_dict_loader
        from torch.distributed.checkpoint.filesystem import FileSystemReader

        state_dict_loader.load(state, storage_reader=FileSystemReader(directory), process_group=self.setting.group)

    def is_complete(self, directory: Path) -> bool:
        return (directory / ".metadata").exists()  # written last, under another name, and renamed


class DcpAsync(Dcp):
    title = "DCP async_save, thread"
    options: ClassVar[tuple[Option, ...]] = (
        _WRITER,
        {"name": "async_stager", "value": "DefaultStager, asynchronous", "why": "the copy runs on a thread"},
        {"name": "use_pinned_memory", "value": "False", "why": "there is nothing to pin for on a CPU"},
    )
    pinned: ClassVar[bool] = False
    process: ClassVar[bool] = False

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

        self._stager = DefaultStager(
            StagingOptions(
                use_pinned_memory=self.pinned,
                use_shared_memory=self.process,
                use_async_staging=True,
                use_non_blocking_copy=self.pinned,
            )
        )

    def save(self, state: Mapping[str, Any], directory: Path, step: int) -> Pending | None:
        from torch.distributed.checkpoint import state_dict_saver

        kinds = state_dict_saver.AsyncCheckpointerType
        response: Any = state_dict_saver.async_save(
            dict(state),
            storage_writer=self._writer(directory),
            async_stager=self._stager,
            async_checkpointer_type=kinds.PROCESS if self.process else kinds.THREAD,
            process_group=self.setting.group,
        )
        return future_pending(response.staging_completion, response.upload_completion)

    def close(self) -> None:
        self._stager.close()


class DcpProcess(DcpAsync):
    title = "DCP async_save, process"
    options: ClassVar[tuple[Option, ...]] = (
        *DcpAsync.options,
        {"name": "async_checkpointer_type", "value": "PROCESS", "why": "its Python runs beside the training's"},
        {"name": "use_shared_memory", "value": "True", "why": "the process reads the staged tensors where they are"},
    )
    process: ClassVar[bool] = True

    def close(self) -> None:
        super().close()
        from torch.distributed.checkpoint import _async_process_executor as executor

        process = getattr(executor, "_CHECKPOINT_PROCESS", None)
        if process is not None:
            executor._CHECKPOINT_PROCESS = None
            del process  # its finalizer ends the child


class DcpPinned(DcpAsync):
    title = "DCP async_save, pinned memory"
    needs_cuda: ClassVar[bool] = True
    options: ClassVar[tuple[Option, ...]] = (
        _WRITER,
        {"name": "async_stager", "value": "DefaultStager, asynchronous", "why": "the copy runs on a stream of its own"},
        {"name": "use_pinned_memory", "value": "True", "why": "copies from the device at the speed of the bus"},
        {"name": "use_non_blocking_copy", "value": "True", "why": "the training thread does not wait for them"},
    )
    pinned: ClassVar[bool] = True
