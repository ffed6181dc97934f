"""What stands in a run directory: committed checkpoints, and what saves left behind. Reads only."""

from __future__ import annotations

import fcntl
import os
import re
import stat
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from . import Checkpoint
    from .diagnosis import Diagnosis

__all__ = ["Entry", "Leftover", "committed_at", "find_checkpoints", "find_leftovers", "is_checkpoint", "verified"]

State = Literal["ok", "corrupt", "incomplete", "incompatible", "unreadable"]

# One of these in a directory makes it a checkpoint to report on, also when others are missing.
_MARKS = ("MANIFEST.json", "MANIFEST.xxh128", "rank-00000.index")
_LEFTOVER = re.compile(r"\.(staging|trash)-[0-9a-f]{32}\Z")
_OWNER_BYTES_MAX = 1 << 20
_OWNERLESS_AGE_SECONDS = 600.0  # a save writes OWNER in its first moments


@dataclass(frozen=True, slots=True)
class Entry:
    """One checkpoint, verified. `checkpoint` is None when its manifest or an index cannot be used."""

    path: str
    state: State
    problems: tuple[str, ...]
    checkpoint: Checkpoint | None
    checked_bytes: int
    seconds: float
    diagnoses: tuple[Diagnosis, ...] = ()

    @property
    def name(self) -> str:
        return os.path.basename(os.path.abspath(self.path))

    @property
    def step(self) -> int | None:
        return self.checkpoint.step if self.checkpoint else None


@dataclass(frozen=True, slots=True)
class Leftover:
    """`live`: a process holds it open. `dead`: the next save removes it. `unknown`: another host or user may own it."""

    name: str
    kind: Literal["staging", "trash"]
    state: Literal["live", "dead", "unknown"]
    age_seconds: float


def is_checkpoint(path: str) -> bool:
    return any(os.path.lexists(os.path.join(path, mark)) for mark in _MARKS)


def find_checkpoints(path: str) -> list[str]:
    """`path` itself when it is a checkpoint, else the checkpoints directly in it, by name; links are not followed.

    Raises OSError when `path` cannot be listed.
    """
    if is_checkpoint(path):
        return [path]
    with os.scandir(path) as entries:
        found = [e.path for e in entries if not e.name.startswith(".") and e.is_dir(follow_symlinks=False)]
    return sorted(filter(is_checkpoint, found), key=_natural)


def _natural(path: str) -> list[Any]:
    """step-9 before step-10."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"([0-9]+)", path)]


def committed_at(path: str) -> float | None:
    """Seconds since the epoch at which the manifest was written, as the file system says; copying may change it."""
    try:
        return os.lstat(os.path.join(path, _MARKS[0])).st_mtime
    except OSError:
        return None


def verified(path: str, level: Literal["quick", "full"], *, progress: bool = False) -> Iterator[Entry]:
    """Checks the checkpoint at `path`, or each in that run directory; one that is removed meanwhile is left out.

    What is wrong with a checkpoint is part of its entry. Raises CheckpointNotFoundError when nothing is at `path`, and
    OSError when it cannot be listed.
    """
    from . import CheckpointNotFoundError

    try:
        found = find_checkpoints(path)
    except NotADirectoryError:
        found = [path]  # a file or a FIFO: the entry says what it is not
    for one in found:
        try:
            yield _verified(one, level, progress)
        except CheckpointNotFoundError:
            if one == path:
                raise


def _verified(path: str, level: Literal["quick", "full"], progress: bool) -> Entry:
    from . import Checkpoint, CheckpointError, CheckpointNotFoundError, verify

    begin = time.monotonic()
    checkpoint = None
    diagnoses: tuple[Diagnosis, ...] = ()
    state: State
    try:
        report = verify(path, level=level, progress=progress)
        problems, checked, state = report.problems, report.checked_bytes, _state(report.problems)
        diagnoses = report.diagnoses
        with suppress(CheckpointError):  # which the report has named
            checkpoint = Checkpoint(path)  # reads the manifest alone
    except CheckpointNotFoundError:
        raise
    except OSError as error:
        problems, checked, state = (f"{error.filename or path}: {error.strerror or error}",), 0, "unreadable"
    return Entry(path, state, problems, checkpoint, checked, time.monotonic() - begin, diagnoses)


def _state(problems: Sequence[str]) -> State:
    if not problems:
        return "ok"
    if any(problem.startswith("IncompleteCheckpointError") or "is missing" in problem for problem in problems):
        return "incomplete"
    if problems[0].startswith("IncompatibleCheckpointError"):
        return "incompatible"
    return "corrupt"


def find_leftovers(path: str) -> list[Leftover]:
    with os.scandir(path) as entries:
        names = sorted(e.name for e in entries if _LEFTOVER.match(e.name) and e.is_dir(follow_symlinks=False))
    return [leftover for name in names for leftover in _leftover(path, name)]


def _leftover(path: str, name: str) -> Iterator[Leftover]:
    """Nothing for one that its owner renamed or removed meanwhile."""
    with _opened(os.path.join(path, name)) as descriptor:
        try:
            age = time.time() - os.lstat(os.path.join(path, name)).st_mtime
        except OSError:
            return
        if name.startswith(".trash-"):
            yield Leftover(name, "trash", "dead" if descriptor is not None else "unknown", age)
        else:
            state = "unknown" if descriptor is None else _staging_state(path, descriptor, age)
            yield Leftover(name, "staging", state, age)


@contextmanager
def _opened(path: str) -> Iterator[int | None]:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        yield None
        return
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _staging_state(parent: str, descriptor: int, age: float) -> Literal["live", "dead", "unknown"]:
    """As csrc/store/reap.h decides, but for the lock: it is tried only where a save that lives already holds its own.

    A save locks its directory before it writes OWNER. Without OWNER, and young, the save may be about to lock, and
    must not meet this process.
    """
    from . import _native

    owners = _owners(descriptor)
    if owners is None and abs(age) <= _OWNERLESS_AGE_SECONDS:
        return "unknown"
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return "live"
    except OSError:
        return "unknown"
    fcntl.flock(descriptor, fcntl.LOCK_UN)
    if not _native.file_system_facts(parent)["network"]:
        return "dead"
    return "dead" if owners and set(owners) == {_native.boot_id()} else "unknown"


def _owners(descriptor: int) -> list[str] | None:
    """The boots of the hosts that write into a staging directory; None without a readable OWNER."""
    try:
        file = os.open("OWNER", os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=descriptor)
    except OSError:
        return None
    try:
        if not stat.S_ISREG(os.fstat(file).st_mode):
            return None
        return os.read(file, _OWNER_BYTES_MAX).decode("ascii", "replace").split()
    finally:
        os.close(file)
