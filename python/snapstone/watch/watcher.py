"""One look at a run directory after the other."""

from __future__ import annotations

import os
import threading
import time
from dataclasses import dataclass, replace
from itertools import pairwise
from statistics import median

from ..run_directory import Leftover, find_leftovers
from .durable import Durable, DurableCheckpoints
from .in_flight import Rates, SaveInFlight, look_at
from .processes import Processes, look_at_processes

__all__ = ["Observation", "Watcher"]

_RECENT = 9  # checkpoints that say how often, and how much, is saved


@dataclass(frozen=True, slots=True)
class Observation:
    """What a run directory said at one moment. Times are seconds since the epoch, as the file system has them.

    `checkpoints` are in the order of their commits; those with problems are among them. `processes` are those of this
    machine that tell of their saves.
    """

    run: str
    at: float
    checkpoints: tuple[Durable, ...]
    saves: tuple[SaveInFlight, ...]
    leftovers: tuple[Leftover, ...]  # dead staging directories, and what was replaced
    free_bytes: int
    total_bytes: int
    processes: Processes

    @property
    def sound(self) -> list[Durable]:
        return [one for one in self.checkpoints if not one.problems]

    @property
    def problems(self) -> list[str]:
        """Of checkpoints, each text with the path that it is about."""
        return [problem for one in self.checkpoints for problem in one.problems]

    @property
    def last(self) -> Durable | None:
        """The sound checkpoint that was committed last."""
        return self.sound[-1] if self.sound else None

    @property
    def age_seconds(self) -> float | None:
        """Of the last durable checkpoint: what a failure at this moment would cost, and some more."""
        last = self.last
        return None if last is None or last.committed_at is None else max(0.0, self.at - last.committed_at)

    @property
    def cadence_seconds(self) -> float | None:
        """Median time between the last commits; None below two."""
        times = [one.committed_at for one in self.sound[-_RECENT:] if one.committed_at is not None]
        apart = [later - earlier for earlier, later in pairwise(times)]
        return median(apart) if apart else None

    @property
    def cadence_steps(self) -> float | None:
        """Median number of training steps between them."""
        steps = [one.step for one in self.sound[-_RECENT:] if one.step is not None]
        apart = [later - earlier for earlier, later in pairwise(steps)]
        return median(apart) if apart else None

    @property
    def next_in_seconds(self) -> float | None:
        """Until the next commit if the run keeps its cadence; negative when it is overdue."""
        cadence, age = self.cadence_seconds, self.age_seconds
        return None if cadence is None or age is None else cadence - age

    @property
    def stored_bytes_per_checkpoint(self) -> float | None:
        stored = [one.stored_bytes for one in self.sound[-_RECENT:] if one.stored_bytes is not None]
        return median(stored) if stored else None

    @property
    def room_for(self) -> int | None:
        """How many checkpoints like the last ones fit into the free space, if none is removed."""
        each = self.stored_bytes_per_checkpoint
        return int(self.free_bytes / each) if each else None

    @property
    def exhausted_in_seconds(self) -> float | None:
        """Until the free space is used up at the present cadence, if no checkpoint is removed."""
        cadence, each = self.cadence_seconds, self.stored_bytes_per_checkpoint
        return self.free_bytes / each * cadence if each and cadence else None


class Watcher:
    """Looks at a run directory. Threads: any number; they take turns."""

    def __init__(self, run: str | os.PathLike[str]) -> None:
        self.run = os.path.abspath(os.fspath(run))
        self._checkpoints = DurableCheckpoints(self.run)
        self._rates = Rates()
        self._lock = threading.Lock()

    def observe(self) -> Observation:
        """Raises OSError when the directory is not there or cannot be listed."""
        with self._lock:
            # Saves before checkpoints: one that commits in between is seen twice rather than not at all.
            leftovers = find_leftovers(self.run)
            living = [one for one in leftovers if one.kind == "staging" and one.state != "dead"]
            seen = [look_at(self.run, one.name, one.state) for one in living]
            saves = [save for save in seen if save is not None]
            checkpoints = self._checkpoints.look()
            now = time.time()
            rates = self._rates.of(saves, now)
            space = os.statvfs(self.run)
            processes = look_at_processes(self.run)
        return Observation(
            self.run,
            now,
            tuple(checkpoints),
            tuple(replace(save, bytes_per_second=rate) for save, rate in zip(saves, rates, strict=True)),
            tuple(one for one in leftovers if one not in living),
            space.f_bavail * space.f_frsize,
            space.f_blocks * space.f_frsize,
            processes,
        )
