"""AsyncCallsQueue: Megatron's queue of asynchronous saves, which finalizes the engine's when they have ended.

The engine writes in the background of the training process, so there is nothing to run elsewhere and no process is
started. Megatron's own queue takes a request without a function for done and finalizes at the next step, where training
would wait for the disk.
"""

from __future__ import annotations

from concurrent.futures import wait
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.strategies import async_utils

from ...handle import SaveHandle
from .save_strategy import Commit

__all__ = ["AsyncCallsQueue"]


class _EngineCaller(async_utils.AsyncCaller):  # type: ignore[misc]
    """One save of the engine, in the place of a process that writes."""

    def __init__(self, handle: SaveHandle) -> None:
        self._handle = handle

    def schedule_async_call(self, async_req: Any) -> None:
        """It began when the request was made."""

    def sync_all_async_calls(self, is_alive: int) -> bool:
        """Whether it has ended on every rank; Megatron's own works on CUDA devices alone."""
        device = torch.device("cuda", torch.cuda.current_device()) if _on_devices() else torch.device("cpu")
        running = torch.tensor([is_alive], dtype=torch.int, device=device)
        dist.all_reduce(running)
        return not running.item()

    def is_current_async_call_done(self, blocking: bool = False, no_dist: bool = False) -> bool:
        running = not self._handle.done()
        if not (running if no_dist else not self.sync_all_async_calls(int(running))):
            return True
        if blocking:
            wait([self._handle.upload_completion])
        return blocking

    def close(self, abort: bool = False) -> None:
        if abort:
            self._handle.cancel()
        wait([self._handle.upload_completion])

    def __del__(self) -> None:
        """The save ends by itself."""


class AsyncCallsQueue(async_utils.AsyncCallsQueue):  # type: ignore[misc]
    """Takes the requests of SaveStrategy, and others as Megatron-core's queue does. Every rank calls every method.

    A save that failed raises from `maybe_finalize_async_calls`, on every rank; what would have followed it
    (`metadata.json`, the tracker file) is not run, and the queue goes on with the next call.
    """

    def schedule_async_request(self, async_request: Any) -> int:
        first = next(iter(async_request.finalize_fns), None)
        if not isinstance(first, Commit):
            return int(super().schedule_async_request(async_request))
        self.call_idx += 1
        caller = _EngineCaller(first.handle)
        self.async_calls.append(
            async_utils._ActiveAsyncRequest(self.call_idx, caller, async_request._replace(is_frozen=True))
        )
        return int(self.call_idx)

    def maybe_finalize_async_calls(self, blocking: bool = False, no_dist: bool = False) -> list[int]:
        """Finalizes what has ended on every rank (`no_dist`: here), or with `blocking` everything, in order.

        Returns:
            The indices of the calls, as `schedule_async_request` returned them.
        """
        finalized = []
        while self.async_calls and self.async_calls[0].async_caller.is_current_async_call_done(blocking, no_dist):
            call = self.async_calls.popleft()
            for finalize in call.async_request.finalize_fns:
                finalize()
            finalized.append(int(call.idx))
        return finalized

    def close(self, abort: bool = False) -> None:
        if abort:
            for call in self.async_calls:
                call.async_caller.close(abort=True)
            self.async_calls.clear()
        super().close(abort=abort)


def _on_devices() -> bool:
    return "nccl" in dist.get_backend_config() if dist.is_initialized() else torch.cuda.is_available()
