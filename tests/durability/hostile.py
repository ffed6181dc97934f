"""Opens a hostile checkpoint on every path into the package, within limits of time and memory.

The limit of time is one of CPU time, of all threads, because a machine with other work says little by the clock. That
other work lengthens CPU time too, by its part of caches and cores, so a read that took too long is tried again, and the
shortest counts. `HANG_SECONDS` is no promise: it ends what waits for something.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import snapstone as ss
from durability import small

CPU_SECONDS_MAX = 0.1
TRIES_MAX = 3
HANG_SECONDS = 20.0
GROWTH_BYTES_MAX = 64 << 20

Outcome = ss.CheckpointError | None


def peak_bytes() -> int:
    """The most memory that this process has had since `reset_peak`."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) << 10


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def try_everything(path: Path) -> dict[str, Outcome]:
    """How load, the lazy reader and verify end; any other error than a CheckpointError, and any excess, fails."""
    return {name: limited(read, path) for name, read in READS.items()}


def limited(read: Callable[[Path], Any], path: Path, cpu_seconds_max: float = CPU_SECONDS_MAX) -> Outcome:
    reset_peak()
    memory = peak_bytes()
    outcome = in_time(lambda: read(path), read.__name__, cpu_seconds_max)
    growth = peak_bytes() - memory
    assert growth < GROWTH_BYTES_MAX, f"{read.__name__} took {growth} bytes"
    return outcome


def in_time(read: Callable[[], Any], name: str, cpu_seconds_max: float = CPU_SECONDS_MAX) -> Outcome:
    """How the read ends, in less CPU time than that."""
    took: list[float] = []
    while len(took) < TRIES_MAX and not (took and min(took) < cpu_seconds_max):
        clock, begin = time.monotonic(), time.process_time()
        outcome: Outcome = None
        try:
            read()
        except ss.CheckpointError as error:
            str(error)
            outcome = error
        took.append(time.process_time() - begin)
        assert time.monotonic() - clock < HANG_SECONDS, f"{name} took {time.monotonic() - clock:.1f} s"
    assert min(took) < cpu_seconds_max, f"{name} took {min(took):.3f} s of CPU, and no less in {len(took)} tries"
    return outcome


def look_at_everything(path: Path) -> None:
    with ss.Checkpoint.open(path) as checkpoint:
        for name in [*checkpoint.keys()]:
            checkpoint.get_slice(name)
        checkpoint.load_tensors()
        checkpoint.objects()
        checkpoint.state_dict()
        _ = (checkpoint.metadata, checkpoint.metrics, checkpoint.nbytes, checkpoint.own_nbytes, repr(checkpoint))


def verify(path: Path) -> None:
    report = ss.verify(path)
    if not report:
        raise ss.CheckpointError(report.problems[0])


READS: dict[str, Callable[[Path], Any]] = {"load": small.load, "open": look_at_everything, "verify": verify}


def assert_refused(path: Path, kind: type[ss.CheckpointError] = ss.CheckpointError, match: str = "") -> None:
    """Nothing reads it, and every refusal is of the given kind."""
    for name, outcome in try_everything(path).items():
        assert outcome is not None, f"{name} accepted it"
        if name != "verify":
            assert isinstance(outcome, kind), outcome
        assert match in str(outcome), outcome


def skip_without_memory_counter() -> None:
    try:
        reset_peak()
    except OSError as error:
        pytest.skip(f"/proc/self/clear_refs: {error}")
