"""One rank's training loop, with saves or without, each part of each step on the clock.

A block of n steps with a save every `interval` steps: the save begins at the head of its step, the fence stands before
the optimizer's step, and after the last step everything still in flight is waited for: the drain, a step of its own.
"""

from __future__ import annotations

import ctypes
import os
import threading
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

from torch.distributed.checkpoint.api import CheckpointException

from .engines import Engine, Pending
from .workload import Workload

__all__ = ["ENGINE_ERRORS", "Block", "Flight", "Saver", "StepTimes", "run_block", "sync_file_system"]

# DCP's is no Exception; there are engines that end the process when something goes wrong.
ENGINE_ERRORS: Final = (Exception, CheckpointException, SystemExit)

_libc = ctypes.CDLL(None, use_errno=True)


def sync_file_system(directory: Path) -> None:
    """syncfs(2) of the file system of `directory`: what an engine left in the page cache reaches the disk."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        if _libc.syncfs(descriptor) != 0:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code), os.fspath(directory))
    finally:
        os.close(descriptor)


@dataclass(slots=True)
class StepTimes:
    """Seconds of one step on one rank; what is in none of the parts was spent on the step itself."""

    total: float = 0.0
    call: float = 0.0
    wait_previous: float = 0.0
    fence: float = 0.0
    finalize: float = 0.0
    saving: bool = False
    in_flight: bool = False
    drain: bool = False

    @property
    def parts(self) -> float:
        return self.call + self.wait_previous + self.fence + self.finalize


class Flight:
    """A save in flight. A thread waits until the engine calls it saved, then syncs for engines that do not."""

    def __init__(self, pending: Pending, directory: Path, step: int, begin: float, *, syncs: bool) -> None:
        self.pending = pending
        self.directory = directory
        self.step = step
        self.begin = begin
        self.called = time.perf_counter()  # the call has returned
        self.fence_begin: float | None = None
        self.fenced: float | None = None
        self.saved = 0.0
        self.durable = 0.0
        self.error: BaseException | None = None
        self._syncs = syncs
        self._thread = threading.Thread(target=self._watch, name="bench-watch", daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        try:
            self.pending.wait()
            self.saved = time.perf_counter()
            if not self._syncs:
                sync_file_system(self.directory.parent)
        except BaseException as error:
            self.error = error
        self.durable = time.perf_counter()

    @property
    def done(self) -> bool:
        return not self._thread.is_alive()

    def fence(self) -> None:
        if self.fenced is None:
            self.fence_begin = time.perf_counter()
            self.pending.fence()
            self.fenced = time.perf_counter()

    def finish(self) -> None:
        """Raises what the save raised."""
        self.pending.complete()
        self._thread.join()
        self.pending.finish()
        if self.error is not None:
            raise self.error


@dataclass(slots=True)
class Saver:
    """Saves of one engine, one at a time. The first error ends saving; training goes on, in step with other ranks."""

    engine: Engine
    workload: Workload
    root: Path
    step: int = 0
    skipped: int = 0
    error: BaseException | None = None
    flight: Flight | None = None
    finished: list[Flight] = field(default_factory=list)

    def begin(self, times: StepTimes) -> None:
        if self.error is not None:
            return
        times.saving = True
        start = time.perf_counter()
        self._finish()
        begin = time.perf_counter()
        times.wait_previous += begin - start
        if self.error is None:
            try:
                self._call(begin)
            except ENGINE_ERRORS as error:
                self.error = error
        times.call += time.perf_counter() - begin

    def _call(self, begin: float) -> None:
        self.step += 1
        directory = self.root / f"step-{self.step:08d}"
        pending = self.engine.save(self.workload.state, directory, self.step)
        if pending is None:
            self.skipped += 1
        else:
            self.flight = Flight(pending, directory, self.step, begin, syncs=self.engine.syncs)

    def fence(self, times: StepTimes) -> None:
        if self.flight is None or self.flight.fenced is not None:
            return
        begin = time.perf_counter()
        try:
            self.flight.fence()
        except ENGINE_ERRORS as error:
            self.error = self.error or error
        times.fence += time.perf_counter() - begin

    def poll(self, times: StepTimes) -> None:
        """After a step: whether something was in flight in it, and what the engine wants on this thread."""
        times.in_flight = self.flight is not None
        if self.flight is None:
            return
        begin = time.perf_counter()
        try:
            self.engine.poll()
        except ENGINE_ERRORS as error:
            self.error = self.error or error
        if self.flight.done:
            self._finish()
        times.finalize += time.perf_counter() - begin

    def drain(self, times: StepTimes) -> None:
        begin = time.perf_counter()
        self._finish()
        times.finalize += time.perf_counter() - begin

    def _finish(self) -> None:
        flight, self.flight = self.flight, None
        if flight is None:
            return
        try:
            flight.finish()
        except ENGINE_ERRORS as error:
            self.error = self.error or error
        else:
            self.finished.append(flight)


@dataclass(slots=True)
class Block:
    """What one rank measured in one block; `as_values` travels to rank 0."""

    steps: list[StepTimes]
    durable_seconds: list[float]
    skipped: int
    error: str | None

    def as_values(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def of(cls, values: dict[str, Any]) -> Block:
        return cls(**{**values, "steps": [StepTimes(**step) for step in values["steps"]]})


def run_block(workload: Workload, saver: Saver | None, steps: int, interval: int) -> Block:
    """`steps` steps, and with a saver a save in every `interval`-th, from the first."""
    measured: list[StepTimes] = []
    if saver is not None:
        saver.finished.clear()
        saver.skipped = 0
    workload.synchronize()
    for number in range(steps):
        times = StepTimes()
        begin = time.perf_counter()
        if saver is not None and number % interval == 0:
            saver.begin(times)
        workload.compute()
        if saver is not None:
            saver.fence(times)
        workload.update()
        workload.synchronize()
        if saver is not None:
            saver.poll(times)
        times.total = time.perf_counter() - begin
        measured.append(times)
    if saver is None:
        return Block(measured, [], 0, None)
    times = StepTimes(drain=True)
    saver.drain(times)
    times.total = times.finalize
    measured.append(times)
    durable = [flight.durable - flight.begin for flight in saver.finished]
    return Block(measured, durable, saver.skipped, described(saver.error))


def described(error: BaseException | None) -> str | None:
    """One line."""
    return None if error is None else f"{type(error).__name__}: {' '.join(str(error).split())}"[:600]
