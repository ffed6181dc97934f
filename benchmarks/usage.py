"""What an operation cost beside time: CPU seconds of this process and its children, and the peak of resident memory."""

from __future__ import annotations

import os
import resource
from pathlib import Path
from types import TracebackType

__all__ = ["Usage", "resident_bytes"]

_TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def resident_bytes() -> int:
    return _status_bytes("VmRSS")


def _reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")  # proc(5): VmHWM becomes VmRSS; Linux 4.0


def cpu_seconds() -> float:
    """User and system time of this process, of children that ended and of descendants that still run."""
    total = 0.0
    for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN):
        usage = resource.getrusage(who)
        total += usage.ru_utime + usage.ru_stime
    return total + _descendants_ticks() / _TICKS_PER_SECOND


def _descendants_ticks() -> int:
    parent_of: dict[int, int] = {}
    ticks_of: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue  # it ended meanwhile
        parent_of[int(entry.name)] = int(fields[1])
        ticks_of[int(entry.name)] = sum(map(int, fields[11:15]))  # utime, stime, cutime, cstime
    own = os.getpid()
    descendants = {own}
    while True:
        more = {process for process, parent in parent_of.items() if parent in descendants} - descendants
        if not more:
            break
        descendants |= more
    return sum(ticks_of[process] for process in descendants - {own})


class Usage:
    """Measures the body of a `with` statement; reading the books costs milliseconds, outside the body's own clock."""

    def __init__(self) -> None:
        self.cpu_seconds = 0.0
        self.peak_extra_bytes = 0  # above what was resident at the start; mapped file pages count
        self.retained_bytes = 0  # still resident at the end

    def __enter__(self) -> Usage:
        self._resident = resident_bytes()
        _reset_peak()
        self._cpu = cpu_seconds()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.cpu_seconds = cpu_seconds() - self._cpu
        self.peak_extra_bytes = max(0, _status_bytes("VmHWM") - self._resident)
        self.retained_bytes = max(0, resident_bytes() - self._resident)
