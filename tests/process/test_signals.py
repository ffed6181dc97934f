"""Ctrl-C and SIGTERM, for real, at random moments of saves and loads.

Invariants:
  1. Every checkpoint that is visible afterwards is whole, and what was acknowledged is there.
  2. A process that goes on after KeyboardInterrupt has all its slots, no descriptors, the collector as it was, and no
     save in flight that it does not know of; its next save works and leaves nothing beside it.
  3. SIGTERM ends the process, at once where nobody handles it, and after the saves in flight where a handler exits.
"""

from __future__ import annotations

import gc
import os
import random
import select
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

import snapstone as ss
from distributed import ranks
from durability import doomed, small
from process.forks import WITHIN_S
from snapstone import _native

SEED = 1848
INTERRUPTS = 40
TERMINATIONS = 6


@pytest.fixture(autouse=True)
def seeded(monkeypatch: pytest.MonkeyPatch) -> None:
    print(f"seed {SEED}")
    monkeypatch.setenv("SNAPSTONE_CHUNK_BYTES", "65536")


# ---- SIGINT, after which the process goes on


def interrupted(act: Callable[[], object], delay_s: float) -> bool:
    """Calls `act` and sends this process a SIGINT meanwhile; whether it came through as KeyboardInterrupt."""

    def send() -> None:
        time.sleep(delay_s)
        os.kill(os.getpid(), signal.SIGINT)

    sender = threading.Thread(target=send)
    seen = False
    try:
        sender.start()
        act()
    except KeyboardInterrupt:
        seen = True
    try:
        while sender.is_alive():
            sender.join(0.001)
        for _ in range(5):
            time.sleep(0.001)  # it came after the act
    except KeyboardInterrupt:
        pass
    return seen


def interrupt_at_random(rank: int, directory: str, seed: int, kind: str) -> tuple[int, float]:
    """How often Ctrl-C came through, and the longest that any act took."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    chosen, run = random.Random(seed), Path(directory)
    ss.save(small.state(0), checkpoint_id=run / "first")
    acts = {
        "save": lambda path: ss.save(small.state(1), checkpoint_id=path),
        "overwrite": lambda path: ss.save(small.state(0), checkpoint_id=run / "first", overwrite=True),
        "async_save": lambda path: ss.async_save(small.state(1), checkpoint_id=path).result(60),
        "wait": lambda path: (ss.async_save(small.state(1), checkpoint_id=path), ss.wait(60)),
        "load": lambda path: ss.load(small.blank(0), checkpoint_id=run / "first"),
    }
    begin = time.monotonic()
    for _ in range(5):
        acts[kind](run / "timed")
        small_remove(run / "timed")
    usual = (time.monotonic() - begin) / 5
    came, longest = 0, 0.0
    for number in range(INTERRUPTS // len(acts)):
        path = run / f"c{number}"
        begin = time.monotonic()
        came += interrupted(lambda path=path: acts[kind](path), chosen.uniform(0, usual))
        longest = max(longest, time.monotonic() - begin)
        with suppress(Exception):
            ss.wait(60)
        assert gc.isenabled(), number
        if path.exists():
            small.assert_holds(path, 1)
        small.assert_holds(run / "first", 0)
        gc.collect()
        assert small.open_files(run) == [], number
        assert_slots_come_back()
        ss.save(small.state(2), checkpoint_id=run / f"after-{number}")
        small.assert_holds(run / f"after-{number}", 2)
        assert small.leftovers(run) == [], number
    return came, longest


def small_remove(path: Path) -> None:
    if path.exists():
        os.rename(path, path.with_name(f".trash-{os.urandom(16).hex()}"))


def assert_slots_come_back() -> None:
    """An interrupted job gives its slots back when the kernel has answered."""
    end = time.monotonic() + WITHIN_S
    while _native.ring_facts()["free_slots"] != _native.ring_facts()["slots"] and time.monotonic() < end:
        time.sleep(0.002)
    small.assert_slots_free()


@pytest.mark.parametrize("kind", ["save", "overwrite", "async_save", "wait", "load"])
def test_ctrl_c_at_any_moment_leaves_a_process_that_goes_on(directory: Path, kind: str) -> None:
    arguments = (str(directory), SEED + len(kind), kind)
    ((came, longest),) = ranks.values(ranks.run_ranks(1, interrupt_at_random, *arguments, store="none", timeout=100))
    assert came >= 1, "Ctrl-C never met an act"
    assert longest < WITHIN_S


# ---- SIGTERM, which ends it


def terminate_at_random(rank: int, directory: str, seed: int, handled: bool) -> list[tuple[int, int]]:
    """(newest step acknowledged, exit code) of each process."""
    chosen, ends = random.Random(seed), []
    for number in range(TERMINATIONS):
        run = Path(directory, f"k{number}")
        kind = chosen.choice(["sync", "async", "overwrite"])
        pid, pipe = doomed.forked(lambda to, run=run, kind=kind: save_until_terminated(run, kind, to, handled))
        acknowledged, end = b"", None
        while select.select([pipe], [], [], None if end is None else max(0.0, end - time.monotonic()))[0]:
            acknowledged += os.read(pipe, 4096)
            end = end or time.monotonic() + chosen.uniform(0.0, 0.05)
        os.kill(pid, signal.SIGTERM)
        while more := os.read(pipe, 4096):
            acknowledged += more
        os.close(pipe)
        steps = [int(line) for line in acknowledged.split(b"\n")[:-1]]
        ends.append((steps[-1], doomed.how_it_ended(pid)))
    return ends


def save_until_terminated(run: Path, kind: str, acknowledge_to: int, handled: bool) -> None:
    signal.signal(signal.SIGTERM, leave if handled else signal.SIG_DFL)
    try:
        doomed.save_forever(run, kind, acknowledge_to)
    except SystemExit as leaving:
        with suppress(Exception):
            ss.wait(60)
        assert small.leftovers(run) == []
        os._exit(int(str(leaving.code)))


def leave(signum: int, frame: object) -> None:
    raise SystemExit(128 + signum)


@pytest.mark.parametrize("handled", [False, True], ids=["default", "handler that exits"])
def test_sigterm_at_any_moment_leaves_whole_checkpoints(tmp_path: Path, directory: Path, handled: bool) -> None:
    arguments = (str(directory), SEED + handled, handled)
    (ends,) = ranks.values(ranks.run_ranks(1, terminate_at_random, *arguments, store="none", timeout=100))
    assert len(ends) == TERMINATIONS
    for number, (step, code) in enumerate(ends):
        assert code == (128 + signal.SIGTERM if handled else -signal.SIGTERM), (number, code)
        run = directory / f"k{number}"
        visible = sorted(path for path in run.iterdir() if not path.name.startswith("."))
        steps = {path: ss.Checkpoint.open(path).step for path in visible}
        for path, found in steps.items():
            assert found is not None
            small.assert_holds(path, found)
        assert max(found for found in steps.values() if found is not None) >= step
        ss.save(small.state(3), checkpoint_id=run / "after")
        assert not any((run / name / "OWNER").exists() for name in small.leftovers(run))
