"""What carries bytes to the ranks of a load: memory that a node's ranks share, the process group, copies to a device.

Each link moves the same number of bytes to every rank, all ranks at once, in pieces as large as those of a load in
which ranks read for each other. A rate is the bytes that arrive at one rank over the seconds of the slowest rank.
Links take turns, one sample of each per round, after one that does not count and whose bytes are compared.
"""

from __future__ import annotations

import mmap
import os
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from typing import Any, ClassVar, Literal

import torch
import torch.distributed as dist

from .environment import environment, memory_available_bytes
from .ranks import Ranks
from .results import Document, Link, new_document

__all__ = ["NBYTES_DEFAULT", "SAMPLES_DEFAULT", "begin", "measure"]

NBYTES_DEFAULT = 256 << 20
SAMPLES_DEFAULT = 5
PIECE_BYTES = 16 << 20
_SPARE_BYTES = 64 << 20
_COPIES = 3  # of the bytes in a rank's memory: source, target, and on the first rank of a node what it shares

_ALONE = "one rank: nobody to send to"


def begin(ranks: Ranks, device: str, command: Sequence[str]) -> Document:
    """A document of kind "link" that has measured nothing. No storage takes part, and its facts are empty."""
    facts = environment(os.sep, device=device, ranks=ranks.world, nodes=ranks.nodes, backend=ranks.backend)
    facts["storage"] = {"file_system": "", "device": "", "directory": ""}
    document = new_document("link", command, facts)
    document["links"] = []
    return document


def measure(
    document: Document,
    ranks: Ranks,
    device: Literal["cpu", "cuda"],
    *,
    nbytes: int = NBYTES_DEFAULT,
    samples: int = SAMPLES_DEFAULT,
    report: Callable[[str], None] = lambda text: None,
) -> None:
    """Fills `document` as it goes, on every rank alike. `nbytes` is rounded up to whole pieces for every rank.

    Raises:
        OSError: too little memory, with the numbers. RankFailedError: a rank has died or left.
    """
    from .. import RankFailedError

    began = time.monotonic()
    grain = PIECE_BYTES * ranks.world
    nbytes = -(-nbytes // grain) * grain
    _check_memory(nbytes, ranks)
    links: list[_Running] = []
    with ExitStack() as opened:
        try:
            for kind in _LINKS:
                links.append(_Running(document, kind(ranks, device, nbytes)))
                opened.callback(links[-1].link.close)
            for number in range(samples + 1):
                for one in links:
                    report(f"{f'round {number} of {samples}' if number else 'warming up'}: {one.name}")
                    one.sample(document, ranks, counts=number > 0)
                document["seconds"] = time.monotonic() - began
        except RuntimeError as error:  # of the process group
            raise RankFailedError(f"another rank has died or left: {error}") from error
    document["complete"] = not document["problems"]


def _check_memory(nbytes: int, ranks: Ranks) -> None:
    on_node = max(1, ranks.world // ranks.nodes)
    needed, available = on_node * (_COPIES * nbytes + _SPARE_BYTES), min(ranks.gather(memory_available_bytes()))
    if needed > available:
        raise OSError(
            12, f"{needed} bytes of memory are needed on a node and {available} are available; give a smaller --size"
        )


class _Link(ABC):
    """`move` brings all bytes to this rank once. `arriving`: how many that are."""

    transport: ClassVar[str]
    operation: ClassVar[str]

    def __init__(self, ranks: Ranks, device: str, nbytes: int) -> None:
        self.ranks = ranks
        self.device = device
        self.nbytes = nbytes

    @property
    def arriving(self) -> int:
        return self.nbytes

    @abstractmethod
    def refusal(self) -> str | None:
        """Why it cannot be measured here, alike on all ranks; None when it can."""

    @abstractmethod
    def open(self) -> None:
        """Makes its memory; on all ranks."""

    @abstractmethod
    def move(self) -> None: ...

    @abstractmethod
    def arrived(self) -> bool:
        """Whether what came is what was sent."""

    def close(self) -> None:  # noqa: B027, most have nothing to do
        """Lets go of memory that has a name."""


class _SharedMemory(_Link):
    """Ranks of a node copy out of memory that they share, as they do in a load with "scatter" or "broadcast"."""

    transport = "memory"
    operation = "copy"
    _shared: torch.Tensor | None = None

    def refusal(self) -> str | None:
        if self.ranks.world == self.ranks.nodes:
            return "one rank on a node: nobody to share with"
        return None if all(self.ranks.gather(os.access("/dev/shm", os.W_OK))) else "/dev/shm cannot be written"

    def open(self) -> None:
        file, path, problem = None, "", ""
        try:
            if self.ranks.local_rank == 0:
                file = tempfile.NamedTemporaryFile(dir="/dev/shm", prefix="snapstone-bench-")  # noqa: SIM115
                path = file.name
                os.posix_fallocate(file.fileno(), 0, self.nbytes)
        except OSError as error:
            problem = f"{path}: {error.strerror}"
        on_node = self.ranks.world // self.ranks.nodes
        made = self.ranks.gather((path, problem))
        try:
            self._map(*made[self.ranks.rank // on_node * on_node])
        finally:
            self.ranks.barrier()
            if file is not None:
                file.close()  # and removed: the memory goes with its last mapping

    def _map(self, path: str, problem: str) -> None:
        if problem:
            raise OSError(problem)
        with open(path, "r+b") as shared:
            memory = mmap.mmap(shared.fileno(), self.nbytes)
        self._shared = torch.frombuffer(memory, dtype=torch.uint8)
        if self.ranks.local_rank == 0:
            _fill(self._shared)
        self._target = torch.zeros(self.nbytes, dtype=torch.uint8)

    def move(self) -> None:
        assert self._shared is not None
        for at in range(0, self.nbytes, PIECE_BYTES):
            self._target[at : at + PIECE_BYTES].copy_(self._shared[at : at + PIECE_BYTES])

    def arrived(self) -> bool:
        return _is_filled(self._target)

    def close(self) -> None:
        self._shared = None


class _Group(_Link):
    """The process group: gloo between CPUs, NCCL between devices."""

    place: ClassVar[str]  # of tensors

    def refusal(self) -> str | None:
        if self.ranks.world == 1:
            return _ALONE
        if self.place == "cuda" and self.device != "cuda":
            return "no CUDA device was asked for: --device cuda"
        return None


class _Broadcast(_Group):
    operation = "broadcast"

    def open(self) -> None:
        self._memory = torch.zeros(self.nbytes, dtype=torch.uint8, device=self.place)
        if self.ranks.rank == 0:
            _fill(self._memory)

    def move(self) -> None:
        for at in range(0, self.nbytes, PIECE_BYTES):
            dist.broadcast(self._memory[at : at + PIECE_BYTES], 0)

    def arrived(self) -> bool:
        return _is_filled(self._memory)


class _AllGather(_Group):
    """Every rank has a part, and gets those of the others."""

    operation = "all_gather"

    @property
    def arriving(self) -> int:
        world = self.ranks.world
        return self.nbytes // PIECE_BYTES * (PIECE_BYTES // world) * (world - 1)

    def open(self) -> None:
        self._part = torch.full((PIECE_BYTES // self.ranks.world,), self.ranks.rank, dtype=torch.uint8).to(self.place)
        self._all = [torch.zeros_like(self._part) for _ in range(self.ranks.world)]

    def move(self) -> None:
        for _ in range(self.nbytes // PIECE_BYTES):
            dist.all_gather(self._all, self._part)

    def arrived(self) -> bool:
        return all(bool((part == rank % 256).all()) for rank, part in enumerate(self._all))


class _GlooBroadcast(_Broadcast):
    transport, place = "gloo", "cpu"


class _GlooAllGather(_AllGather):
    transport, place = "gloo", "cpu"


class _NcclBroadcast(_Broadcast):
    transport, place = "nccl", "cuda"


class _NcclAllGather(_AllGather):
    transport, place = "nccl", "cuda"


class _Copy(_Link):
    """Between the device and pinned memory of its host."""

    transport = "cuda"

    def refusal(self) -> str | None:
        return None if self.device == "cuda" else "no CUDA device was asked for: --device cuda"

    def open(self) -> None:
        host = torch.zeros(self.nbytes, dtype=torch.uint8, pin_memory=True)
        device = torch.zeros(self.nbytes, dtype=torch.uint8, device="cuda")
        self._source, self._target = (device, host) if self.operation == "d2h" else (host, device)
        _fill(self._source)

    def move(self) -> None:
        for at in range(0, self.nbytes, PIECE_BYTES):
            self._target[at : at + PIECE_BYTES].copy_(self._source[at : at + PIECE_BYTES], non_blocking=True)

    def arrived(self) -> bool:
        return _is_filled(self._target)


class _ToHost(_Copy):
    operation = "d2h"


class _ToDevice(_Copy):
    operation = "h2d"


_LINKS: tuple[type[_Link], ...] = (
    _SharedMemory,
    _GlooBroadcast,
    _GlooAllGather,
    _NcclBroadcast,
    _NcclAllGather,
    _ToHost,
    _ToDevice,
)


def _fill(memory: torch.Tensor) -> None:
    """Each piece with a byte of its own."""
    for number, at in enumerate(range(0, memory.numel(), PIECE_BYTES)):
        memory[at : at + PIECE_BYTES] = number % 251 + 1


def _is_filled(memory: torch.Tensor) -> bool:
    pieces = range(0, memory.numel(), PIECE_BYTES)
    return all(bool((memory[at : at + PIECE_BYTES] == number % 251 + 1).all()) for number, at in enumerate(pieces))


class _Running:
    """A link and its row of the document. One that fails on a rank is not tried again on any."""

    def __init__(self, document: Document, link: _Link) -> None:
        self.link = link
        self.name = f"{link.transport} {link.operation}"
        self.row: Link = {
            "transport": link.transport,
            "operation": link.operation,
            "bytes_per_second": [],
            "nbytes": link.arriving,
            "reason": link.refusal(),
        }
        document["links"].append(self.row)
        if self.row["reason"] is None:
            self._everywhere(document, link.open)

    def sample(self, document: Document, ranks: Ranks, *, counts: bool) -> None:
        if self.row["reason"] is not None:
            return
        ranks.barrier()
        began = time.perf_counter()
        self.link.move()
        if self.link.device == "cuda":
            torch.cuda.synchronize()
        seconds = max(ranks.gather(time.perf_counter() - began))
        if counts:
            self.row["bytes_per_second"].append(self.link.arriving / seconds)
        elif not all(ranks.gather(self.link.arrived())):
            self._stop(document, "what arrived is not what was sent")

    def _everywhere(self, document: Document, step: Callable[[], Any]) -> None:
        problem = None
        try:
            step()
        except (OSError, RuntimeError) as error:
            problem = f"{type(error).__name__}: {error}"
        problems = [found for found in self.link.ranks.gather(problem) if found is not None]
        if problems:
            self._stop(document, problems[0])

    def _stop(self, document: Document, reason: str) -> None:
        self.row["reason"] = reason
        document["problems"].append(f"{self.name}: {reason}")
        with suppress(OSError):
            self.link.close()
