"""What a part measures with: the device, a clock, a place for checkpoints, and results that are on disk at once.

A part is a list of steps. A step that raises, or for which no time or room is left, is in the results with the reason,
and the next one runs.
"""

from __future__ import annotations

import gc
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from .scale import DEVICE, FAKE, Scale

__all__ = ["Bench", "NoRoom", "gbps", "spread"]

_SPARE_BYTES = 1 << 30  # of memory and file systems: never fill either


class NoRoom(Exception):
    """What would be needed, and what there is."""


def spread(samples: Sequence[float]) -> dict[str, Any] | None:
    """Median, lowest and highest, and all of them."""
    if not samples:
        return None
    return {
        "median": statistics.median(samples),
        "low": min(samples),
        "high": max(samples),
        "samples": list(samples),
    }


def gbps(nbytes: int, seconds: Sequence[float]) -> dict[str, Any] | None:
    """10^9 bytes per second."""
    return spread([nbytes / one / 1e9 for one in seconds if one > 0])


class Bench:
    """`device` is current; torch's current stream is what everything is ordered by."""

    device = torch.device("cuda:0")

    def __init__(self, job: dict[str, Any]) -> None:
        self.part: str = job["part"]
        self.fake: bool = job["fake"]
        self.scale: Scale = FAKE if self.fake else DEVICE
        self.stand_in: Any = None  # for the device, on the fake driver
        self.results: dict[str, Any] = {}
        self.problems: list[str] = []
        self._memory_bytes = int(job["memory_bytes"])
        self._prefix = str(job["prefix"])
        self._directories = [Path(path) for path in job["directories"]]
        self._scratch: list[Path] = []
        self._result = Path(job["result"])
        self._end = time.monotonic() + float(job["seconds"])
        self._number = 0

    # Results ----------------------------------------------------------------------------------------------------------

    def left(self) -> float:
        """Seconds until this process is ended."""
        return self._end - time.monotonic()

    def step(self, name: str, measure: Callable[[], Any], *, seconds: float = 1.0) -> Any:
        """`results[name]` becomes what `measure` returns. None, and the reason in `problems`, if it raised or if it is
        likely to need more seconds than are left.
        """
        begin = time.monotonic()
        found = None
        if self.left() < seconds:
            self._missed(name, "not_run", f"{self.left():.1f} s left, {seconds:g} s needed")
        else:
            try:
                found = self.results[name] = measure()
            except NoRoom as error:
                self._missed(name, "not_run", str(error))
            except (Exception, SystemExit) as error:  # there are engines that end the process
                traceback.print_exc()
                self._missed(name, "failed", f"{type(error).__name__}: {' '.join(str(error).split())}"[:600])
        gc.collect()
        if not self.fake:
            torch.cuda.empty_cache()
        print(f"{self.part}.{name}: {time.monotonic() - begin:.2f} s", file=sys.stderr, flush=True)
        self.write()
        return found

    def _missed(self, name: str, how: str, why: str) -> None:
        self.results[name] = {how: why}
        self.problems.append(f"{name}: {how.replace('_', ' ')}: {why}")

    def write(self) -> None:
        """Whole, or as it was before: this process may be ended at any time."""
        document = {"results": self.results, "problems": self.problems}
        part = self._result.with_suffix(".part")
        part.write_text(json.dumps(document))
        part.replace(self._result)

    # The clock --------------------------------------------------------------------------------------------------------

    def settle(self) -> None:
        """Nothing is under way on the device."""
        torch.cuda.synchronize()

    def wait(self) -> None:
        """Until the current stream has done what it was given."""
        torch.cuda.current_stream(self.device).synchronize()

    def timed(self, operation: Callable[[], Any]) -> float:
        """Seconds from a settled device until the current stream is done with it."""
        self.settle()
        begin = time.perf_counter()
        operation()
        self.wait()
        return time.perf_counter() - begin

    def repeated(self, operation: Callable[[], Any], *, repeat: int | None = None) -> list[float]:
        """Of several times, after one that does not count; as many as there is time for, at least one."""
        self.timed(operation)
        found: list[float] = []
        while len(found) < (repeat or self.scale.repeat) and (not found or self.left() > 2 * found[-1] + 1):
            found.append(self.timed(operation))
        return found

    # Memory -----------------------------------------------------------------------------------------------------------

    def random(self, nbytes: int) -> torch.Tensor:
        """Bytes on the device that no memory compresses; a multiple of 8."""
        if self.fake:
            return torch.randint(0, 256, (nbytes,), dtype=torch.uint8).to(self.device)
        return torch.empty(nbytes // 8, dtype=torch.int64, device=self.device).random_().view(torch.uint8)

    def pinned(self, nbytes: int) -> torch.Tensor:
        """Of the host; the fake's torch has no pinned memory."""
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=not self.fake)

    def check_host_memory(self, nbytes: int, what: str) -> None:
        from snapstone.bench.environment import memory_available_bytes

        available = memory_available_bytes()
        if self._memory_bytes:  # of the machine, where the kernel shows less until it is used
            available = max(available, self._memory_bytes - torch_resident_bytes())
        if not self.fake and nbytes + _SPARE_BYTES > available:
            raise NoRoom(f"{what}: {nbytes / 1e9:.1f} GB of host memory are needed, {available / 1e9:.1f} GB are there")

    def place(self, nbytes: int) -> Path:
        """A directory in which checkpoints of so many bytes in all have room: in the first of the places that do.

        Raises:
            NoRoom: in none.
        """
        why = []
        for directory in self._directories:
            free = shutil.disk_usage(directory).free
            if nbytes + (0 if self.fake else _SPARE_BYTES) <= free:
                found = Path(tempfile.mkdtemp(prefix=self._prefix, dir=directory))
                self._scratch.append(found)
                return found
            why.append(f"{directory}: {free / 1e9:.1f} GB free")
        raise NoRoom(f"room for {nbytes / 1e9:.1f} GB of checkpoints; {'; '.join(why)}")

    @contextmanager
    def checkpoint(self, directory: Path) -> Iterator[Path]:
        """A name for one; what it becomes is removed, outside all clocks."""
        self._number += 1
        path = directory / f"checkpoint-{self._number:04d}"
        try:
            yield path
        finally:
            shutil.rmtree(path, ignore_errors=True)

    def close(self) -> None:
        for path in self._scratch:
            shutil.rmtree(path, ignore_errors=True)


def torch_resident_bytes() -> int:
    """Of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")
