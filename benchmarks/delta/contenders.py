"""Who saves a state of which most may be in the checkpoint before. `begin` saves that checkpoint, and is not timed."""

from __future__ import annotations

import importlib
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar

import page_cache
import torch
from engines.contestant import Setting
from engines.dcp import Dcp
from engines.snapstone import Snapstone
from machine import version_of
from states import State

import snapstone as ss
from snapstone import _native

__all__ = ["CONTENDERS", "Contender"]

CHUNK_BYTES = 1 << 20
_SETTING = Setting(1 << 30, None, "")


class Contender(ABC):
    """Of one process. `save` and `load` get directories that the measurement makes and removes."""

    name: ClassVar[str]
    label: str
    role: ClassVar[str]  # "ours", "reference" for what it is compared with, or "context"
    package: ClassVar[str]  # the distribution whose version is recorded
    loads: ClassVar[bool] = True
    depends_on_change: ClassVar[bool] = False  # what it writes; then every case is checked

    def unavailable(self) -> str | None:
        """Why this cannot run here, or None."""
        return None

    def begin(self, state: State, directory: Path) -> None:  # noqa: B027, most need no checkpoint before
        """Saves the state before the change, in a directory that stays."""

    @abstractmethod
    def save(self, state: State, directory: Path) -> dict[str, float]:
        """Saves until durable: `save_seconds`, and `written_bytes` of files that no other checkpoint has."""

    def load(self, target: State, directory: Path) -> None:
        raise NotImplementedError

    def close(self) -> None:  # noqa: B027, most have nothing to end
        """Lets go of what it keeps in memory."""


def written_bytes(directory: Path) -> int:
    """On disk, of files that have no name elsewhere."""
    found = (path.lstat() for path in directory.rglob("*") if path.is_file())
    return sum(stat.st_blocks * 512 for stat in found if stat.st_nlink == 1)


class Full(Contender):
    name = "full"
    label = "snapstone, full save"
    role = "reference"
    package = "snapstone"

    def __init__(self) -> None:
        self._engine = Snapstone(_SETTING)

    def save(self, state: State, directory: Path) -> dict[str, float]:
        seconds = self._engine.save(state, directory).durable_seconds
        return {"save_seconds": seconds, "written_bytes": written_bytes(directory)}

    def load(self, target: State, directory: Path) -> None:
        self._engine.fill(target, directory)


class Delta(Full):
    name = "delta"
    label = "snapstone, save(base=...)"
    role = "ours"
    depends_on_change = True

    def begin(self, state: State, directory: Path) -> None:
        self._base = directory
        ss.save(state, checkpoint_id=directory)

    def save(self, state: State, directory: Path) -> dict[str, float]:
        begin = time.perf_counter()
        ss.save(state, checkpoint_id=directory, base=self._base)
        return {"save_seconds": time.perf_counter() - begin, "written_bytes": written_bytes(directory)}


class StockDcp(Contender):
    name = "dcp"
    label = "DCP save, 2 threads"
    role = "context"
    package = "torch"

    def __init__(self) -> None:
        self._engine = Dcp(_SETTING, thread_count=2)

    def save(self, state: State, directory: Path) -> dict[str, float]:
        seconds = self._engine.save(state, directory).durable_seconds
        return {"save_seconds": seconds, "written_bytes": written_bytes(directory)}

    def load(self, target: State, directory: Path) -> None:
        self._engine.fill(target, directory)


class _Holder:
    """What moonclip takes for a model."""

    def __init__(self, state: State) -> None:
        self._state = state

    def state_dict(self) -> State:
        return self._state


class Moonclip(Contender):
    """Blocking and without compression, which random bits only cost time. It compares with its last full save, whose
    bytes it keeps in memory, and has a directory of its own for all saves.
    """

    name = "moonclip"
    label = "moonclip, blocking, no compression"
    role = "context"
    package = "moonclip"
    depends_on_change = True
    _MANY: ClassVar[int] = 1 << 20

    def __init__(self) -> None:
        self._manager: Any = None
        self._steps = 0

    def unavailable(self) -> str | None:
        return None if version_of("moonclip") else "moonclip is not installed"

    def begin(self, state: State, directory: Path) -> None:
        self._directory = directory
        self._manager = importlib.import_module("moonclip").CheckpointManager(
            str(directory),
            compression_level=0,
            async_save=False,
            full_every_steps=self._MANY,
            max_deltas_per_full=self._MANY,
            max_total_snapshots=self._MANY,
            merge_max_chain=self._MANY,
        )
        self.save(state, directory)

    def save(self, state: State, directory: Path) -> dict[str, float]:
        before = written_bytes(self._directory)
        self._steps += 1
        begin = time.perf_counter()
        self._manager.save(step=self._steps, model=_Holder(state))
        self._manager.flush()
        page_cache.fsync_directories(self._directory)
        seconds = time.perf_counter() - begin
        return {"save_seconds": seconds, "written_bytes": written_bytes(self._directory) - before}

    def load(self, target: State, directory: Path) -> None:
        _, found = self._manager.load_latest()
        for name, tensor in target.items():
            tensor.copy_(found["model"][name])

    def close(self) -> None:
        self._manager = None


class Hashing(Contender):
    """What a save that writes nothing has to do at least: XXH3-128 of every chunk, on as many threads as the engine."""

    name = "hashing"
    label = "hashing the state alone"
    role = "reference"
    package = "xxhash"
    loads = False

    def unavailable(self) -> str | None:
        return None if version_of("xxhash") else "xxhash is not installed"

    def save(self, state: State, directory: Path) -> dict[str, float]:
        digest = importlib.import_module("xxhash").xxh3_128_digest
        chunks = []
        for tensor in state.values():
            memory = memoryview(tensor.view(-1).view(torch.uint8).numpy())
            chunks += [memory[at : at + CHUNK_BYTES] for at in range(0, len(memory), CHUNK_BYTES)]
        lanes = _native.ring_facts()["lanes"] or int(os.environ.get("SNAPSTONE_LANES", "0")) or 2

        def hash_every_nth(first: int) -> None:
            for chunk in chunks[first::lanes]:
                digest(chunk)

        with ThreadPoolExecutor(lanes) as pool:
            begin = time.perf_counter()
            list(pool.map(hash_every_nth, range(lanes)))
            return {"save_seconds": time.perf_counter() - begin, "written_bytes": 0}


CONTENDERS: Mapping[str, Callable[[], Contender]] = {
    one.name: one for one in (Delta, Full, StockDcp, Moonclip, Hashing)
}
