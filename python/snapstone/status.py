"""The saves of this process, told to `snapstone watch` through a status page (`status_page`).

Guarantees  A save never waits for its page and never fails because of it. What a save does for it is to set a few
            attributes; the page is written by a thread of its own, four times a second while a save is in flight, once
            after the last one has ended, and never otherwise.
Ownership   `begin` gives a `SaveWatch` to the save, which calls `end` once; it lets go of the share then. The page goes
            when the process exits, unless the last save into a run has failed: then it stays to say so, until another
            process saves into that run or a day is over.
Failure     A place that cannot be written: no page, until the next save tries again.
"""

from __future__ import annotations

import atexit
import os
import threading
import time
import uuid
from collections import deque
from contextlib import suppress
from typing import Final

from . import _native, status_page
from .share import Share
from .status_page import Page, Process, Ring, RunStatus, SaveStatus, StageCost
from .target import Target
from .trace import Trace

__all__ = ["SaveWatch", "begin"]

INTERVAL_SECONDS: Final = 0.25
WINDOW_SECONDS: Final = 5.0  # over which rates are taken
IN_FLIGHT_MAX: Final = 4  # of one run that are told of
RUNS_MAX: Final = 4
HANG_SECONDS: Final = 5.0  # that an exit waits for a file system
KEPT_SECONDS: Final = 86400.0  # pages of dead processes

_UNITS = ("seconds", "bytes", "count")


class SaveWatch:
    """One rank's part of one save, as the save tells it. Threads: the save's sets, the publisher's reads."""

    def __init__(self, target: Target, rank: int, world_size: int, trace: Trace) -> None:
        self.run = target.parent
        self.name = target.name
        self.step = target.step
        self.rank = rank
        self.world_size = world_size
        self.save_id = ""
        self._trace = trace
        self._share: Share | None = None
        self._native = ("stage", 0)  # where the native half was when somebody looked, and since when
        self._begun_ns = time.monotonic_ns()
        self._samples: deque[tuple[int, int, int]] = deque()  # monotonic ns, bytes staged, bytes written
        self._state = "saving"
        self._ended_ns = 0
        self._error: str | None = None
        self._last: SaveStatus | None = None
        self._lock = threading.Lock()

    def writes(self, share: Share) -> None:
        """What this rank writes is known."""
        now_ns = time.monotonic_ns()
        self._samples.append((now_ns, 0, 0))
        self._native = ("stage", now_ns)
        self._share = share

    def end(self, error: BaseException | None, *, cancelled: bool = False, nbytes: int | None = None) -> None:
        """The save is over on this rank, which committed `nbytes` if they are given. Again is nothing."""
        if self._ended_ns:
            return
        if error is None and nbytes is not None:
            self._trace.tell("durable", os.path.join(self.run, self.name), nbytes)
        self._ended_ns = time.monotonic_ns()
        if error is not None:
            self._error = f"{type(error).__name__}: {error}"[: status_page.TEXT_CHARS_MAX]
        self._state = "committed" if error is None else "cancelled" if cancelled else "failed"
        _publisher.ended(self)

    def freeze(self) -> None:
        """Takes the last of what the share and the trace say, and lets go of the share."""
        with self._lock:
            self._last = self._look()
            self._share = None

    @property
    def state(self) -> str:
        return self._state

    def status(self) -> SaveStatus:
        with self._lock:
            return self._last or self._look()

    def _look(self) -> SaveStatus:
        share = self._share
        size, staged, written = (share.payload_bytes, share.bytes_staged, share.bytes_written) if share else (0, 0, 0)
        stage, since_ns = self._stage(size, staged, written)
        now_ns = time.monotonic_ns()
        epoch = time.time() - now_ns * 1e-9
        rates = self._rates(now_ns, staged, written) if share else (None, None)
        return SaveStatus(
            name=self.name,
            step=self.step,
            save_id=self.save_id,
            rank=self.rank,
            world_size=self.world_size,
            state=self._state,
            stage=stage,
            stage_begun_at=epoch + since_ns * 1e-9,
            begun_at=epoch + self._begun_ns * 1e-9,
            ended_at=epoch + self._ended_ns * 1e-9 if self._ended_ns else None,
            size_bytes=size,
            staged_bytes=staged,
            written_bytes=written,
            staged_bytes_per_second=rates[0],
            written_bytes_per_second=rates[1],
            stages={
                stage: StageCost(*(cost[unit] for unit in _UNITS))
                for stage, cost in list(self._trace.stats.items())
                if isinstance(cost, dict) and all(unit in cost for unit in _UNITS)
            },
            error=self._error,
        )

    def _stage(self, size: int, staged: int, written: int) -> tuple[str, int]:
        """Outside the stages of the Python half the native half is at work, once there is something to write."""
        if self._ended_ns:
            return (
                "commit" if self._error is None else self._trace.failed_in or _native_stage(size, staged, written),
                self._ended_ns,
            )
        if (stage := self._trace.stage) is not None:
            return stage
        if self._share is None:
            return "plan", self._begun_ns
        native = _native_stage(size, staged, written)
        if native != self._native[0]:
            self._native = (native, time.monotonic_ns())
        return self._native

    def _rates(self, now_ns: int, staged: int, written: int) -> tuple[float | None, float | None]:
        while len(self._samples) > 1 and now_ns - self._samples[0][0] > WINDOW_SECONDS * 1e9:
            self._samples.popleft()
        self._samples.append((now_ns, staged, written))
        begin_ns, *begin = self._samples[0]
        seconds = (now_ns - begin_ns) * 1e-9
        if seconds <= 0:
            return None, None
        return (staged - begin[0]) / seconds, (written - begin[1]) / seconds


def _native_stage(size: int, staged: int, written: int) -> str:
    return "stage" if staged < size else "write" if written < size else "sync"


class _Run:
    """What is remembered of one run directory."""

    def __init__(self) -> None:
        self.in_flight: list[SaveWatch] = []
        self.last: SaveWatch | None = None
        self.committed = 0
        self.failed = 0

    def saves(self) -> list[SaveWatch]:
        return [*self.in_flight[-IN_FLIGHT_MAX:], *([self.last] if self.last else [])]


class _Publisher:
    """The thread that writes this process's page, and what it writes."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._page_lock = threading.Lock()
        self._process: Process | None = None
        self._left = False
        self._runs: dict[str, _Run] = {}  # the one that was saved to last is the last
        self._news = threading.Event()
        self._thread: threading.Thread | None = None
        self._name = f"page-{uuid.uuid4().hex}.json"
        self._folder: str | None = None  # where the page is
        self._swept: set[tuple[str, str]] = set()

    def begun(self, save: SaveWatch) -> None:
        with self._lock:
            run = self._runs.pop(save.run, None) or _Run()
            self._runs[save.run] = run
            run.in_flight.append(save)
            for path in [path for path, one in self._runs.items() if not one.in_flight][: -RUNS_MAX or None]:
                del self._runs[path]
            if self._thread is None:
                self._thread = threading.Thread(target=self._publish, name="snapstone-status", daemon=True)
                self._thread.start()
        self._news.set()

    def ended(self, save: SaveWatch) -> None:
        save.freeze()
        with self._lock:
            run = self._runs.get(save.run)
            if run is None or save not in run.in_flight:
                return
            run.in_flight.remove(save)
            run.last = save
            run.committed += save.state == "committed"
            run.failed += save.state == "failed"
        self._news.set()

    def _publish(self) -> None:
        while True:
            self._news.wait()
            self._news.clear()
            # Not at once: the trainer has just begun or ended a save, and needs the interpreter.
            time.sleep(INTERVAL_SECONDS)
            while self._write():
                time.sleep(INTERVAL_SECONDS)

    def _write(self) -> bool:
        """Whether a save is in flight. Nothing that happens to the page may end this thread."""
        with self._lock:
            runs = [(path, run.committed, run.failed, run.saves()) for path, run in self._runs.items()]
            saving = any(run.in_flight for run in self._runs.values())
        if not self._page_lock.acquire(timeout=HANG_SECONDS):  # at exit, beside a write that hangs
            return saving
        with suppress(Exception):
            folder = status_page.directory()
            if folder is not None and not self._left:
                told = [
                    RunStatus(path, committed, failed, tuple(save.status() for save in saves))
                    for path, committed, failed, saves in runs[-RUNS_MAX:]
                ]
                self._process = self._process or Process.mine()
                page = Page(self._process, time.time(), Ring.of(_native.ring_facts()), tuple(told))
                status_page.write(page, folder, self._name)
                self._folder = folder
                self._sweep(folder, [path for path, *_ in runs])
        self._page_lock.release()
        return saving

    def _sweep(self, folder: str, runs: list[str]) -> None:
        """Removes pages of dead processes: those that saved into a run into which this one saves now, and old ones."""
        for run in [run for run in runs if (folder, run) not in self._swept]:
            self._swept.add((folder, run))
            for name, page in status_page.find(folder):
                old = time.time() - page.updated_at > KEPT_SECONDS
                state = page.process.liveness()
                if (old and state != "live") or (state == "dead" and any(one.run == run for one in page.runs)):
                    with suppress(OSError):
                        os.unlink(os.path.join(folder, name))

    def leave(self) -> None:
        """At exit. What has failed stays to be read."""
        if not self._runs:
            return
        self._write()  # what may not have been told yet; it also removes pages of the dead
        if not self.silence():
            return
        failed = any(run.last is not None and run.last.state == "failed" for run in self._runs.values())
        if self._folder is not None and not failed:
            with suppress(OSError):
                os.unlink(os.path.join(self._folder, self._name))

    def silence(self) -> bool:
        """Nothing is written after this; False where a file system hangs in a write."""
        if not self._page_lock.acquire(timeout=HANG_SECONDS):
            return False
        self._left = True
        self._page_lock.release()
        return True


_publisher = _Publisher()


def _forget_in_child() -> None:
    """The thread did not come along into a forked process, and the page is its parent's."""
    global _publisher
    _publisher = _Publisher()


def _leave() -> None:
    _publisher.leave()


os.register_at_fork(after_in_child=_forget_in_child)
atexit.register(_leave)


def begin(target: Target, rank: int, world_size: int, trace: Trace) -> SaveWatch:
    """Says that this rank begins a save."""
    save = SaveWatch(target, rank, world_size, trace)
    if status_page.directory() is not None:
        with suppress(RuntimeError):  # no thread can be started: no page
            _publisher.begun(save)
    return save
