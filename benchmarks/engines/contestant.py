"""What a run measures: something that saves a state into a new directory and loads it back into tensors that exist."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import page_cache
from states import State

__all__ = ["Contestant", "Engine", "Saved", "Setting", "nothing_left", "waiting_for"]


@dataclass(frozen=True, slots=True)
class Setting:
    """What contestants may need to know of the run."""

    host_memory_budget: int  # bytes, holds the whole state
    disk_limit: str | None  # the compiled probe, or
    disk_limit_missing: str  # why there is none


class Saved(NamedTuple):
    durable_seconds: float
    stall_seconds: float | None  # until the caller may change the state; None for an engine that blocks to the end


class Contestant(ABC):
    """A row of the tables, made once per process. `save` gets a directory that does not exist, `load` one it filled."""

    label: str
    family: str  # contestants of one family keep memory for each other
    package: ClassVar[str | None] = None  # the distribution whose version is recorded
    loads: bool = True
    is_probe: ClassVar[bool] = False  # moves bytes of its own instead of the state
    memory_budget: int | None = None  # bytes beside the state that a save may use, where the engine promises a bound

    def unavailable(self) -> str | None:
        """Why this cannot run here, or None."""
        return None

    @abstractmethod
    def save(self, state: State, directory: Path, during: Callable[[], None] | None = None) -> Saved:
        """Saves until durable. `during` runs as soon as the caller may change the state."""

    @abstractmethod
    def load(self, target: State, directory: Path) -> float:
        """Fills `target`; seconds."""

    def close(self) -> None:  # noqa: B027, most have nothing to do
        """Ends what runs in the background."""


def nothing_left() -> None:
    """What a blocking `begin` returns."""


def waiting_for(future: Any) -> Callable[[], None]:
    """What a `begin` returns that left the work to `future`."""

    def wait() -> None:
        future.result()

    return wait


class Engine(Contestant):
    """A checkpoint engine, timed from outside. What it leaves to the kernel is synced in its time."""

    asynchronous: ClassVar[bool] = False
    unsynced: ClassVar[Literal["nothing", "directories", "files"]]

    @abstractmethod
    def begin(self, state: State, directory: Path) -> Callable[[], None]:
        """Returns once the state may change; what it returns waits until the engine calls the checkpoint saved."""

    @abstractmethod
    def fill(self, target: State, directory: Path) -> None: ...

    def save(self, state: State, directory: Path, during: Callable[[], None] | None = None) -> Saved:
        begin = time.perf_counter()
        finish = self.begin(state, directory)
        stall = time.perf_counter() - begin
        if during is not None:
            during()
        finish()
        if self.unsynced == "files":
            page_cache.fsync_files(directory)
        if self.unsynced != "nothing":
            page_cache.fsync_directories(directory)
        return Saved(time.perf_counter() - begin, stall if self.asynchronous else None)

    def load(self, target: State, directory: Path) -> float:
        begin = time.perf_counter()
        self.fill(target, directory)
        return time.perf_counter() - begin
