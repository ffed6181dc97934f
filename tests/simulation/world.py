"""Virtual time, simulated processes and the scheduler that owns them: one thread, one seed, one history.

Every task of a process is a greenlet. A task runs until it waits for virtual time, for another task or for a message;
then the event that comes next in virtual time runs, ties broken by the seed. A process can be killed (its tasks never
run again, its locks and connections go), stopped for a while (its events wait), or interrupted, at any such point.
"""

from __future__ import annotations

import heapq
import math
import random
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from greenlet import getcurrent, greenlet

__all__ = ["Hung", "Killed", "Process", "Task", "World", "current_process"]

EVENTS_MAX = 400_000  # of one history: beyond it something spins


class Killed(BaseException):
    """Unwinds the tasks of a dead process when the history is over; nothing of it may have an effect any more."""


class Hung(Exception):
    """A history did not come to an end."""


class Task(greenlet):
    """One thread of a simulated process."""

    def __init__(self, process: Process, run: Callable[[], Any]) -> None:
        super().__init__(run, process.world.hub)
        self.process = process
        self.ticket = 0  # of the wait that it is in: what would end an earlier one comes too late

    def run_until_wait(self) -> None:
        self.switch()


class Process:
    """One rank. `on_death` are called when it dies, as the kernel would."""

    def __init__(self, world: World, rank: int) -> None:
        self.world = world
        self.rank = rank
        self.alive = True
        self.interrupted = False
        self.stopped_until = -math.inf
        self.steps = 0
        self.at_step: dict[int | str, Callable[[], None]] = {}  # what befalls it, by number or name of a step
        self.tasks: list[Task] = []
        self.main: Task | None = None
        self.on_death: list[Callable[[], None]] = []
        self.cut_until = -math.inf  # of its network
        self.node = f"node-{rank}"
        self.facts: dict[str, Any] = {}

    def spawn(self, run: Callable[[], Any]) -> Task:
        task = Task(self, run)
        self.tasks.append(task)
        self.world.at(self.world.now, task.run_until_wait, self)
        return task

    def kill(self) -> None:
        if not self.alive:
            return
        self.world.note(self, "killed")
        self.alive = False
        for call in self.on_death:
            call()
        self._leave_if_dead()

    def stop(self, seconds: float) -> None:
        self.world.note(self, f"stopped for {seconds:.3f}")
        self.stopped_until = max(self.stopped_until, self.world.now + seconds)
        if getattr(getcurrent(), "process", None) is self:
            self.world.sleep(0.0)

    def cut(self, seconds: float) -> None:
        self.world.note(self, f"cut off for {seconds:.3f}")
        self.cut_until = max(self.cut_until, self.world.now + seconds)

    def interrupt(self) -> None:
        """Ctrl-C: the main task raises KeyboardInterrupt at its next wake."""
        self.world.note(self, "interrupted")
        self.interrupted = True

    def step(self, name: str) -> None:
        """A point of the main task or a store task where something may befall the process; takes a little time."""
        if not isinstance(getcurrent(), Task):
            return  # of the harness
        self._leave_if_dead()
        self.steps += 1
        self.world.note(self, name)
        for key in (self.steps, name):
            if (fault := self.at_step.pop(key, None)) is not None:
                fault()
        self.world.sleep(self.world.random.expovariate(1 / 20e-6))

    def _leave_if_dead(self) -> None:
        if not self.alive:
            if getattr(getcurrent(), "process", None) is self and not self.world.over:
                self.world.hub.switch()  # for good
            if self.world.over:
                raise Killed


class World:
    """One history. `note` keeps what happens, for a replay and for the comparison of two."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.now = 0.0
        self.over = False
        self.news = True  # something has died, stopped or ended: `run` asks again whether this is the end
        self.hub = getcurrent()
        self.processes: list[Process] = []
        self.history: list[tuple[float, int, str]] = []
        self._events: list[tuple[float, float, int, Process | None, Callable[[], None]]] = []
        self._count = 0

    def process(self, rank: int) -> Process:
        made = Process(self, rank)
        self.processes.append(made)
        return made

    def note(self, process: Process, what: str) -> None:
        self.history.append((self.now, process.rank, what))
        self.news = True

    def at(self, when: float, call: Callable[[], None], process: Process | None = None) -> None:
        """`process`: of which this is an event; it waits while that is stopped, and never comes when it is dead."""
        self._count += 1
        heapq.heappush(self._events, (when, self.random.random(), self._count, process, call))

    def run(self, until: Callable[[], bool]) -> None:
        """Until `until` says so, or nothing is left to happen."""
        self.news = True
        while self._events:
            if self.news or self._count % 256 == 0:
                self.news = False
                if until():
                    return
            when, tie, _, process, call = heapq.heappop(self._events)
            if process is not None:
                if not process.alive:
                    continue
                if process.stopped_until > max(when, self.now):
                    if process.stopped_until < math.inf:
                        self._count += 1
                        entry = (process.stopped_until, tie, self._count, process, call)
                        heapq.heappush(self._events, entry)
                    continue
            self.now = max(self.now, when)
            if self._count > EVENTS_MAX:
                raise Hung(f"{self._count} events and no end at {self.now:.3f} s")
            call()

    def sleep(self, seconds: float) -> None:
        task = self._begin_wait()
        self.wake(task, seconds)
        self._wait(task)

    def wait(self, subscribe: Callable[[Callable[[], None]], None], seconds: float) -> None:
        """Until the callback that `subscribe` is given is called, or `seconds` have passed."""
        task = self._begin_wait()
        ticket = task.ticket
        if seconds < math.inf:
            self.wake(task, seconds)
        subscribe(lambda: self._wake_from(task, ticket))
        self._wait(task)

    def wake(self, task: Task, seconds: float) -> None:
        ticket = task.ticket
        self.at(self.now + max(0.0, seconds), lambda: self._resume(task, ticket), task.process)

    def _wake_from(self, task: Task, ticket: int) -> None:
        if task.ticket == ticket and not self.over:
            self.wake(task, 0.0)

    def _begin_wait(self) -> Task:
        task = getcurrent()
        assert isinstance(task, Task), "only a task of a simulated process can wait"
        task.process._leave_if_dead()
        task.ticket += 1
        return task

    def _wait(self, task: Task) -> None:
        self.hub.switch()
        task.ticket += 1
        if self.over:
            raise Killed
        process = task.process
        if process.interrupted and task is process.main:
            process.interrupted = False
            raise KeyboardInterrupt

    def _resume(self, task: Task, ticket: int) -> None:
        if task.ticket == ticket and not task.dead:
            task.switch()

    def end(self) -> None:
        """Unwinds what is left, without effect."""
        self.over = True
        for process in self.processes:
            if process.alive:
                process.alive = False
                for call in process.on_death:
                    call()
            for task in process.tasks:
                for _ in range(100):
                    if task.dead or not task:
                        break
                    with suppress(Killed, KeyboardInterrupt):
                        task.throw(Killed)
                process.main = None
            process.tasks.clear()
        self._events.clear()


def current_process() -> Process:
    task = getcurrent()
    assert isinstance(task, Task), "the engine runs inside a simulated process"
    return task.process
