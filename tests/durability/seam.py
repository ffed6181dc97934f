"""The fault seam as tests use it: which calls an operation makes, and each of them made to fail in turn."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import snapstone as ss
from snapstone import _native

# The names of csrc/os/call.h and csrc/io/.
CALLS = ["open", "fcntl", "opendir", "readdir", "stat", "fstat", "statfs", "mkdir", "unlink", "rmdir", "rename"]
CALLS += ["renameat2", "link", "fallocate", "ftruncate", "fsync", "pwrite", "pread", "flock", "mmap", "madvise"]
CALLS += ["close", "copy_file_range", "uring_write", "uring_read"]
CALLS_MAX = 400


def calls_of(operation: Callable[[], Any]) -> dict[str, int]:
    """How often a fault-free run makes each call."""
    _native.fault_arm("none:1:kill")
    try:
        operation()
        return {call: count for call in CALLS if (count := _native.fault_seen(call))}
    finally:
        _native.fault_disarm()


class Fault:
    """The Nth call of a kind fails, from now until `stop`; with `lasting` all later ones, too."""

    def __init__(self, call: str, nth: int, action: str, lasting: bool = False) -> None:
        self.call, self.nth = call, nth
        self.rule = f"{call}:{nth}{'+' if lasting else ''}:{action}"
        self.reached: bool | None = None
        _native.fault_arm(self.rule)

    def stop(self) -> bool:
        """Whether the operation got that far."""
        if self.reached is None:
            self.reached = _native.fault_seen(self.call) >= self.nth
            _native.fault_disarm()
        return self.reached

    def __repr__(self) -> str:
        return self.rule


def faults(call: str, action: str, lasting: bool = False) -> Iterator[Fault]:
    """The first, second, ... call fails, until the operation that the loop runs no longer gets that far."""
    for nth in range(1, CALLS_MAX):
        fault = Fault(call, nth, action, lasting)
        yield fault
        if not fault.stop():
            return
    raise AssertionError(f"more than {CALLS_MAX} times {call}")


class Refusal(NamedTuple):
    """An OSError without its traceback, which would keep everything alive."""

    errno: int | None
    filename: str
    text: str


def os_error_of(operation: Callable[[], Any]) -> Refusal | None:
    """The OSError that `operation` raises, or None."""
    try:
        operation()
    except OSError as error:
        return Refusal(error.errno, str(error.filename), str(error))
    return None


def outcome_of(operation: Callable[[], Any], number: int = errno.EIO) -> str | None:
    """None, or the text of the error that the fault became: a CheckpointError, or an OSError with its errno."""
    try:
        refusal = os_error_of(operation)
    except ss.CheckpointError as error:
        return str(error)
    assert refusal is None or refusal.errno == number, refusal
    return None if refusal is None else refusal.text
