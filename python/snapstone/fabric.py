"""Bytes between ranks over their process group. Whoever calls has made sure, by a vote, that all ranks call."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from .collective import Deadline, Group
from .errors import CheckpointError, RankFailedError

__all__ = ["Fabric", "Message"]

_WAIT_SECONDS_MAX = 24 * 3600.0  # what gloo and NCCL take for a timeout
_NAMING_SECONDS = 2.0
_orphans: list[Any] = []  # of transfers that failed: the backend may still write there


@contextmanager
def _broken(*buffers: Any, peer: int | None = None) -> Iterator[None]:
    """`peer`: the global rank that the work is with, if it is with one."""
    try:
        yield
    except BaseException as error:
        _orphans.append(buffers)
        if not isinstance(error, RuntimeError):
            raise
        reason = str(error).partition("\n")[0]
        where = "" if peer is None else f" with rank {peer}"
        raise RankFailedError(
            f"the process group broke while ranks exchanged bytes{where} ({reason})",
            failed_ranks=() if peer is None else (peer,),
        ) from error


def _check_time(deadline: Deadline) -> None:
    """Who comes after the deadline would blame a peer that has waited, or has left."""
    if deadline.expired:
        raise CheckpointError(f"ranks did not end within {deadline.seconds:g} s what comes before an exchange of bytes")


def _limit(deadline: Deadline) -> timedelta:
    """Before the deadline, so that a rank that waits for a lost peer can name it while the others still listen."""
    left = deadline.remaining()
    return timedelta(seconds=min(max(left - min(_NAMING_SECONDS, left / 10), 1e-3), _WAIT_SECONDS_MAX))


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
        """Returns when all have left and arrived. RankFailedError when the backend fails, or is late: it names the
        peer of the first message that did not get through. CheckpointError after the deadline.
        """
        if not sends and not receives:
            return
        _check_time(deadline)
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
        with _broken(staged, landing):
            works = dist.batch_isend_irecv(operations)
        peers = [operation.peer for operation in operations] if len(works) == len(operations) else [None] * len(works)
        for work, peer in zip(works, peers, strict=True):
            with _broken(staged, landing, peer=peer):
                work.wait(_limit(deadline))
        with _broken(staged, landing):
            if device.type != "cpu":
                torch.accelerator.synchronize()
        if device.type != "cpu":
            for message, memory in zip(receives, landing, strict=True):
                message.memory.copy_(memory)

    def all_gather(self, payload: bytes, deadline: Deadline) -> list[bytes]:
        """Every rank's payload, in rank order."""
        _check_time(deadline)
        lengths = self._gather(torch.tensor([len(payload)]), deadline)
        longest = max(int(length) for length in lengths)
        mine = torch.zeros(longest, dtype=torch.uint8)
        if payload:
            mine[: len(payload)] = torch.frombuffer(bytearray(payload), dtype=torch.uint8)
        gathered = self._gather(mine, deadline) if longest else [mine] * len(lengths)
        return [one.numpy()[: int(length)].tobytes() for one, length in zip(gathered, lengths, strict=True)]

    def _gather(self, mine: torch.Tensor, deadline: Deadline) -> list[torch.Tensor]:
        device = self._device()
        staged = mine.to(device)
        gathered = [torch.empty_like(staged) for _ in range(self._group.world_size)]
        with _broken(staged, gathered):
            work = dist.all_gather(gathered, staged, self._process_group, async_op=True)
            assert work is not None
            work.wait(_limit(deadline))
        return [one.cpu() for one in gathered]

    def _device(self) -> torch.device:
        group: Any = dist.group.WORLD if self._process_group is None else self._process_group
        if torch.device("cpu") in group._device_types:
            return torch.device("cpu")
        accelerator = torch.accelerator.current_accelerator()
        assert accelerator is not None
        return torch.device(accelerator.type, torch.accelerator.current_device_index())
