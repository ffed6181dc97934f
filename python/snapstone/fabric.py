"""Bytes between ranks over their process group. Whoever calls has made sure, by a vote, that all ranks call."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from .collective import Deadline, Group
from .errors import RankFailedError

__all__ = ["Fabric", "Message"]

_WAIT_SECONDS_MAX = 24 * 3600.0  # what gloo and NCCL take for a timeout
_orphans: list[Any] = []  # of transfers that failed: the backend may still write there


class Message(NamedTuple):
    """`memory` (uint8, host, contiguous) for or from rank `peer` of the group; `tag` is the same on both sides."""

    memory: torch.Tensor
    peer: int
    tag: int


class Fabric:
    """Point-to-point transfers over `process_group` (default: all ranks), which `group` was made from.

    Over a group without a backend for host memory (NCCL alone) messages pass through this rank's current device.
    """

    def __init__(self, process_group: dist.ProcessGroup | None, group: Group) -> None:
        self._process_group = process_group
        self._group = group

    def transfer(self, sends: Sequence[Message], receives: Sequence[Message], deadline: Deadline) -> None:
        """Returns when all have left and arrived. RankFailedError when the backend fails, or is late."""
        if not sends and not receives:
            return
        device = self._device()
        staged = [message.memory.to(device) for message in sends]
        landing = [message.memory if device.type == "cpu" else message.memory.to(device) for message in receives]
        ranks = self._group.ranks
        operations = [
            dist.P2POp(dist.isend, memory, ranks[message.peer], self._process_group, message.tag)
            for message, memory in zip(sends, staged, strict=True)
        ] + [
            dist.P2POp(dist.irecv, memory, ranks[message.peer], self._process_group, message.tag)
            for message, memory in zip(receives, landing, strict=True)
        ]
        try:
            for work in dist.batch_isend_irecv(operations):
                work.wait(timedelta(seconds=min(max(deadline.remaining(), 1e-3), _WAIT_SECONDS_MAX)))
            if device.type != "cpu":
                torch.accelerator.synchronize()
        except RuntimeError as error:
            _orphans.append((staged, landing))
            reason = str(error).partition("\n")[0]
            raise RankFailedError(f"the process group broke while ranks exchanged bytes ({reason})") from error
        if device.type != "cpu":
            for message, memory in zip(receives, landing, strict=True):
                message.memory.copy_(memory)

    def _device(self) -> torch.device:
        group: Any = dist.group.WORLD if self._process_group is None else self._process_group
        if torch.device("cpu") in group._device_types:
            return torch.device("cpu")
        accelerator = torch.accelerator.current_accelerator()
        assert accelerator is not None
        return torch.device(accelerator.type, torch.accelerator.current_device_index())
