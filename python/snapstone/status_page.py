"""Status pages: what the saves of one process are doing, in a small file that other processes read.

Guarantees  A page is replaced whole (rename), so a reader sees an old one or a new one. `read` believes nothing: a file
            that is no page, is too large, belongs to a stranger or holds wrong types is no page, whatever it says.
            Pages hold numbers and text alone.
Ownership   A page belongs to the process that writes it, which is known by its boot, process namespace, number and
            start time: a number that the kernel gave to another process does not bring a dead one back.
Failure     OSError from `write`; everything else answers with less.
"""

from __future__ import annotations

import functools
import json
import math
import os
import re
import stat
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final, Literal

from . import _native

__all__ = [
    "SAVE_STATES",
    "Page",
    "Process",
    "Ring",
    "RunStatus",
    "SaveStatus",
    "StageCost",
    "directory",
    "find",
    "read",
    "write",
]

FORMAT: Final = "snapstone-status"
VERSION: Final = 1
SAVE_STATES: Final = ("saving", "committed", "failed", "cancelled")
PAGE_BYTES_MAX: Final = 1 << 16
PAGES_MAX: Final = 4096  # of one directory that are read
RUNS_MAX: Final = 8
SAVES_MAX: Final = 8  # of one run
STAGES_MAX: Final = 64
TEXT_CHARS_MAX: Final = 1000
PATH_CHARS_MAX: Final = 4096
_NUMBER_MAX: Final = 1 << 63
_NAME = re.compile(r"page-[0-9a-f]{32}\.json", re.ASCII)

Liveness = Literal["live", "dead", "unknown"]


@dataclass(frozen=True, slots=True)
class Process:
    """`start`: ticks after boot. `namespace`: in which `pid` is its number, "" where that cannot be told."""

    boot: str
    namespace: str
    pid: int
    start: int
    host: str

    @classmethod
    def mine(cls) -> Process:
        return cls(_native.boot_id(), _namespace(), os.getpid(), _start_of(os.getpid()) or 0, os.uname().nodename)

    def liveness(self) -> Liveness:
        """ "unknown" for processes of other machines and containers."""
        if self.boot != _native.boot_id() or self.namespace != _namespace():
            return "unknown"
        return "live" if _start_of(self.pid) == self.start else "dead"


@functools.cache
def _namespace() -> str:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _start_of(pid: int) -> int | None:
    """Field 22 of /proc/PID/stat; None for a process that is gone, or waits to be reaped."""
    try:
        with open(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as file:
            fields = file.read().rpartition(")")[2].split()
        return None if fields[0] in "ZX" else int(fields[19])
    except (OSError, IndexError, ValueError):
        return None


@dataclass(frozen=True, slots=True)
class Ring:
    """The staging memory of a process."""

    slot_bytes: int
    slots: int
    free_slots: int

    @classmethod
    def of(cls, facts: Mapping[str, Any]) -> Ring:
        """From `_native.ring_facts`."""
        return cls(facts["slot_bytes"], facts["slots"], facts["free_slots"])

    @property
    def nbytes(self) -> int:
        return self.slot_bytes * self.slots

    @property
    def used_bytes(self) -> int:
        return self.slot_bytes * max(0, self.slots - self.free_slots)


@dataclass(frozen=True, slots=True)
class StageCost:
    """Of a stage so far; seconds of native stages are added up over lanes."""

    seconds: float
    nbytes: int
    count: int


@dataclass(frozen=True, slots=True)
class SaveStatus:
    """One rank's part of one save. Moments are seconds since the epoch, rates bytes per second of the last seconds.

    `stage`: the one that it is in, or ended in. `size_bytes`: of this rank's share, 0 until it is known; `staged_bytes`
    of it have been copied, `written_bytes` written or found in the base. `stages`: those that have ended, by name.
    """

    name: str
    step: int | None
    save_id: str
    rank: int
    world_size: int
    state: str  # of SAVE_STATES
    stage: str
    stage_begun_at: float
    begun_at: float
    ended_at: float | None
    size_bytes: int
    staged_bytes: int
    written_bytes: int
    staged_bytes_per_second: float | None
    written_bytes_per_second: float | None
    stages: Mapping[str, StageCost]
    error: str | None


@dataclass(frozen=True, slots=True)
class RunStatus:
    """What one process did in one run directory: saves committed and failed since it began, those in flight, and the
    one that ended last.
    """

    run: str
    committed: int
    failed: int
    saves: tuple[SaveStatus, ...]


@dataclass(frozen=True, slots=True)
class Page:
    process: Process
    updated_at: float
    ring: Ring
    runs: tuple[RunStatus, ...]


def directory() -> str | None:
    """Where pages go: SNAPSTONE_STATUS_DIR, None when that is empty; else this user's place in memory, None where
    there is no /dev/shm.
    """
    chosen = os.environ.get("SNAPSTONE_STATUS_DIR")
    if chosen is not None:
        return os.path.abspath(chosen) if chosen else None
    return f"/dev/shm/snapstone-{os.geteuid()}" if os.path.isdir("/dev/shm") else None


def write(page: Page, folder: str, name: str) -> None:
    """Replaces the page `name` in `folder`, which is made if it is missing.

    Raises:
        OSError: the file system refused. PermissionError: somebody else can put files there, or owns it.
    """
    data = json.dumps(_document(page), separators=(",", ":"), allow_nan=False).encode()
    if len(data) > PAGE_BYTES_MAX:
        return  # readers would not take it
    try:
        os.mkdir(folder, 0o700)
    except FileExistsError:
        _check_mine(folder)
    draft = os.path.join(folder, f".{name}")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        os.write(descriptor, data)
    finally:
        os.close(descriptor)
    os.rename(draft, os.path.join(folder, name))


def _check_mine(folder: str) -> None:
    """The place in /dev/shm has a name that others can guess, and take. One that was chosen is the user's business."""
    facts = os.lstat(folder)
    if os.environ.get("SNAPSTONE_STATUS_DIR"):
        return
    if not stat.S_ISDIR(facts.st_mode) or facts.st_uid != os.geteuid() or facts.st_mode & 0o022:
        raise PermissionError(1, "not a directory of this user alone", folder)


def _document(page: Page) -> dict[str, Any]:
    process = page.process
    return {
        "format": FORMAT,
        "version": VERSION,
        "boot": process.boot,
        "namespace": process.namespace,
        "pid": process.pid,
        "start": process.start,
        "host": process.host,
        "updated_at": page.updated_at,
        "ring": {name: getattr(page.ring, name) for name in Ring.__slots__},
        "runs": [
            {
                "run": one.run,
                "committed": one.committed,
                "failed": one.failed,
                "saves": [_save_document(save) for save in one.saves],
            }
            for one in page.runs
        ],
    }


def _save_document(save: SaveStatus) -> dict[str, Any]:
    document = {name: getattr(save, name) for name in SaveStatus.__slots__}
    document["stages"] = {name: [cost.seconds, cost.nbytes, cost.count] for name, cost in save.stages.items()}
    document["error"] = None if save.error is None else save.error[:TEXT_CHARS_MAX]
    return document


def find(folder: str | None) -> Iterator[tuple[str, Page]]:
    """Names and pages of a directory; nothing where there is none."""
    if folder is None:
        return
    names: list[str] = []
    owner = -1
    with suppress(OSError):
        owner = os.stat(folder).st_uid
        names = sorted(filter(_NAME.fullmatch, os.listdir(folder)))
    for name in names[:PAGES_MAX]:
        page = read(os.path.join(folder, name), owner)
        if page is not None:
            yield name, page


def read(path: str, owner: int) -> Page | None:
    """The page at `path`, of this user or of the user `owner`; None for what is none."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        facts = os.fstat(descriptor)
        if not stat.S_ISREG(facts.st_mode) or facts.st_uid not in (os.geteuid(), owner):
            return None
        data = os.read(descriptor, PAGE_BYTES_MAX + 1)
    except OSError:
        return None
    finally:
        os.close(descriptor)
    try:
        return _page(json.loads(data)) if len(data) <= PAGE_BYTES_MAX else None
    except (ValueError, TypeError, KeyError, RecursionError):
        return None


def _page(found: Any) -> Page:
    """ValueError, TypeError or KeyError for anything that is not exactly a page."""
    if found["format"] != FORMAT or _count(found["version"]) != VERSION:
        raise ValueError("not a status page of this version")
    process = Process(
        _text(found["boot"]),
        _text(found["namespace"]),
        _count(found["pid"]),
        _count(found["start"]),
        _text(found["host"]),
    )
    ring = Ring(*(_count(found["ring"][name]) for name in Ring.__slots__))
    runs = tuple(
        RunStatus(
            _path(one["run"]),
            _count(one["committed"]),
            _count(one["failed"]),
            tuple(map(_save, _list(one["saves"], SAVES_MAX))),
        )
        for one in _list(found["runs"], RUNS_MAX)
    )
    return Page(process, _seconds(found["updated_at"]), ring, runs)


def _save(found: Any) -> SaveStatus:
    if found["state"] not in SAVE_STATES:
        raise ValueError("no state of a save")
    step, ended, error = found["step"], found["ended_at"], found["error"]
    if step is not None and (type(step) is not int or abs(step) > _NUMBER_MAX):
        raise ValueError("no step")
    rates = [found[name] for name in ("staged_bytes_per_second", "written_bytes_per_second")]
    stages = found["stages"]
    if type(stages) is not dict or len(stages) > STAGES_MAX:
        raise ValueError("no stages")
    return SaveStatus(
        name=_text(found["name"]),
        step=step,
        save_id=_text(found["save_id"]),
        rank=_count(found["rank"]),
        world_size=_count(found["world_size"]),
        state=found["state"],
        stage=_text(found["stage"]),
        stage_begun_at=_seconds(found["stage_begun_at"]),
        begun_at=_seconds(found["begun_at"]),
        ended_at=None if ended is None else _seconds(ended),
        size_bytes=_count(found["size_bytes"]),
        staged_bytes=_count(found["staged_bytes"]),
        written_bytes=_count(found["written_bytes"]),
        staged_bytes_per_second=None if rates[0] is None else _seconds(rates[0]),
        written_bytes_per_second=None if rates[1] is None else _seconds(rates[1]),
        stages={
            _text(name): StageCost(_seconds(seconds), _count(nbytes), _count(count))
            for name, (seconds, nbytes, count) in stages.items()
        },
        error=None if error is None else _text(error),
    )


def _list(value: Any, longest: int) -> list[Any]:
    if type(value) is not list or len(value) > longest:
        raise ValueError("no list, or too long")
    return value


def _text(value: Any) -> str:
    if type(value) is not str or len(value) > TEXT_CHARS_MAX:
        raise ValueError("no text, or too long")
    value.encode()  # lone surrogates cannot be shown
    return value


def _path(value: Any) -> str:
    if type(value) is not str or not value.startswith("/") or "\0" in value or len(value) > PATH_CHARS_MAX:
        raise ValueError("no path")
    return value


def _count(value: Any) -> int:
    if type(value) is not int or not 0 <= value <= _NUMBER_MAX:
        raise ValueError("no count")
    return value


def _seconds(value: Any) -> float:
    """Also rates: a finite number that is not negative."""
    if type(value) not in (int, float) or not 0 <= value <= _NUMBER_MAX or not math.isfinite(value):
        raise ValueError("no number")
    return float(value)
