"""One system call of a delta save fails, anywhere: every call of every kind, one at a time.

Invariants, for a save that links, one that carries chunks over, and one that takes the place of its base:
  1. The save raises an error with that errno, or it succeeds and the checkpoint is right: compared with the base as it
     was asked to be, or in full, with a warning that names the base.
  2. The base is intact, inode for inode and byte for byte, and so is the checkpoint that it shares a file with.
  3. No descriptor, slot, staging directory or link is left; the next delta save works.
  4. What was saved needs no base: it is whole when the base is gone.
  5. A failed fsync or close is always an error. A link that cannot be made never is.
"""

from __future__ import annotations

import errno
import os
import shutil
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

import snapstone as ss
from durability import small
from durability.based import forget
from durability.seam import IS_LONG, Fault, calls_of, faults, outcome_of, sweep
from durability.small import DELTAS, RUNGS
from snapstone import _native, manifest

OF_A_DELTA = {"open", "mkdir", "link", "fsync", "pwrite", "close", "unlink", "renameat2", "stat", "opendir", "pread"}
FULL_DISK = ("link", "copy_file_range", "fallocate", "mkdir", "pwrite")
NO_LINKS = ("EMLINK", "EPERM", "EXDEV", "EOPNOTSUPP", "ENOSPC", "EDQUOT", "EIO")


pytestmark = pytest.mark.usefixtures("small_chunks")


class Scene:
    """A run with a base, and the same save into it again and again."""

    def __init__(self, run: Path, kind: str, *, remembered: bool) -> None:
        self.run, self.kind, self.remembered = run, kind, remembered
        self.base = run / "previous"
        self.target = self.base if kind == "replace" else run / "next"
        self.kept = run.with_name("kept")  # other links to the base's files: what was there, wherever it is now
        small.save_previous(run)
        self.keep()

    def keep(self) -> None:
        shutil.rmtree(self.kept, ignore_errors=True)
        shutil.copytree(self.run, self.kept, copy_function=os.link)
        self.before = small.tree(self.kept)

    def save(self) -> None:
        if not self.remembered:
            forget()
        small.save_delta(self.run, self.kind)

    def saved(self) -> str:
        """Saves and says how: "shared", or "full" with a warning; what it did not do is an error here."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            self.save()
        document = manifest.read(str(self.target))
        assert (document.base is not None) == bool(document.shared)
        told = [str(one.message) for one in caught if issubclass(one.category, RuntimeWarning)]
        assert len(told) == len(caught) <= 1, told
        assert all("saves in full" in text and str(self.base) in text for text in told), told
        assert bool(told) != bool(document.shared), "in full with a warning, or compared without one"
        return "shared" if document.shared else "full"

    def check(self, error: str | None) -> None:
        """Everything but how the save ended; puts the base back in its place."""
        assert small.tree(self.kept) == self.before
        if self.kind == "replace":
            held = small.load(self.target, small.PREVIOUS)
            choices = [small.PREVIOUS, DELTAS[self.kind]] if error else [DELTAS[self.kind]]
            assert held in [small.bits(small.layers(seeds)) for seeds in choices]
            assert ss.verify(self.target)
        else:
            assert {name for name in os.listdir(self.run) if not name.startswith(".")} <= {"origin", "previous", "next"}
            small.assert_holds(self.base, small.PREVIOUS)
        small.assert_holds(self.run / "origin", small.ORIGIN)
        if error is not None:
            shutil.rmtree(self.run / "next", ignore_errors=True)
            if self.kind == "replace":
                self.restore()
            assert self.saved() == "shared"
        for name in ("origin", "previous") if self.kind != "replace" else ("origin",):
            shutil.rmtree(self.run / name)
        small.assert_holds(self.target, DELTAS[self.kind])
        for name in small.leftovers(self.run):
            assert self.kind == "replace", "only a replaced checkpoint that could not be removed"
            os.utime(self.run / name, (0, 0))
        _native.reap(str(self.run))
        assert small.leftovers(self.run) == []
        assert small.open_files(self.run) == []
        self.restore()

    def check_quickly(self, error: str | None, *, lasting: bool) -> None:
        """As `check`, for a save beside its base: the base's files are as they were, the next save works."""
        assert small.tree(self.kept) == self.before
        if error is not None:
            shutil.rmtree(self.target, ignore_errors=True)
            assert self.saved() == "shared"
        assert small.load(self.target, DELTAS[self.kind]) == small.bits(small.layers(DELTAS[self.kind]))
        assert small.load(self.base, small.PREVIOUS) == small.bits(small.layers(small.PREVIOUS))
        if lasting:  # what could not be removed then, and does not say whose it is, goes when it is old
            small.reap_all(self.run)
        assert small.leftovers(self.run) == []
        shutil.rmtree(self.target)

    def restore(self) -> None:
        shutil.rmtree(self.run)
        shutil.copytree(self.kept, self.run, copy_function=os.link)


def swept(scene: Scene, call: str, name: str) -> Iterator[tuple[Fault, str | None, str]]:
    """(fault, the error's text or None, how it was saved then), for each call that the save makes."""
    for fault in faults(call, f"errno={name}"):
        how = []
        error = outcome_of(lambda how=how: how.append(scene.saved()), getattr(errno, name))
        if fault.stop():
            yield fault, error, how[0] if how else "failed"
        scene.check(error)


def cases() -> Iterator[tuple[str, str, bool]]:
    yield from ((rung, "link", rung in ("uring", "buffered")) for rung in RUNGS)
    yield from [("uring", "carry", False), ("threads-direct", "carry", True), ("buffered", "carry", False)]
    yield from [("uring", "replace", True), ("buffered", "replace", False)]


@pytest.mark.parametrize(("rung", "kind", "remembered"), list(cases()))
def test_one_failing_call_of_a_delta_save(
    use_rung: Callable[[str], Path], rung: str, kind: str, remembered: bool
) -> None:
    scene = Scene(use_rung(rung) / "run", kind, remembered=remembered)
    counts = calls_of(scene.save)
    scene.restore()
    assert counts.keys() >= OF_A_DELTA, counts
    assert counts["link"] == 2
    assert ("copy_file_range" in counts) == (kind == "carry")
    outcomes = []
    for call in counts:
        for fault, error, how in swept(scene, call, "EIO"):
            assert error is not None or not fault.must_fail, fault
            assert call != "link" or how == "full", fault
            outcomes.append(how)
    assert outcomes.count("failed") >= 30
    assert outcomes.count("full") >= 6, "a base that cannot be used is done without"
    small.assert_slots_free()


@pytest.mark.parametrize("kind", ["carry", "link"] if IS_LONG else ["carry"])
def test_a_delta_save_with_every_error_that_a_call_can_give(use_rung: Callable[[str], Path], kind: str) -> None:
    scene = Scene(use_rung("buffered") / "run", kind, remembered=False)
    counts = calls_of(scene.save)
    scene.restore()
    resources, call, outcomes = small.Resources(scene.run), "", []
    for fault in sweep(counts):
        how: list[str] = []
        error = outcome_of(lambda how=how: how.append(scene.saved()), fault.number)
        reached = fault.stop()
        outcomes.append(how[0] if how else "failed")
        assert error is None or not fault.is_got_over, (fault, error)
        assert error is not None or not reached or not fault.must_fail, fault
        assert not fault.is_got_over or how == ["shared"], fault
        assert fault.call != "link" or fault.is_got_over or how == ["full"], fault
        if call != fault.call:
            call = fault.call
            scene.check(error)
        else:
            scene.check_quickly(error, lasting=fault.lasting)
        resources.assert_none_leaked(fault)
    assert outcomes.count("failed") >= 200
    assert outcomes.count("full") >= 40, "a base that cannot be used is done without"


@pytest.mark.parametrize("kind", list(DELTAS))
def test_a_disk_that_is_full_at_one_call_of_a_delta_save(use_rung: Callable[[str], Path], kind: str) -> None:
    scene = Scene(use_rung("threads-direct") / "run", kind, remembered=False)
    failed = 0
    for call in FULL_DISK:
        for fault, error, how in swept(scene, call, "ENOSPC"):
            if call in ("link", "mkdir"):
                assert (how == "full") == (call == "link" or fault.nth == 2), fault
            else:  # of the data file more is reserved than it may need; what it does need is asked for then
                assert error is not None or (call, fault.nth, how) == ("fallocate", 1, "shared"), fault
            failed += error is not None
    assert failed >= 4
    small.assert_slots_free()


@pytest.mark.parametrize("kind", list(DELTAS))
def test_where_files_cannot_be_linked_the_save_is_a_full_one(directory: Path, kind: str) -> None:
    scene = Scene(directory / "run", kind, remembered=True)
    for name in NO_LINKS:
        outcomes = [(error, how) for _, error, how in swept(scene, "link", name)]
        assert outcomes == [(None, "full")] * 2, name


@pytest.mark.parametrize("name", ["EXDEV", "EINVAL", "ENOSYS", "EOPNOTSUPP", "EPERM", "EINTR"])
def test_chunks_are_carried_where_the_kernel_does_not_copy(directory: Path, name: str) -> None:
    scene = Scene(directory / "run", "carry", remembered=True)
    _native.fault_arm(f"copy_file_range:1{'' if name == 'EINTR' else '+'}:errno={name}")
    assert scene.saved() == "shared"
    assert _native.fault_seen("copy_file_range") > 0
    _native.fault_disarm()
    assert (scene.target / "rank-00000.carried.data").stat().st_size == 65536
    scene.check(None)


@pytest.mark.parametrize("nbytes", [1, 511, 4096, 50_000])
def test_short_copies_are_continued(directory: Path, nbytes: int) -> None:
    scene = Scene(directory / "run", "carry", remembered=True)
    _native.fault_arm(f"copy_file_range:{'1+' if nbytes > 100 else '1'}:short={nbytes}")
    assert scene.saved() == "shared"
    assert _native.fault_seen("copy_file_range") > 1
    _native.fault_disarm()
    scene.check(None)


@pytest.mark.parametrize("kind", list(DELTAS))
def test_a_failed_fsync_of_a_delta_save_is_an_error_and_never_tried_again(directory: Path, kind: str) -> None:
    scene = Scene(directory / "run", kind, remembered=True)
    total = calls_of(scene.save)["fsync"]
    document = manifest.read(str(scene.target))
    scene.restore()
    # data, index, shared, base/ and directory twice, two manifest files, parent
    assert total >= 7 + len(document.shared)
    synced = set()
    for nth in range(1, total + 1):
        _native.fault_arm(f"fsync:{nth}:errno=EIO")
        with pytest.raises(OSError, match="fsync") as caught:
            scene.saved()
        more = _native.fault_seen("fsync") - nth
        _native.fault_disarm()
        assert (caught.value.errno, str(caught.value.filename).startswith(str(scene.run))) == (errno.EIO, True)
        assert more <= 1, "after the failure nothing is synced but the parent, once the staging directory is removed"
        synced.add(os.path.basename(str(caught.value.filename)))
        scene.check(str(caught.value))
    # A base that was copied may never have been synced, and its bytes are this checkpoint's now.
    assert {os.path.basename(entry.name) for entry in document.shared} <= synced


def test_the_next_delta_of_a_save_that_fell_back_is_a_delta_again(directory: Path) -> None:
    scene = Scene(directory / "run", "link", remembered=True)
    with armed("link:1+:errno=EMLINK"), pytest.warns(RuntimeWarning, match="saves in full"):
        small.save_delta(scene.run, "link")
    assert manifest.read(str(scene.target)).base is None
    later = ss.save(small.layers("11124"), checkpoint_id=scene.run / "later", base="auto")
    assert later.stats["unchanged_chunks"] == 4
    shutil.rmtree(scene.target)
    small.assert_holds(scene.run / "later", "11124")


@contextmanager
def armed(rules: str) -> Iterator[None]:
    _native.fault_arm(rules)
    try:
        yield
    finally:
        _native.fault_disarm()


def test_an_async_delta_save_fails_as_a_sync_one_does(directory: Path) -> None:
    scene = Scene(directory / "run", "carry", remembered=True)
    scene.save = lambda: ss.async_save(  # type: ignore[method-assign]
        small.layers(DELTAS["carry"]), checkpoint_id=scene.target, base=scene.base
    ).result(30)
    for call, least in (("link", 0), ("copy_file_range", 1), ("fsync", 9), ("unlink", 2)):
        outcomes = [(error, how) for _, error, how in swept(scene, call, "EIO")]
        assert sum(error is not None for error, _ in outcomes) >= least
    small.assert_slots_free()


@pytest.mark.parametrize("unwanted", ["cancelled", "took longer than 2 s"])
def test_carrying_over_ends_when_the_save_is_unwanted(directory: Path, unwanted: str) -> None:
    scene = Scene(directory / "run", "carry", remembered=True)
    state, timeout = small.layers(DELTAS["carry"]), 30.0 if unwanted == "cancelled" else 2.0
    with armed("copy_file_range:1:delay=2500"):
        handle = ss.async_save(state, checkpoint_id=scene.target, base=scene.base, timeout=timeout)
        while not _native.fault_seen("copy_file_range") and not handle.done():
            time.sleep(0.001)
        synced = _native.fault_seen("fsync")
        assert unwanted != "cancelled" or handle.cancel()
        with pytest.raises(ss.CheckpointError, match=unwanted):
            handle.result(30)
        assert _native.fault_seen("fsync") <= synced + 1, "only the parent, once the staging directory is removed"
    scene.check(unwanted)


def test_tensors_that_change_while_a_failed_save_is_retried_are_saved_as_they_are(directory: Path) -> None:
    """A failed save leaves no memory of chunks that never became a checkpoint."""
    scene = Scene(directory / "run", "link", remembered=True)
    state = small.layers(DELTAS["link"])
    for nth in range(1, 6):
        state["layer1"] += 1
        with armed("renameat2:1:errno=EIO"), pytest.raises(OSError, match="renameat2"):
            ss.save(state, checkpoint_id=scene.run / f"failed{nth}", base=scene.base)
    ss.save(state, checkpoint_id=scene.target, base=scene.base)
    expected = small.bits(state)
    assert small.load(scene.target, DELTAS["link"]) == expected
    assert torch.equal(state["layer1"], small.layers("11111")["layer1"] + 1 + 1 + 1 + 1 + 1)
    assert small.leftovers(scene.run) == []
