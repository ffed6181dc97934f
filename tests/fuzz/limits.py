"""What an input may cost, and the input in hand where a process sees it that outlives the one that runs it.

Promised is, for each input: less than 100 ms of CPU, and less than 64 MiB of memory beyond what was there before it.

A finding is more, if the same input does it `TRIES_MAX` times: the first may pay for an import or fill a cache, the
collector runs when it likes, and other work on the machine makes CPU time longer, too. `SLOWER` names the targets that
may take longer, and why. Address space has `SPACE_BYTES_MAX`: enough for a thread with its arena, too little for an
allocation of a gigabyte that nobody touches. What does not come back is killed, after `HANG_CPU_SECONDS` at work or
`WALL_SECONDS_MAX` asleep; these are no promises.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import resource
import struct
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

CPU_SECONDS_MAX = 0.1
SLOWER = {"report": 1.0}  # reads one file and then draws all of the page, which costs the same for a sound file
INSTRUMENTED = 5  # times as long, where atheris counts every branch
GROWTH_BYTES_MAX = 64 << 20
TRIES_MAX = 3
HANG_CPU_SECONDS = 4.0
WALL_SECONDS_MAX = 60.0
SPACE_BYTES_MAX = 768 << 20
BYTES_MAX = 200

Target = Callable[[bytes], None]


class Excess(BaseException):
    """Too much time or memory for an input: no reader takes it for an error of its own."""


class Hand:
    """The input that is being run, in memory that a process shares with those that it forks."""

    _HEAD = struct.Struct("QddI")  # executions, clock and CPU seconds at the begin (0: none in hand), length

    def __init__(self) -> None:
        self._map = mmap.mmap(-1, 4096)
        self.executions = 0

    def take(self, data: bytes) -> None:
        kept = data[: 4096 - self._HEAD.size]
        self._map[self._HEAD.size : self._HEAD.size + len(kept)] = kept
        self._HEAD.pack_into(self._map, 0, self.executions, time.monotonic(), time.process_time(), len(kept))

    def drop(self) -> None:
        self.executions += 1
        self._HEAD.pack_into(self._map, 0, self.executions, 0.0, 0.0, 0)

    def seen(self) -> tuple[int, float, float, bytes | None]:
        """For the other process: executions, when the input in hand began by the clock and in CPU time, and it."""
        executions, begin, cpu_begin, length = self._HEAD.unpack_from(self._map)
        data = self._map[self._HEAD.size : self._HEAD.size + length] if begin else None
        return executions, begin, cpu_begin, data


def cpu_seconds_max(target: str) -> float:
    return SLOWER.get(target, CPU_SECONDS_MAX)


def save(findings: Path, name: str, data: bytes) -> Path:
    """The input as a file of its own."""
    findings.mkdir(parents=True, exist_ok=True)
    path = findings / f"{name.replace(':', '-')}-{hashlib.sha256(data).hexdigest()[:12]}"
    path.write_bytes(data)
    return path


class Limited:
    """A target whose excess raises `Excess`; whatever comes out of it, its input is saved."""

    def __init__(self, name: str, target: Target, hand: Hand, findings: Path, cpu_seconds_max: float) -> None:
        self._name, self._target, self._hand, self._findings = name, target, hand, findings
        self._cpu_seconds_max = cpu_seconds_max
        self._peaks: int | None = None
        with suppress(OSError):  # where no process may reset its peak, only a new peak of the process is seen
            self._peaks = os.open("/proc/self/clear_refs", os.O_WRONLY)

    def __call__(self, data: bytes) -> None:
        try:
            for _ in range(TRIES_MAX):
                if not (excess := self._excess(data)):
                    return
            raise Excess(excess)
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            path = save(self._findings, self._name, data)
            print(f"{self._name}: {type(error).__name__}: {error}\ninput saved in {path}", flush=True)
            raise

    def _excess(self, data: bytes) -> str:
        """What was too much; "" if nothing was."""
        if self._peaks is not None:
            os.write(self._peaks, b"5")
        peak, begin = peak_bytes(), time.process_time()
        _limit_space(SPACE_BYTES_MAX)
        self._hand.take(data)
        try:
            self._target(data)
        finally:
            self._hand.drop()
            _limit_space(None)
        seconds, growth = time.process_time() - begin, peak_bytes() - peak
        excesses = []
        if seconds >= self._cpu_seconds_max:
            excesses.append(f"it took {seconds:.2f} s of CPU; promised are {self._cpu_seconds_max} s")
        if growth >= GROWTH_BYTES_MAX:
            excesses.append(f"it took {growth >> 20} MiB of memory; promised are {GROWTH_BYTES_MAX >> 20} MiB")
        return "; ".join(excesses)


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def _limit_space(more_bytes: int | None) -> None:
    soft, hard = resource.RLIM_INFINITY, resource.getrlimit(resource.RLIMIT_AS)[1]
    if more_bytes is not None:
        with open("/proc/self/statm", "rb", buffering=0) as file:
            soft = int(file.read(64).split()[0]) * mmap.PAGESIZE + more_bytes
    if hard != resource.RLIM_INFINITY:
        soft = hard if soft == resource.RLIM_INFINITY else min(soft, hard)
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def cpu_seconds(pid: int) -> float:
    """Of all threads of another process."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
