"""nvidia-resiliency-ext: plans as torch.distributed.checkpoint does, writes in a process of its own that stays.

The call returns when that process has copied the tensors from the device. The training thread asks after each step
whether the files of all ranks are written, and then ends the save by writing the metadata. Files are synced, not the
directory, nor the metadata's name: the harness syncs the file system. It calls CUDA whatever the device.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from ..results import Option
from .dcp import Dcp
from .engine import Pending, Setting

__all__ = ["NvidiaResiliency"]


class NvidiaResiliency(Dcp):
    title = "nvidia-resiliency-ext, async DCP"
    distribution = "nvidia-resiliency-ext"
    module = "nvidia_resiliency_ext"
    needs: ClassVar[tuple[str, ...]] = ("psutil",)
    needs_cuda: ClassVar[bool] = True
    options: ClassVar[tuple[Option, ...]] = (
        {"name": "AsyncCallsQueue", "value": "persistent", "why": "its writer is started once; the default"},
        {"name": "thread_count", "value": "2", "why": "two workers write"},
        {"name": "enable_cache", "value": "False", "why": "with it a state that has changed its names goes unnoticed"},
        {
            "name": "tensors in host memory",
            "value": "copied by the adapter",
            "why": "it shares them with its writer, who would see the optimizer change them",
        },
    )
    persistent: ClassVar[bool] = True

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        from nvidia_resiliency_ext.checkpointing.async_ckpt.core import AsyncCallsQueue

        self._queue = AsyncCallsQueue(persistent=self.persistent)

    def save(self, state: Mapping[str, Any], directory: Path, step: int) -> Pending | None:
        from nvidia_resiliency_ext.checkpointing.async_ckpt.core import AsyncRequest
        from nvidia_resiliency_ext.checkpointing.async_ckpt.filesystem_async import FileSystemWriterAsync
        from nvidia_resiliency_ext.checkpointing.async_ckpt.state_dict_saver import (
            save_state_dict_async_finalize,
            save_state_dict_async_plan,
        )
        from torch.distributed.checkpoint.default_planner import DefaultSavePlanner

        own = {name: tensor.clone() if tensor.device.type == "cpu" else tensor for name, tensor in state.items()}
        writer = FileSystemWriterAsync(str(directory), thread_count=2)
        plan = save_state_dict_async_plan(own, writer, None, 0, planner=DefaultSavePlanner())
        write, preload, arguments = writer.get_save_function_and_args()
        ended = threading.Event()

        def end() -> None:
            try:
                save_state_dict_async_finalize(*plan)
            finally:
                ended.set()

        self._queue.schedule_async_request(AsyncRequest(write, arguments, [end], preload_fn=preload))
        return Pending(wait=ended.wait, complete=partial(self._queue.maybe_finalize_async_calls, blocking=True))

    def poll(self) -> None:
        self._queue.maybe_finalize_async_calls()

    def close(self) -> None:
        self._queue.close()
