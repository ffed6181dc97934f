"""Devices: tensors in CUDA memory, and the places in streams between which jobs read and fill them.

Jobs copy on streams of their own. They begin after a mark in the streams that produce the tensors, and the streams that
use the tensors afterwards wait for them; the host waits for neither. Which streams these are torch knows, by device and
thread: the current ones.

Where the driver cannot be used (`absence`), torch copies tensors to the host and back, as it does for other devices.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch

from . import _native, tensors
from .tensors import HOST, LocalShard

__all__ = [
    "Marked",
    "absence",
    "copy_of",
    "current_streams",
    "is_reached",
    "mark_streams",
    "ordinals_of",
    "plain",
    "refuse_capture",
]


@functools.cache
def absence() -> str:
    """Why jobs cannot reach CUDA memory; empty when they can. Asked only by those who have a CUDA tensor."""
    if torch.version.hip:  # whose tensors say that they are on CUDA
        return "this torch is for ROCm"
    return str(_native.cuda_absence())


@functools.cache
def _side_stream(ordinal: int) -> torch.cuda.Stream:
    """For what torch copies for saves. One for good: torch keeps memory by the stream that it was made for. And none of
    torch's own, which it hands out again and again, to be captured too.
    """
    if absence():
        return torch.cuda.Stream(ordinal)  # type: ignore[no-untyped-call]
    return torch.cuda.ExternalStream(_native.cuda_stream(ordinal), device=ordinal)  # type: ignore[no-untyped-call]


def _forget_in_child() -> None:
    absence.cache_clear()
    _side_stream.cache_clear()


os.register_at_fork(after_in_child=_forget_in_child)


def is_reached(tensor: torch.Tensor) -> bool:
    """Whether jobs read and fill the tensor's memory on its device."""
    return tensor.is_cuda and not absence()


def ordinals_of(shards: Sequence[LocalShard]) -> Any:
    """Of each plain shard, as int32; None when all are on the host."""
    ordinals = np.fromiter((shard.tensor.get_device() for shard in shards), np.int32, len(shards))
    return ordinals if (ordinals != HOST).any() else None


def plain(shard: LocalShard) -> LocalShard:
    """The same shard in memory that jobs read: of the host, or contiguous on its CUDA device. Lazy conjugation and
    negation are resolved. What has to be copied for this is copied by torch, on a device in its current stream.
    """
    tensor = shard.tensor
    if tensor.is_cpu or not is_reached(tensor):
        return tensors.on_host(shard)
    tensor = tensor.detach()
    if tensor.is_contiguous() and not tensors.is_lazy(tensor):
        return LocalShard(shard.item, tensor)
    try:
        return LocalShard(shard.item, tensor.resolve_conj().resolve_neg().contiguous())
    except torch.OutOfMemoryError:
        return tensors.on_host(shard)


def copy_of(tensor: torch.Tensor) -> torch.Tensor:
    """A copy that stays as the tensor is where its current stream is now: on its device, or on the host if there is no
    room.
    """
    try:
        return tensor.detach().clone()
    except torch.OutOfMemoryError:
        return tensor.detach().cpu()


def current_streams(ordinals: Iterable[int]) -> dict[Any, int]:
    """By ordinal the handle of this thread's current stream."""
    return {ordinal: torch.cuda.current_stream(ordinal).cuda_stream for ordinal in ordinals}


def _torch_has_begun() -> bool:
    return bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]


def refuse_capture() -> None:
    """Before anything is enqueued for a save.

    Raises:
        RuntimeError: the current stream is being captured into a CUDA graph, so that nothing of the save would happen.
    """
    if _torch_has_begun() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "a stream that is being captured into a CUDA graph cannot be saved from; save before or after the capture"
        )


def mark_streams(ordinals: Iterable[int]) -> Any:
    """A mark in the current stream of each device.

    Raises:
        RuntimeError: a stream is being captured into a CUDA graph.
    """
    return _native.CudaMark(current_streams(ordinals))


class Marked:
    """A moment in the streams that were current on one thread, for what another thread does about it later."""

    def __init__(self) -> None:
        # The driver is asked only where torch has begun with it: a process without it must stay able to fork.
        self._mark: Any = None
        self._ordinals: list[int] = []
        self._events: dict[int, Any] = {}
        if not _torch_has_begun():
            return
        if absence():  # torch copies to the host, and knows its own devices
            has_context: Any = vars(torch._C)["_cuda_hasPrimaryContext"]  # a torch without CUDA has no such function
            self._events = {
                ordinal: torch.cuda.current_stream(ordinal).record_event()
                for ordinal in range(torch.cuda.device_count())
                if has_context(ordinal)
            }
            return
        self._ordinals = _native.cuda_devices_in_use()
        if self._ordinals:
            self._mark = mark_streams(self._ordinals)

    @contextmanager
    def beside(self) -> Iterator[None]:
        """What torch does on this thread follows the mark, beside what other threads' streams do meanwhile, captures
        of graphs included. For a thread that does nothing else.
        """
        if self._mark is not None:
            _native.cuda_ignore_captures()  # torch's allocator calls cudaMalloc, which would end them
        with ExitStack() as stack:
            for ordinal, event in self._events.items():
                stream = _side_stream(ordinal)
                stream.wait_event(event)
                stack.enter_context(torch.cuda.stream(stream))
            for ordinal in self._ordinals:
                stream = _side_stream(ordinal)
                self._mark.hold_back(ordinal, stream.cuda_stream)
                stack.enter_context(torch.cuda.stream(stream))
            yield
