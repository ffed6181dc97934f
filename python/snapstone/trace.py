"""What each stage of a save or load cost: `stats` for the caller, and a Chrome trace that Perfetto opens
(SNAPSTONE_TRACE=file).
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from .config import trace_path

__all__ = ["UNPUBLISHED", "Trace"]

UNPUBLISHED = ".snapstone-new-"  # directories that begin so get their name later, and then are told of

_file_lock = threading.Lock()
_log = logging.getLogger("snapstone")


def _unlock_in_child() -> None:
    """Of a forked process: the thread that held it did not come along."""
    global _file_lock
    _file_lock = threading.Lock()


os.register_at_fork(after_in_child=_unlock_in_child)


class Trace:
    """The books of one operation.

    `stats` maps a stage to {"seconds", "bytes", "count"}: plan, stage, digest, encode, write, read, decode, scatter,
    sync, slot_wait, vote, commit. Stages of the native half are summed over lanes, so they can add up to more than the
    operation took.
    """

    def __init__(self, kind: str, rank: int, world_size: int) -> None:
        self.kind = kind
        self.rank = rank
        self.path = trace_path(rank, world_size)
        self.detailed = self.path is not None
        self.stats: dict[str, Any] = {}
        self.stage: tuple[str, int] | None = None  # the one that is open, and since when (monotonic ns)
        self.failed_in: str | None = None  # the first one that ended with an exception
        self._begin_ns = time.monotonic_ns()
        self._events: list[dict[str, Any]] = []

    @contextmanager
    def span(self, stage: str, nbytes: int = 0) -> Iterator[None]:
        """Times one stage of the Python half."""
        begin_ns = time.monotonic_ns()
        try:
            with self.within(stage):
                yield
        finally:
            self.add(stage, begin_ns, time.monotonic_ns(), nbytes)

    @contextmanager
    def within(self, stage: str) -> Iterator[None]:
        """Says that the operation is in a stage, for who looks at it meanwhile."""
        outer, self.stage = self.stage, (stage, time.monotonic_ns())
        if outer is not None and outer[0] == stage:
            self.stage = outer
        try:
            yield
        except BaseException:
            self.failed_in = self.failed_in or stage
            raise
        finally:
            self.stage = outer

    def tell(self, what: str, path: str, nbytes: int) -> None:
        """A line in the log of rank 0: `what` the operation has come to, at what rate."""
        if self.rank == 0 and f"{os.sep}{UNPUBLISHED}" not in path:
            seconds = (time.monotonic_ns() - self._begin_ns) * 1e-9
            _log.info(
                "%s %s: %.3f GB in %.3f s, %.2f GB/s", what, path, nbytes * 1e-9, seconds, nbytes * 1e-9 / seconds
            )

    def add(self, stage: str, begin_ns: int, end_ns: int, nbytes: int = 0) -> None:
        entry = self.stats.setdefault(stage, {"seconds": 0.0, "bytes": 0, "count": 0})
        entry["seconds"] += (end_ns - begin_ns) * 1e-9
        entry["bytes"] += nbytes
        entry["count"] += 1
        if self.detailed:
            self._events.append(self._event(stage, threading.current_thread().name, begin_ns, end_ns, nbytes))

    def add_job(self, job: Any) -> None:
        """Adds the books of a native job."""
        for stage, cost in job.stage_stats().items():
            entry = self.stats.setdefault(stage, {"seconds": 0.0, "bytes": 0, "count": 0})
            for unit, value in cost.items():
                entry[unit] += value
        for stage, lane, begin_ns, end_ns, nbytes in job.trace_events():
            self._events.append(self._event(stage, f"lane {lane}", begin_ns, end_ns, nbytes))

    def close(self) -> None:
        """Ends the operation: total seconds, and the events appended to the trace file. Again is nothing."""
        if "seconds" in self.stats:
            return
        end_ns = time.monotonic_ns()
        self.stats["seconds"] = (end_ns - self._begin_ns) * 1e-9
        if self.path is not None:
            operation = self._event(self.kind, "operation", self._begin_ns, end_ns, 0)
            operation["args"] = {"rung": self.stats.get("rung")}
            self._events.append(operation)
            try:
                _append(self.path, self._events)
            except OSError as error:  # no reason for this rank to fail what has been done on all
                warnings.warn(f"trace not written: {error}", RuntimeWarning, stacklevel=2)
            self._events = []

    def _event(self, name: str, thread: str, begin_ns: int, end_ns: int, nbytes: int) -> dict[str, Any]:
        return {
            "name": name,
            "cat": self.kind,
            "ph": "X",
            "ts": begin_ns / 1e3,  # microseconds, monotonic clock
            "dur": (end_ns - begin_ns) / 1e3,
            "pid": self.rank,
            "tid": thread,
            "args": {"bytes": nbytes},
        }


def _append(path: str, events: list[dict[str, Any]]) -> None:
    """Adds events to a JSON array in place, so that the file is valid JSON after every operation."""
    text = ",\n".join(json.dumps(event) for event in events)
    with _file_lock:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        with os.fdopen(descriptor, "r+b") as file:
            size = file.seek(0, os.SEEK_END)
            if size == 0:
                file.write(b"[\n")
            else:
                file.seek(size - len(b"\n]\n"))
                file.write(b",\n")
            file.write(text.encode() + b"\n]\n")
