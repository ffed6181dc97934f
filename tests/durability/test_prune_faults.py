"""One call of a prune fails, anywhere: Python's own through events of an audit, the others through the fault seam.

Invariants, for the Nth call of each kind, once and for ever, with the errnos that it can give (`seam.GIVES`):
  1. What fails is told: an OSError with that errno. What is not told has left the checkpoints that were wanted, alone.
  2. What is visible is whole, and the newest stay. Nothing is removed before its renaming is durable.
  3. The next prune and the next save clear everything away. No descriptor, lock, slot or thread is left.
"""

from __future__ import annotations

import errno
import os
import shutil
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from distributed import ranks
from durability import chain, counted, dying, seam, small

# Events of an audit, and whose errors the call gives. The event comes before the call, where Python does not try again
# after EINTR; nor is it told of any stat or close.
EVENTS = {
    "open": "open",
    "os.listdir": "opendir",
    "os.scandir": "opendir",
    "os.rename": "rename",
    "os.remove": "unlink",
    "os.rmdir": "rmdir",
}
KEEP = 2

pytestmark = [pytest.mark.timeout(900), pytest.mark.usefixtures("small_chunks")]


class Audit:
    """Counts this thread's calls of EVENTS between `arm` and `disarm`, and makes some fail. In its process for good."""

    def __init__(self) -> None:
        self.seen: Counter[str] = Counter()
        self._fault: tuple[str, int, int, bool] | None = None
        self._thread = threading.get_ident()
        sys.addaudithook(self._see)

    def arm(self, call: str = "none", nth: int = 1, number: int = 0, lasting: bool = False) -> None:
        self.seen.clear()
        self._fault = call, nth, number, lasting

    def disarm(self) -> None:
        self._fault = None

    def _see(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self._fault is None or event not in EVENTS or threading.get_ident() != self._thread:
            return
        call, nth, number, lasting = self._fault
        self.seen[EVENTS[event]] += 1
        count = self.seen[call]
        if EVENTS[event] == call and (count == nth or (lasting and count > nth)):
            raise OSError(number, os.strerror(number))


def faults_of_python(counts: Counter[str]) -> Iterator[tuple[str, int, str, bool]]:
    """As `seam.every_fault`, of which `make test` takes once each call with one errno."""
    for call, nth, action, lasting in seam.every_fault(dict(counts), thin=True):
        name = action.removeprefix("errno=")
        if name == "EINTR":
            if seam.IS_LONG:
                continue
            name = "EIO"
        yield call, nth, name, lasting


def prune_with_every_error(rank: int, directory: Path) -> dict[str, int]:
    """How often which call was seen to fail."""
    prepared, run = directory / "prepared", directory / "run"
    audit, failed = Audit(), Counter[str]()

    def start() -> None:
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(prepared, run, copy_function=os.link)

    def judge(error: str | None, what: object) -> None:
        if error is None:
            assert sorted(os.listdir(run)) == ["step-4", "step-5"], what
        resources.assert_none_leaked(what)
        dying.assert_pruned_by_the_next_one(run)
        resources.assert_none_leaked(what)

    start()
    dying.prune(run, KEEP)  # imports what it needs
    dying.assert_pruned_by_the_next_one(run)
    resources = small.Resources(run)
    start()
    audit.arm()
    native = seam.calls_of(lambda: dying.prune(run, KEEP))
    audit.disarm()
    for call, nth, name, lasting in faults_of_python(Counter(audit.seen)):
        start()
        counted.count("failing calls")
        audit.arm(call, nth, number := int(getattr(errno, name)), lasting)
        error = seam.outcome_of(lambda: dying.prune(run, KEEP), number)
        audit.disarm()
        assert error is not None, (call, nth, name, lasting)
        failed[call] += 1
        judge(error, (call, nth, name, lasting))
    start()
    for fault in seam.sweep(native):
        whole = [path.stat().st_ino for path in sorted(run.iterdir())]
        error = seam.outcome_of(lambda: dying.prune(run, KEEP), fault.number)
        fault.stop()
        assert (error is None) == fault.is_got_over, fault
        failed[f"native {fault.call}"] += error is not None
        if error is not None:
            assert {path.stat().st_ino for path in run.iterdir()} == set(whole), (fault, "out of sight, and all there")
            assert len(list(run.glob(".trash-*/MANIFEST.json"))) == 3, fault
        judge(error, fault)
        start()
    return dict(failed)


def test_one_failing_call_of_a_prune(directory: Path) -> None:
    chain.make_chain(directory / "prepared", 5)
    (failed,) = ranks.values(ranks.run_ranks(1, prune_with_every_error, directory, store="none", timeout=800))
    print(failed)
    assert failed.keys() >= {*EVENTS.values(), "native open", "native fsync"}
    assert failed["unlink"] > 12
    assert failed["native fsync"] >= 3
