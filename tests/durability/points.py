"""Places on the Python side of an operation at which a test kills the process; the fault seam has the system calls.

The code under test has no hooks for this: the interpreter's tracing finds its functions and its lines.

    "Outcome.commit:before"       when the function is entered the first time
    "Channel.vote(open):after"    when it returns, for functions that take a label, with that label
    "writer.py:123"               before the line runs the first time
    "*:12:kill"                   not from here: a rule of the fault seam
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterable
from pathlib import Path
from types import FrameType
from typing import Any

import snapstone
from snapstone import _native

PACKAGE = str(Path(snapstone.__file__).parent) + os.sep
# What runs between the steps of a save; what they call besides has no part in the order of steps.
MODULES = ("save", "writer", "outcome", "target", "agreement", "collective", "share", "base")

Point = str


class Seen:
    """From `start` to `stop`: the functions, without ":before" and ":after", and the lines that the process passes, in
    order of the first time. Of threads, those count that start meanwhile.
    """

    def __init__(self, modules: Iterable[str] = MODULES) -> None:
        self.functions: dict[Point, None] = {}
        self.lines: dict[Point, None] = {}
        self._files = {f"{PACKAGE}{module}.py": module for module in modules}

    def start(self) -> None:
        _trace(self._enter)

    def stop(self) -> None:
        _trace(None)

    def _enter(self, frame: FrameType, event: str, _: Any) -> Any:
        module = self._files.get(frame.f_code.co_filename)
        if module is None:
            return None
        if "<" not in frame.f_code.co_qualname:  # not inside another function
            self.functions[name_of(frame)] = None

        def line(frame: FrameType, event: str, _: Any) -> Any:
            if event == "line":
                self.lines[f"{module}.py:{frame.f_lineno}"] = None
            return line

        return line


def arm(point: Point) -> None:
    """This process is killed at `point`, in whatever thread gets there, now or later."""
    if point.endswith(":kill"):
        _native.fault_arm(point)
        return
    place, _, when = point.rpartition(":")
    if place.endswith(".py"):
        _trace(_line_killer(PACKAGE + place, int(when)))
    else:
        _trace(_function_killer(place, when))


def _line_killer(path: str, number: int) -> Any:
    def enter(frame: FrameType, event: str, _: Any) -> Any:
        return line if frame.f_code.co_filename == path else None

    def line(frame: FrameType, event: str, _: Any) -> Any:
        if event == "line" and frame.f_lineno == number:
            die()
        return line

    return enter


def _function_killer(name: str, when: str) -> Any:
    plain = name.partition("(")[0]

    def enter(frame: FrameType, event: str, _: Any) -> Any:
        if frame.f_code.co_qualname != plain or not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        if name_of(frame) != name:
            return None
        if when == "before":
            die()
        frame.f_trace_lines = False
        return leave

    def leave(frame: FrameType, event: str, _: Any) -> Any:
        if event == "return":
            die()
        return leave

    return enter


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def name_of(frame: FrameType) -> Point:
    label = frame.f_locals.get("label")
    name = frame.f_code.co_qualname
    return f"{name}({label})" if isinstance(label, str) else name


def _trace(enter: Any) -> None:
    threading.settrace(enter)  # for threads to come
    sys.settrace(enter)
