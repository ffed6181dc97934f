"""Compaction when calls fail (`seam.GIVES` says with what) and processes are killed.

Invariants:
  1. Whatever call fails and wherever the process is killed: the name holds the old checkpoint or the new one, whole.
  2. No other checkpoint changes, nor what it shares.
  3. What is left behind goes with the next save or compaction.
"""

from __future__ import annotations

import errno
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import snapstone as ss
from distributed import ranks
from durability import small
from durability.chain import assert_step, assert_unchanged, contents, make_chain
from durability.doomed import forked, how_it_ended
from durability.seam import calls_of, outcome_of, sweep
from snapstone import _native

STRIDE = 1 if os.environ.get("SNAPSTONE_TEST_KILLS") == "all" else 2  # of the calls at which one is killed
OF_A_COMPACTION = {"open", "mkdir", "copy_file_range", "fallocate", "fsync", "pwrite", "flock", "close", "renameat2"}
MUST_NOT_FAIL = {"copy_file_range", "fallocate", "pwrite", "fsync", "close", "mkdir", "renameat2", "uring_read"}

pytestmark = pytest.mark.usefixtures("small_chunks")


def restore(path: Path, pristine: Path) -> None:
    """The delta checkpoint again, if it was compacted; its files are immutable, so names for them do."""
    if not (path / "base").exists():
        shutil.rmtree(path)
        shutil.copytree(pristine, path, copy_function=os.link)


def assert_old_or_new(run: Path, old: dict[str, tuple[int, bytes]], others: dict[str, tuple[int, bytes]]) -> bool:
    """Whether step-3 was compacted; what a save or a compaction left goes with the next save."""
    path = run / "step-3"
    compacted = not (path / "base").exists()
    assert compacted or contents(path) == old
    assert_step(path, 3)
    assert contents(run / "step-1", run / "step-2") == others
    for name in small.leftovers(run):
        os.utime(run / name, (0, 0))
    _native.reap(str(run))
    assert small.leftovers(run) == []
    return compacted


@pytest.mark.parametrize(("rung", "only"), [("buffered", ()), ("uring", ("EIO",))])
def test_one_failing_call_leaves_the_old_or_the_new_one(
    use_rung: Callable[[str], Path], tmp_path: Path, rung: str, only: tuple[str, ...]
) -> None:
    run = use_rung(rung) / "run"
    pristine = run.with_name("pristine")
    path = make_chain(run)[-1]
    shutil.copytree(path, pristine, copy_function=os.link)
    old, others = contents(path), contents(run / "step-1", run / "step-2")
    assert assert_old_or_new(run, old, others) is False  # loads once, for which torch makes its threads
    counts = calls_of(lambda: ss.compact(path))
    assert counts.keys() >= OF_A_COMPACTION
    restore(path, pristine)
    failed, resources = 0, small.Resources(run)
    for fault in sweep(counts, only):
        error = outcome_of(lambda: ss.compact(path), fault.number)
        reached = fault.stop()
        failed += error is not None
        assert error is None or not fault.is_got_over, (fault, error)
        # The last fsync is that of the parent once the replaced checkpoint is removed from it.
        is_needed = fault.call in MUST_NOT_FAIL and (fault.call, fault.nth) != ("fsync", counts["fsync"])
        assert error is not None or not reached or not is_needed or fault.may_be_got_over, fault
        compacted = assert_old_or_new(run, old, others)
        assert compacted or error is not None, fault
        resources.assert_none_leaked(fault)
        restore(path, pristine)
    assert failed >= 30
    ss.compact(path)
    assert_step(path, 3)


@pytest.mark.parametrize("name", ["EXDEV", "EINVAL", "ENOSYS", "EOPNOTSUPP"])
def test_file_systems_that_cannot_copy_get_the_bytes_written(directory: Path, name: str) -> None:
    path = make_chain(directory)[-1]
    _native.fault_arm(f"copy_file_range:1+:errno={name}")
    ss.compact(path)
    _native.fault_disarm()
    assert_step(path, 3)


def test_file_systems_that_cannot_exchange_refuse_and_keep_the_old_one(directory: Path) -> None:
    path = make_chain(directory)[-1]
    before = contents(path)
    _native.fault_arm("renameat2:1+:errno=EINVAL")
    with pytest.raises(OSError, match="renameat2") as caught:
        ss.compact(path)
    _native.fault_disarm()
    assert caught.value.errno == errno.EINVAL
    assert_unchanged(path, before)


def compact_and_die(rank: int, run: str) -> list[int]:
    """A process for every `STRIDE`th N that is killed at its Nth call, until one survives; their exit codes."""
    ss.compact  # noqa: B018 - imported once, and not in each fork
    codes = []
    for nth in range(1, 500, STRIDE):
        path = Path(run, f"n{nth}", "step-3")
        copy_run(Path(run, "run"), path.parent)
        pid, pipe = forked(lambda _, path=path, nth=nth: (_native.fault_arm(f"*:{nth}:kill"), ss.compact(path)))
        os.close(pipe)
        codes.append(how_it_ended(pid))
        if codes[-1] != -signal.SIGKILL:
            break
    return codes


def copy_run(source: Path, target: Path) -> None:
    shutil.copytree(source, target, copy_function=os.link)


def renamed(before: dict[str, tuple[int, bytes]], run: Path) -> dict[str, tuple[int, bytes]]:
    """As `contents` of the copy at `run`, which has the same files."""
    return {str(run / Path(path).relative_to(run.with_name("run"))): facts for path, facts in before.items()}


def test_killed_at_every_call_leaves_the_old_or_the_new_one(directory: Path) -> None:
    make_chain(directory / "run")
    (codes,) = ranks.values(ranks.run_ranks(1, compact_and_die, str(directory), store="none", timeout=100))
    assert set(codes[:-1]) == {-signal.SIGKILL}
    assert codes[-1] == 0
    assert len(codes) > 20
    run = directory / "run"
    old, others = contents(run / "step-3"), contents(run / "step-1", run / "step-2")
    outcomes = []
    for nth in range(1, STRIDE * len(codes), STRIDE):
        run = directory / f"n{nth}"
        outcomes.append(assert_old_or_new(run, renamed(old, run), renamed(others, run)))
    assert outcomes == sorted(outcomes), "once committed, it stays committed"
    assert outcomes.count(False) > 15
    assert outcomes.count(True) >= 2


def test_what_a_killed_compaction_leaves_goes_with_the_next_one(directory: Path) -> None:
    path = make_chain(directory)[-1]
    dead = directory / f".staging-{'a' * 32}"
    dead.mkdir(mode=0o700)
    (dead / "OWNER").write_text(_native.boot_id() + "\n")
    os.utime(dead, (time.time() - 10,) * 2)
    if _native.file_system_facts(str(directory))["network"]:
        pytest.skip("a network file system: other hosts may write here")
    ss.compact(path)
    assert small.leftovers(directory) == []
