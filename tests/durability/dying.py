"""What processes do that are killed, or fail, in Python code: run in a rank (tests/distributed/ranks.py) or a fork."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import snapstone as ss
from durability import chain, doomed, points, small
from snapstone import _native
from snapstone.integrations.step_folder import StepFolder

CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "open"}  # events of an audit


def forks(rank: int, operations: list[tuple[Callable[..., Any], tuple[Any, ...]]]) -> list[int]:
    """The exit codes of forks that each do one of these."""
    codes = []
    for function, arguments in operations:
        pid, pipe = doomed.forked(lambda _, function=function, arguments=arguments: function(*arguments))
        os.close(pipe)
        codes.append(doomed.how_it_ended(pid))
    return codes


def save_lines(rank: int, run: str, kind: str) -> list[str]:
    """Of the save that `save_to_the_line` kills."""
    passed = points.Seen()
    doomed.save_and_die(Path(run), kind, "none:1:kill", ready=passed.start)
    passed.stop()
    return list(passed.lines)


def save_to_the_line(run: str, kind: str, place: str) -> None:
    doomed.save_and_die(Path(run), kind, "none:1:kill", ready=lambda: points.arm(place))


def save_after(run: Path, name: str, rule: str) -> None:
    _native.fault_arm(rule)
    ss.save(small.state(2), checkpoint_id=run / name)


def die_at_change(under: Path, nth: int) -> None:
    """Before the `nth` change that Python code makes to the directory."""
    seen = 0

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen
        if event not in CHANGES or (
            event == "open" and not (isinstance(arguments[2], int) and arguments[2] & os.O_CREAT)
        ):
            return
        # Removal of a tree names files relative to a descriptor: whatever it removes, it is in the directory.
        if event in ("os.remove", "os.rmdir") or str(arguments[0]).startswith(str(under)):
            seen += 1
            if seen == nth:
                points.die()

    sys.addaudithook(audit)


def prune(run: Path, keep: int) -> None:
    for trash in StepFolder(str(run)).prune(keep, durable=-1):
        shutil.rmtree(trash)


def prune_and_die(run: Path, keep: int, nth: int) -> None:
    die_at_change(run, nth)
    prune(run, keep)


def assert_pruned_by_the_next_one(run: Path) -> None:
    """Whatever became of a prune to two of the chain of five: the checkpoints that are visible are whole, and the next
    prune and the next save leave what is wanted.
    """
    visible = sorted(name for name in os.listdir(run) if not name.startswith("."))
    assert visible[-2:] == ["step-4", "step-5"]
    for name in visible:
        chain.assert_step(run / name, int(name.removeprefix("step-")))
    assert StepFolder(str(run)).newest() == 5
    prune(run, 2)
    ss.save(chain.state_at(6), checkpoint_id=run / "step-6", base=run / "step-5")
    assert sorted(os.listdir(run)) == ["step-4", "step-5", "step-6"]
    chain.assert_step(run / "step-6", 6)


def compact_lines(rank: int, run: str) -> list[str]:
    passed = points.Seen(["compaction"])
    passed.start()
    ss.compact(Path(run, "step-3"))
    passed.stop()
    return list(passed.lines)


def compact_to_the_line(run: Path, place: str) -> None:
    points.arm(place)
    ss.compact(run / "step-3")
