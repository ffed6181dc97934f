"""The fault seam as tests use it: which calls an operation makes, and each of them made to fail in turn."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import snapstone as ss
from durability import counted
from snapstone import _native

# What each call can answer, by its manual page and the file systems that people keep checkpoints on: the one place
# where this stands. "short" is a transfer that stops early. The names are those of csrc/os/call.h and csrc/io/.
FULL = ("ENOSPC", "EDQUOT")
GIVES: dict[str, tuple[str, ...]] = {
    "open": ("EIO", *FULL, "EINTR", "EMFILE", "EACCES"),
    "fcntl": ("EINTR", "EACCES"),
    "opendir": ("EMFILE", "EACCES"),
    "readdir": ("EIO",),
    "stat": ("EIO", "EINTR", "EACCES"),
    "fstat": ("EIO",),
    "statfs": ("EIO", "EINTR", "EACCES"),
    "mkdir": ("EIO", *FULL, "EINTR", "EACCES"),
    "unlink": ("EIO", "EINTR", "EBUSY", "EACCES"),
    "rmdir": ("EIO", "EINTR", "EBUSY", "EACCES"),
    "rename": ("EIO", *FULL, "EINTR", "EBUSY", "EACCES"),
    "renameat2": ("EIO", *FULL, "EINTR", "EBUSY", "EACCES"),
    "fchown": ("EIO", "EINTR", "EPERM"),
    "fchmod": ("EIO", "EINTR", "EPERM"),
    "link": ("EIO", *FULL, "EINTR", "EACCES"),
    "fallocate": ("EIO", *FULL, "EINTR"),
    "ftruncate": ("EIO", *FULL, "EINTR"),
    "fsync": ("EIO", *FULL, "EINTR"),
    "pwrite": ("EIO", *FULL, "EINTR", "EAGAIN", "short"),
    "pread": ("EIO", "EINTR", "EAGAIN", "short"),
    "flock": ("EINTR", "EAGAIN"),  # EAGAIN: somebody else has it, for as long as a save waits
    "mmap": ("EAGAIN",),
    "madvise": ("EIO", "EAGAIN"),
    "close": ("EIO", *FULL, "EINTR"),
    "copy_file_range": ("EIO", *FULL, "EINTR", "short"),
    "io_uring_setup": ("EMFILE", "EACCES"),
    "io_uring_enter": ("EINTR", "EAGAIN", "EBUSY"),
    "uring_write": ("EIO", *FULL, "EINTR", "EAGAIN", "ECANCELED", "short"),
    "uring_read": ("EIO", "EINTR", "EAGAIN", "ECANCELED", "short"),
}
CALLS = list(GIVES)
# Calls that the seam sees as well, and why no sweep makes them fail. Those of the driver, "cu...", are tests/cuda's.
UNSWEPT = {
    "mbind": "advice: memory of another node does as well, and a refusal is not even looked at",
    "ioctl": "a probe: whether a file system clones files, which `doctor` reports and no save or load asks",
}
# What a save cannot do without: where one of these fails for good and the save succeeds, the checkpoint is not what it
# says, or not durable.
NEEDED = {"fsync", "close", "pwrite", "uring_write", "copy_file_range", "renameat2"}
CALLS_MAX = 400
SHORT_BYTES = 4096
IS_LONG = os.environ.get("SNAPSTONE_SWEEP") == "long"
# What a retry gets over. The kernel gives EINTR once for a signal, never for ever; of the files that O_DIRECT and I/O
# threads do not serve nothing gives EAGAIN.
RETRIED = {("io_uring_enter", "EAGAIN"), ("io_uring_enter", "EBUSY"), ("uring_write", "EAGAIN"), ("flock", "EAGAIN")}
RETRIED |= {("uring_read", "EAGAIN")}
# As often as threads happen to need it, and not each time as often; memory where one of them has none yet.
UNCOUNTED = {"io_uring_enter", "mmap", "madvise"}
# For these a call is tried for a second, a lock for ten, before that is an error: for ever at the first call alone.
PATIENT = {(call, name) for call in ("pwrite", "pread", "uring_write", "uring_read") for name in ("EAGAIN",)}
PATIENT |= {("io_uring_enter", "EAGAIN"), ("io_uring_enter", "EBUSY")}
NEVER_FOR_EVER = {("flock", "EAGAIN")}


def calls_of(operation: Callable[[], Any]) -> dict[str, int]:
    """How often a fault-free run makes each call. All must be in `GIVES`: what is new gets its errors before users."""
    _native.fault_arm("none:1:kill")
    try:
        operation()
        unknown = {name for name in _native.fault_seen_names() if "/" not in name and not name.startswith("cu")}
        assert unknown <= GIVES.keys() | UNSWEPT.keys(), f"not swept: {sorted(unknown - GIVES.keys())}"
        return {call: count for call in CALLS if (count := _native.fault_seen(call))}
    finally:
        _native.fault_disarm()


class Fault:
    """The Nth call of a kind fails, from now until `stop`; with `lasting` all later ones, too."""

    def __init__(self, call: str, nth: int, action: str, lasting: bool = False, armed: bool = True) -> None:
        self.call, self.nth, self.lasting = call, nth, lasting
        self.name = action.partition("=")[2] if action.startswith("errno=") else "short"
        self.rule = f"{call}:{nth}{'+' if lasting else ''}:{action}"
        self.reached: bool | None = None
        if armed:
            counted.count("failing calls")
            _native.fault_arm(self.rule)

    def stop(self) -> bool:
        """Whether the operation got that far."""
        if self.reached is None:
            self.reached = _native.fault_seen(self.call) >= self.nth
            _native.fault_disarm()
        return self.reached

    @property
    def is_got_over(self) -> bool:
        """Whether the operation must succeed all the same, since trying again is right."""
        return self.name in ("EINTR", "short") or (not self.lasting and (self.call, self.name) in RETRIED)

    @property
    def may_be_got_over(self) -> bool:
        """EAGAIN of a transfer is tried again by I/O threads, which small files do without."""
        return self.is_got_over or (self.name == "EAGAIN" and not self.lasting)

    @property
    def must_fail(self) -> bool:
        """Whether a save that gets that far and succeeds is a lie."""
        return self.call in NEEDED and not self.may_be_got_over

    @property
    def number(self) -> int:
        return 0 if self.name == "short" else int(getattr(errno, self.name))

    def __repr__(self) -> str:
        return self.rule


def every_fault(
    counts: dict[str, int], only: tuple[str, ...] = (), thin: bool = False
) -> Iterator[tuple[str, int, str, bool]]:
    """(call, nth, action, for ever): each call that a fault-free run makes fails once with each errno that it can give,
    and for ever from there on with one of these, another one for each; with `thin` once with one of them, too. With
    SNAPSTONE_SWEEP=long all of it with each. With `only` these, once.
    """
    for call, count in counts.items():
        names = [name for name in GIVES[call] if not only or name in only]
        lasting = [] if only else [name for name in names if lasts(call, name)]
        for nth in range(1, count + 1):
            once = [names[nth % len(names)]] if thin and not IS_LONG else names
            yield from ((call, nth, action_of(name), False) for name in once)
            some = [name for name in lasting if nth == 1 or (call, name) not in PATIENT]
            if some and not IS_LONG:
                some = [some[nth % len(some)]]
            yield from ((call, nth, action_of(name), True) for name in some)


def lasts(call: str, name: str) -> bool:
    return name not in ("EINTR", "short") and (call, name) not in NEVER_FOR_EVER


def action_of(name: str) -> str:
    return f"short={SHORT_BYTES}" if name == "short" else f"errno={name}"


def sweep(counts: dict[str, int], only: tuple[str, ...] = (), thin: bool = False) -> Iterator[Fault]:
    """Each of `every_fault`, armed; the loop's body runs the operation and may `stop` it sooner."""
    for one in every_fault(counts, only, thin):
        fault = Fault(*one)
        yield fault
        assert fault.stop() or fault.call in UNCOUNTED, f"{fault} was never reached"


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
