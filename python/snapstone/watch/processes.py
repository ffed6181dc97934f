"""What the processes that save into a run say themselves, in their status pages: those of this machine."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from .. import status_page
from ..status_page import Ring, SaveStatus

__all__ = ["Processes", "RunProcess", "Trouble", "look_at_processes"]

_SILENT_SECONDS = 60.0  # a process that saves writes its page four times a second
_FORGOTTEN_SECONDS = 86400.0  # what a dead process left is old news then


@dataclass(frozen=True, slots=True)
class RunProcess:
    """One process, and its saves into the run. `state`: "unknown" for one of another machine or container."""

    host: str
    pid: int
    state: Literal["live", "dead", "unknown"]
    updated_at: float
    ring: Ring
    committed: int
    failed: int
    saves: tuple[SaveStatus, ...]

    @property
    def saving(self) -> list[SaveStatus]:
        """In flight; of a dead process those that died with it."""
        return [save for save in self.saves if save.state == "saving"]

    @property
    def last(self) -> SaveStatus | None:
        """The one that ended last."""
        ended = [save for save in self.saves if save.ended_at is not None]
        return max(ended, key=lambda save: save.ended_at or 0.0, default=None)


@dataclass(frozen=True, slots=True)
class Trouble:
    """A rank's last save, which failed, or died with its process."""

    rank: int
    name: str
    step: int | None
    stage: str
    at: float
    error: str


@dataclass(frozen=True)
class Processes:
    """Those that have saved into the run, dead ones only if they have trouble to tell of."""

    all: tuple[RunProcess, ...] = ()

    @cached_property
    def living(self) -> list[RunProcess]:
        return [one for one in self.all if one.state != "dead"]

    @cached_property
    def saving(self) -> list[SaveStatus]:
        """Saves in flight, by rank: one entry for each rank of this machine."""
        return sorted((save for one in self.living for save in one.saving), key=lambda save: (save.rank, save.begun_at))

    @cached_property
    def troubles(self) -> list[Trouble]:
        """By rank: what ended badly and has not been followed by a save that did not."""
        latest: dict[int, tuple[float, Trouble | None]] = {}
        for at, rank, trouble in (found for one in self.all for found in _endings(one)):
            if rank not in latest or at >= latest[rank][0]:
                latest[rank] = at, trouble
        return [found for _, (_, found) in sorted(latest.items()) if found is not None]

    @property
    def committed(self) -> int:
        """Saves of single ranks that these processes have ended well, each since it began."""
        return sum(one.committed for one in self.all)

    @property
    def failed(self) -> int:
        return sum(one.failed for one in self.all)

    @property
    def world_size(self) -> int:
        """Ranks of the save that began last; 0 when there is none."""
        saves = [save for one in self.all for save in one.saves]
        return max(saves, key=lambda save: save.begun_at).world_size if saves else 0

    @property
    def ring_bytes(self) -> int:
        return sum(one.ring.nbytes for one in self.living)

    @property
    def ring_used_bytes(self) -> int:
        return sum(one.ring.used_bytes for one in self.living)


def _endings(one: RunProcess) -> Iterable[tuple[float, int, Trouble | None]]:
    """When the saves of a process ended, and on which rank, and how badly."""
    if one.state == "dead":
        for save in one.saving:
            text = f"the process {one.pid} died"
            yield one.updated_at, save.rank, Trouble(save.rank, save.name, save.step, save.stage, one.updated_at, text)
    save_ended = one.last
    if save_ended is not None:
        save, at = save_ended, save_ended.ended_at or 0.0
        bad = save.state == "failed"
        text = save.error or "no reason given"
        yield at, save.rank, Trouble(save.rank, save.name, save.step, save.stage, at, text) if bad else None


def look_at_processes(run: str) -> Processes:
    """The pages of processes that save into `run`."""
    wanted = os.path.realpath(run)
    found = []
    for _, page in status_page.find(status_page.directory()):
        mine = [one for one in page.runs if os.path.realpath(one.run) == wanted]
        if not mine:
            continue
        (one, *_) = mine
        state = page.process.liveness()
        silent = time.time() - page.updated_at > _SILENT_SECONDS
        if state == "unknown" and silent and any(save.state == "saving" for save in one.saves):
            state = "dead"  # as far as anybody can tell from here
        process = RunProcess(
            page.process.host,
            page.process.pid,
            state,
            page.updated_at,
            page.ring,
            one.committed,
            one.failed,
            one.saves,
        )
        troubled = process.saving or (process.last is not None and process.last.state == "failed")
        if state != "dead" or (troubled and time.time() - page.updated_at < _FORGOTTEN_SECONDS):
            found.append(process)
    return Processes(tuple(sorted(found, key=lambda one: (one.host, one.pid))))
