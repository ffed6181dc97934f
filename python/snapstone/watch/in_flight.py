"""A save that has not committed: what its staging directory tells from outside."""

from __future__ import annotations

import errno
import os
import re
import stat
import time
from collections import defaultdict
from dataclasses import dataclass
from typing import Literal, NamedTuple

__all__ = ["RankProgress", "Rates", "SaveInFlight", "Stage", "look_at"]

Stage = Literal["starting", "writing", "written", "committing"]

_RANK_FILE = re.compile(r"rank-(\d{5,})\.(index|data|carried\.data)", re.ASCII)
_EXTENTS_MAX = 4096  # of one file that are looked at; those behind count as written when their blocks are there
_BLOCK_BYTES = 512  # the unit of st_blocks, whatever the file system's


class RankProgress(NamedTuple):
    """`done`: its data are written and its index stands beside them."""

    rank: int
    written_bytes: int
    size_bytes: int
    done: bool


@dataclass(frozen=True, slots=True)
class SaveInFlight:
    """`state` as of `Leftover`. `age_seconds`: None when its begin cannot be told. Sizes are of data files.

    `size_bytes` is what has been allocated: with a codec the files end up smaller, written through the page cache or on
    a file system without fallocate they grow, and ranks that have not begun are not in it. `readable`: False when the
    directory is another user's.
    """

    name: str
    state: Literal["live", "dead", "unknown"]
    stage: Stage
    begun_at: float | None
    ranks: tuple[RankProgress, ...]
    readable: bool = True
    bytes_per_second: float | None = None

    @property
    def written_bytes(self) -> int:
        return sum(one.written_bytes for one in self.ranks)

    @property
    def size_bytes(self) -> int:
        return sum(one.size_bytes for one in self.ranks)

    @property
    def remaining_seconds(self) -> float | None:
        """Until the data are written, at the present rate."""
        left = self.size_bytes - self.written_bytes
        return left / self.bytes_per_second if left and self.bytes_per_second and self.stage == "writing" else None

    def age_seconds(self, now: float) -> float | None:
        return None if self.begun_at is None else max(0.0, now - self.begun_at)


def look_at(run: str, name: str, state: Literal["live", "dead", "unknown"]) -> SaveInFlight | None:
    """None for one that has been renamed or removed meanwhile."""
    path = os.path.join(run, name)
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    except OSError:
        return SaveInFlight(name, state, "starting", None, (), readable=False)
    try:
        names = os.listdir(descriptor)
        ranks = _ranks(descriptor, names)
        return SaveInFlight(name, state, _stage(names, ranks), _begun_at(descriptor), ranks)
    finally:
        os.close(descriptor)


def _stage(names: list[str], ranks: tuple[RankProgress, ...]) -> Stage:
    if "MANIFEST.json" in names or "MANIFEST.xxh128" in names:
        return "committing"
    if not ranks:
        return "starting"
    return "written" if all(one.done for one in ranks) else "writing"


def _begun_at(directory: int) -> float | None:
    """OWNER is written at the begin, once, and removed shortly before the commit."""
    try:
        return os.stat("OWNER", dir_fd=directory, follow_symlinks=False).st_mtime
    except OSError:
        return None


def _ranks(directory: int, names: list[str]) -> tuple[RankProgress, ...]:
    written: dict[int, int] = defaultdict(int)
    size: dict[int, int] = defaultdict(int)
    done: set[int] = set()
    for name in names:
        if not (found := _RANK_FILE.fullmatch(name)):
            continue
        rank = int(found[1])
        if found[2] == "index":
            done.add(rank)
            continue
        try:
            file = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=directory)
        except OSError:
            continue
        try:
            facts = os.fstat(file)
            if stat.S_ISREG(facts.st_mode):
                size[rank] += facts.st_size
                written[rank] += _written_bytes(file, facts)
        finally:
            os.close(file)
    return tuple(RankProgress(rank, written[rank], size[rank], rank in done) for rank in sorted({*size, *done}))


def _written_bytes(file: int, facts: os.stat_result) -> int:
    """What has been written into a file that was allocated whole: to SEEK_DATA, allocated and unwritten is a hole.

    File systems that cannot tell (NFS before 4.2, FUSE) say that all of it is data.
    """
    at = total = 0
    for _ in range(_EXTENTS_MAX):
        if at >= facts.st_size:
            return total
        try:
            begin = os.lseek(file, at, os.SEEK_DATA)
            at = os.lseek(file, begin, os.SEEK_HOLE)
        except OSError as error:
            if error.errno == errno.ENXIO:  # no data from here on
                return total
            break
        total += at - begin
    return min(facts.st_size, facts.st_blocks * _BLOCK_BYTES)


class Rates:
    """Bytes per second of saves in flight, over the last seconds of looking at them. Threads: one at a time."""

    WINDOW_SECONDS = 10.0

    def __init__(self) -> None:
        self._seen: dict[str, list[tuple[float, int]]] = {}  # by save: monotonic seconds, bytes written by then

    def of(self, saves: list[SaveInFlight], now: float) -> list[float | None]:
        """In the order of `saves`. At the first look it is the rate since the save's begin, where that is known."""
        moment = time.monotonic()
        seen, self._seen = self._seen, {}
        rates: list[float | None] = []
        for save in saves:
            earlier = [one for one in seen.get(save.name, []) if moment - one[0] <= self.WINDOW_SECONDS]
            self._seen[save.name] = [*earlier, (moment, save.written_bytes)]
            age = save.age_seconds(now)
            if earlier and moment > earlier[0][0]:
                rates.append(max(0, save.written_bytes - earlier[0][1]) / (moment - earlier[0][0]))
            else:
                rates.append(save.written_bytes / age if age else None)
        return rates
