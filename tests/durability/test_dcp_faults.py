"""One system call of a `dcp.save` or a `dcp.load` through the engine's storage fails, anywhere, in one process.

Invariants, for the Nth call of each kind, once and for ever (`seam.GIVES`; `make test` takes one errno for each):
  1. DCP raises its CheckpointException with an error of this engine's in it, or one with that errno; or the save or the
     load is right, bit for bit. A failed write, sync or close is always an error.
  2. What was saved before is there and loads, bit for bit; where it is overwritten, that or the new one.
  3. The next save works, through the same writer too. No descriptor, slot, thread, note or directory is left.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

import snapstone as ss
from durability import small
from durability.recovered import assert_left_by_an_overwrite
from durability.seam import calls_of, sweep
from snapstone.dcp import StorageReader, StorageWriter

pytestmark = [
    pytest.mark.usefixtures("small_chunks"),
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),
]


def outcome_of(operation: Callable[[], Any], number: int) -> str | None:
    """As `seam.outcome_of`, of the error that DCP gathered. Of metadata that cannot be read twice DCP makes an error of
    its own, with the text of both.
    """
    try:
        operation()
    except CheckpointException as error:
        ((cause, _),) = error.failures.values()
        of_metadata = isinstance(cause, AssertionError) and "global metadata read failed" in str(cause)
        of_the_call = isinstance(cause, OSError) and cause.errno == number
        assert isinstance(cause, ss.CheckpointError) or of_the_call or of_metadata, repr(cause)
        assert not of_metadata or os.strerror(number) in str(cause), cause
        return str(cause)
    return None


def load(path: Path) -> small.Bits:
    target = small.blank()
    dcp.load(target, storage_reader=StorageReader(path))
    return small.bits(target)


@pytest.mark.parametrize("rung", ["uring", "buffered"])
def test_one_failing_call_of_a_dcp_save(use_rung: Callable[[str], Path], rung: str) -> None:
    run = use_rung(rung) / "run"
    writer = StorageWriter(run / "previous")

    def save(number: int, path: Path) -> None:
        dcp.save(small.state(number), checkpoint_id=path, storage_writer=writer)

    for name in ("previous", "warm", "warm"):
        save(1, run / name)
    counts = calls_of(lambda: save(2, run / "counted"))
    assert counts.keys() >= {"open", "mkdir", "fsync", "pwrite", "flock", "close", "unlink", "renameat2", "opendir"}
    failed, resources = 0, small.Resources(run)
    for fault in sweep(counts, thin=True):
        error = outcome_of(lambda: save(2, run / "next"), fault.number)
        reached = fault.stop()
        failed += error is not None
        assert error is None or not fault.is_got_over, (fault, error)
        assert error is not None or not reached or not fault.must_fail, fault
        is_unproven = (fault.call, fault.nth) == ("fsync", counts["fsync"])  # of the parent: committed all the same
        assert (run / "next").exists() == (error is None or is_unproven), fault
        if (run / "next").exists():
            small.assert_holds(run / "next", 2)
            shutil.rmtree(run / "next")
        assert load(run / "previous") == small.bits(small.state(1)), fault
        save(3, run / "warm")
        assert load(run / "warm") == small.bits(small.state(3)), fault
        if fault.lasting:  # what could not be removed then, and does not say whose it is, goes when it is old
            small.reap_all(run)
        assert sorted(os.listdir(run)) == ["counted", "previous", "warm"], fault
        resources.assert_none_leaked(fault)
    small.assert_holds(run / "previous", 1)
    assert failed >= 30


def test_one_failing_call_of_an_overwriting_dcp_save(use_rung: Callable[[str], Path]) -> None:
    run = use_rung("buffered") / "run"
    writer = StorageWriter(run / "c")

    def save(number: int) -> None:
        dcp.save(small.state(number), storage_writer=writer)

    for _ in range(2):
        save(1)
    counts = calls_of(lambda: save(1))
    old, new = small.bits(small.state(1)), small.bits(small.state(2))
    failed, resources = 0, small.Resources(run)
    for fault in sweep(counts, thin=True):
        error = outcome_of(lambda: save(2), fault.number)
        reached = fault.stop()
        failed += error is not None
        assert error is None or not fault.is_got_over, (fault, error)
        assert error is not None or not reached or not fault.must_fail, fault
        is_unproven = (fault.call, fault.nth) == ("fsync", counts["fsync"])
        assert load(run / "c") == (new if error is None or is_unproven else old), fault
        assert ss.verify(run / "c"), fault
        save(1)
        assert load(run / "c") == old, fault
        assert_left_by_an_overwrite(run, 1, fault, is_unproven)
        small.reap_all(run)
        assert os.listdir(run) == ["c"], fault
        resources.assert_none_leaked(fault)
    assert failed >= 30


@pytest.mark.parametrize("rung", ["uring", "buffered"])
def test_one_failing_call_of_a_dcp_load(use_rung: Callable[[str], Path], rung: str) -> None:
    run = use_rung(rung) / "run"
    dcp.save(small.state(1), storage_writer=StorageWriter(run / "c"))
    saved = small.bits(small.state(1))
    assert load(run / "c") == saved
    counts = calls_of(lambda: load(run / "c"))
    assert counts.keys() >= {"open", "fstat", "fcntl", "pread"}
    failed, resources = 0, small.Resources(run)
    for fault in sweep(counts, thin=True):
        found: list[small.Bits] = []
        error = outcome_of(lambda found=found: found.append(load(run / "c")), fault.number)
        fault.stop()
        failed += error is not None
        assert error is None or not fault.is_got_over, (fault, error)
        assert error is not None or found == [saved], fault
        assert load(run / "c") == saved, fault
        resources.assert_none_leaked(fault)
    assert failed >= 10
    small.assert_holds(run / "c", 1)
