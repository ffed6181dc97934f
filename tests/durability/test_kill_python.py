"""SIGKILL before any line and before any file operation of what is written in Python, and while what a kill has left is
cleared away. tests/durability/test_kill.py has the system calls, tests/distributed/test_killed_ranks.py several ranks.

Invariants: those of test_kill.py; also of pruning and compaction, whose every step leaves whole checkpoints only.
"""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

import snapstone as ss
from distributed import ranks
from durability import chain, doomed, dying, small
from durability.recovered import assert_recovered, owner_of
from snapstone import _native

ALL = os.environ.get("SNAPSTONE_TEST_KILLS") == "all"
KILLED = -signal.SIGKILL

pytestmark = [pytest.mark.timeout(3600 if ALL else 900), pytest.mark.usefixtures("small_chunks")]


def in_forks(*operations: tuple[Any, ...]) -> list[int]:
    """Each (function, *arguments) in a fork of one new process; their exit codes."""
    listed = [(function, arguments) for function, *arguments in operations]
    (codes,) = ranks.values(ranks.run_ranks(1, dying.forks, listed, store="none", timeout=3400 if ALL else 800))
    return list(codes)


# Saves ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "stride"), [("sync", 12), ("overwrite", 30), ("carry", 30), ("async", 30)])
def test_killed_before_any_line(directory: Path, kind: str, stride: int) -> None:
    if kind in small.DELTAS:
        small.save_previous(directory / "prepared")
    (lines,) = ranks.values(ranks.run_ranks(1, dying.save_lines, str(directory / "whole"), kind, store="none"))
    assert len(lines) > 200
    wanted = lines if ALL else [*lines[:-4:stride], *lines[-4:]]  # few lines follow the commit
    codes = in_forks(
        *((dying.save_to_the_line, str(directory / f"n{number}"), kind, line) for number, line in enumerate(wanted))
    )
    assert set(codes) <= {KILLED, 0}
    assert codes.count(KILLED) > len(codes) * 9 // 10, "lines that are not reached prove nothing"
    outcomes = [assert_recovered(directory / f"n{number}", kind) for number in range(len(wanted))]
    assert {"left .stag", "left "} <= set(outcomes), set(outcomes)
    assert "committed" in outcomes or kind != "sync"


# Double faults --------------------------------------------------------------------------------------------------------

# What kills leave: files without a manifest, a whole checkpoint that nobody sees, linked files, a replaced checkpoint
# under the staging name and half removed.
LEAVERS = [("sync", "fsync:2:kill"), ("sync", "renameat2:1:kill"), ("carry", "fsync:4:kill")]
LEAVERS += [("overwrite", "rename:1:kill"), ("overwrite", "unlink:4:kill"), ("sync", "flock:1:kill")]


def leave(directory: Path) -> Path:
    """A run with the checkpoint "previous", and all that the LEAVERS leave."""
    small.save_previous(directory / "prepared")
    places = [directory / f"left-{number}" for number in range(len(LEAVERS))]
    codes = in_forks(*((doomed.save_and_die, place, *one) for place, one in zip(places, LEAVERS, strict=True)))
    assert codes == [KILLED] * len(LEAVERS)
    run = directory / "leftovers"
    run.mkdir()
    ss.save(small.state(1), checkpoint_id=run / "previous")
    for place in places:
        (name,) = small.leftovers(place)
        os.utime(place / name, (0, 0))  # what has no owner goes by age
        (place / name).rename(run / name)
    assert len(small.leftovers(run)) == len(LEAVERS)
    return run


def test_killed_while_it_clears_away_what_kills_left(directory: Path) -> None:
    pristine = leave(directory)
    ends = []
    stride = 1 if ALL else 11
    for begin in range(1, 800, 20 * stride):
        runs = [directory / f"n{nth}" for nth in range(begin, begin + 20 * stride, stride)]
        for run in runs:
            shutil.copytree(pristine, run, copy_function=os.link)
        # Killed, and the next one too, a little further on; then one that is left alone.
        ends += in_forks(
            *(
                (dying.save_after, run, name, f"*:{begin + number * stride + more}:kill")
                for number, run in enumerate(runs)
                for name, more in (("next", 0), ("again", 3))
            )
        )
        for run in runs:
            assert_cleared(run)
        if KILLED not in ends[-40:]:
            break
    assert set(ends) == {KILLED, 0}
    assert ends.count(KILLED) > (200 if ALL else 18)


def assert_cleared(run: Path) -> None:
    ss.save(small.state(3), checkpoint_id=run / "last")
    for name in small.leftovers(run):
        assert not owner_of(run / name), name
        os.utime(run / name, (0, 0))
    _native.reap(str(run))
    assert small.leftovers(run) == []
    seeds = {"previous": 1, "next": 2, "again": 2, "last": 3}
    for name in os.listdir(run):
        small.assert_holds(run / name, seeds[name])
    assert (run / "previous").exists()


# Pruning --------------------------------------------------------------------------------------------------------------


def test_killed_at_any_change_of_a_prune(directory: Path) -> None:
    """Full checkpoints and a chain of delta saves, whose bases go first."""
    chain.make_chain(directory / "run", 5)
    which = range(1, 60, 1 if ALL else 2)
    runs = [directory / f"n{nth}" for nth in which]
    for run in runs:
        shutil.copytree(directory / "run", run, copy_function=os.link)
    codes = in_forks(*((dying.prune_and_die, run, 2, nth) for nth, run in zip(which, runs, strict=True)))
    assert set(codes) == {KILLED, 0}
    assert codes == sorted(codes), "one that is never reached, and one that is after it"
    assert codes.count(KILLED) > 6
    for run in runs:
        dying.assert_pruned_by_the_next_one(run)


# Compaction -----------------------------------------------------------------------------------------------------------


def test_killed_before_any_line_of_a_compaction(directory: Path) -> None:
    chain.make_chain(directory / "run")
    shutil.copytree(directory / "run", directory / "whole", copy_function=os.link)
    (lines,) = ranks.values(ranks.run_ranks(1, dying.compact_lines, str(directory / "whole"), store="none"))
    assert len(lines) > 60
    wanted = lines if ALL else [*lines[:-4:6], *lines[-4:]]  # few lines follow the commit
    runs = [directory / f"n{number}" for number in range(len(wanted))]
    for run in runs:
        shutil.copytree(directory / "run", run, copy_function=os.link)
    codes = in_forks(*((dying.compact_to_the_line, run, line) for run, line in zip(runs, wanted, strict=True)))
    assert set(codes) == {KILLED}
    compacted = 0
    for run in runs:
        compacted += not (run / "step-3" / "base").exists()
        for number in (1, 2, 3):
            chain.assert_step(run / f"step-{number}", number)
        ss.compact(run / "step-3")
        for name in small.leftovers(run):
            os.utime(run / name, (0, 0))
        _native.reap(str(run))
        assert sorted(os.listdir(run)) == ["step-1", "step-2", "step-3"]
        chain.assert_step(run / "step-3", 3)
    assert 0 < compacted < len(wanted)
