"""Opens a hostile checkpoint on every path into the package, within limits of time and memory.

The limit of time is one of CPU time, of all threads, because a machine with other work says little by the clock. That
other work lengthens CPU time too, by its part of caches and cores, so a read that took too long is tried again, and the
shortest counts. `HANG_SECONDS` is no promise: it finds what waits for something.

Two kinds of reads may take longer. `verify` with its diagnosis looks for a flipped bit once the checkpoint is refused,
as long as `snapstone.diagnosis` says; a caller who does not want to pay for that asks for none. And a checkpoint of
thousands of tensors or files takes `ITEM_SECONDS_MAX` for each: all of them are given out, or looked for on the disk.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import snapstone as ss
from durability import small
from fuzz.limits import CPU_SECONDS_MAX, GROWTH_BYTES_MAX, TRIES_MAX
from snapstone.diagnosis import CHUNKS_MAX, SEARCH_SECONDS

ITEM_SECONDS_MAX = 0.0002
HANG_SECONDS = 20.0

Outcome = ss.CheckpointError | None


def peak_bytes() -> int:
    """The most memory that this process has had since `reset_peak`."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) << 10


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def try_everything(path: Path, items: int = 0) -> dict[str, Outcome]:
    """How load, the lazy reader and verify end; any other error than a CheckpointError, and any excess, fails."""
    return {name: limited(read, path, items) for name, read in READS.items()}


def limited(read: Callable[[Path], Any], path: Path, items: int = 0) -> Outcome:
    reset_peak()
    memory = peak_bytes()
    searching = CHUNKS_MAX * SEARCH_SECONDS if read is diagnose else 0.0
    cpu_seconds_max = CPU_SECONDS_MAX + items * ITEM_SECONDS_MAX + searching
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
    raise_if_wrong(ss.verify(path, diagnosis=False))


def diagnose(path: Path) -> None:
    raise_if_wrong(ss.verify(path))


def raise_if_wrong(report: ss.VerifyReport) -> None:
    if not report:
        raise ss.CheckpointError(report.problems[0])


READS: dict[str, Callable[[Path], Any]] = {
    "load": small.load,
    "open": look_at_everything,
    "verify": verify,
    "diagnosis": diagnose,
}


def assert_refused(path: Path, kind: type[ss.CheckpointError] = ss.CheckpointError, match: str = "") -> None:
    """Nothing reads it, and every refusal is of the given kind."""
    for name, outcome in try_everything(path).items():
        assert outcome is not None, f"{name} accepted it"
        if name in ("load", "open"):
            assert isinstance(outcome, kind), outcome
        assert match in str(outcome), outcome


def skip_without_memory_counter() -> None:
    try:
        reset_peak()
    except OSError as error:
        pytest.skip(f"/proc/self/clear_refs: {error}")
