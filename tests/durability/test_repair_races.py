"""A repair beside others: saves that take a checkpoint's name, another repair, a disk that fails for a while, and the
people whose files root repairs. A repair is held when its file is made, until the other has come to its end.
"""

from __future__ import annotations

import errno
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import snapstone as ss
from durability import small
from durability.chain import assert_step, contents, flip_bit, make_chain, shared_files
from snapstone.repair import _Repair

pytestmark = pytest.mark.usefixtures("small_chunks")

USER = 12345


@contextmanager
def held(act: Callable[[], ss.RepairReport]) -> Iterator[list[ss.RepairReport | Exception]]:
    """`act` in a thread, which waits before it puts its first file into place until the body is over; what came of it,
    once that is known.
    """
    ended: list[ss.RepairReport | Exception] = []
    made, goes_on = threading.Event(), threading.Event()
    give = _Repair._give

    def acts() -> None:
        try:
            ended.append(act())
        except Exception as error:
            ended.append(error)
        made.set()

    def gives(self: _Repair, new: str, damaged: str) -> None:
        give(self, new, damaged)
        if threading.current_thread() is thread:
            made.set()
            goes_on.wait(60)

    thread = threading.Thread(target=acts)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(_Repair, "_give", gives)
        thread.start()
        try:
            assert made.wait(60)
            assert not ended
            yield ended
        finally:
            goes_on.set()
            thread.join(60)


@pytest.mark.parametrize("damaged", ["rank-00000.data", "rank-00000.index", "MANIFEST.json"])
def test_a_save_that_takes_the_name_meanwhile_is_left_as_it_is(directory: Path, damaged: str) -> None:
    run, replica = directory / "run", directory / "replica"
    ss.save(small.state(1), checkpoint_id=run / "last")
    shutil.copytree(run, replica)
    flip_bit(run / "last" / damaged, 100)
    with held(lambda: ss.repair(run / "last", sources=[replica])) as ended:
        ss.save(small.state(2), checkpoint_id=run / "last", overwrite=True)
    (error,) = ended
    assert isinstance(error, OSError)
    assert error.errno == errno.ESTALE
    small.assert_holds(run / "last", 2)
    assert small.leftovers(run) == []


@pytest.mark.parametrize("damaged", ["rank-00000.data", "rank-00000.index", "MANIFEST.json"])
def test_a_checkpoint_that_was_moved_meanwhile_is_repaired_and_said_to_be_elsewhere(
    directory: Path, damaged: str
) -> None:
    run, replica = directory / "run", directory / "replica"
    ss.save(small.state(1), checkpoint_id=run / "last")
    shutil.copytree(run, replica)
    flip_bit(run / "last" / damaged, 100)
    with held(lambda: ss.repair(run / "last", sources=[replica])) as ended:
        (run / "last").rename(run / "aside")
        ss.save(small.state(2), checkpoint_id=run / "last")
    (error,) = ended
    assert isinstance(error, OSError)
    assert (error.errno, error.filename) == (errno.ESTALE, str(run / "last"))
    small.assert_holds(run / "aside", 1)
    small.assert_holds(run / "last", 2)
    assert small.leftovers(run) == []


def test_a_repaired_file_that_is_gone_meanwhile_is_said_to_be_missing(directory: Path) -> None:
    run, replica = directory / "run", directory / "replica"
    ss.save(small.state(1), checkpoint_id=run / "last")
    shutil.copytree(run, replica)
    flip_bit(run / "last" / "rank-00000.index", 100)
    before = contents(run)
    with held(lambda: ss.repair(run / "last", sources=[replica])) as ended:
        (staging,) = run.glob(".staging-*")
        shutil.rmtree(staging)
    (error,) = ended
    assert isinstance(error, FileNotFoundError)
    assert ".staging-" in str(error.filename)
    assert contents(run) == before


def test_a_repaired_file_that_went_wrong_on_its_way_replaces_nothing(directory: Path) -> None:
    path = make_chain(directory)[-1]
    flip_bit(shared_files(path)[0], 100)
    before = contents(directory)
    with held(lambda: ss.repair(path)) as ended:
        (staging,) = directory.glob(".staging-*")
        flip_bit(staging / "repaired-1", 100)
    (error,) = ended
    assert isinstance(error, ss.CheckpointError)
    assert "wrong bytes; nothing was replaced" in str(error)
    assert contents(directory) == before


def test_a_repaired_file_that_is_wrong_in_its_place_makes_way_for_the_damaged_one(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_chain(directory, 1)[0]
    flip_bit(path / "rank-00000.data", 100)
    before, place = contents(directory), _Repair._place

    def spoils_and_places(self: _Repair, new: str, *where: Any) -> str:
        if new == "repaired-1":
            (staging,) = directory.glob(".staging-*")
            flip_bit(staging / new, 100)
        return place(self, new, *where)

    with monkeypatch.context() as spoiling:
        spoiling.setattr(_Repair, "_place", spoils_and_places)
        with pytest.raises(ss.CheckpointError, match="could not be read back; the damaged one is back") as caught:
            ss.repair(path)
    assert caught.value.path == str(path / "rank-00000.data")
    assert contents(directory) == before
    assert ss.repair(path)
    assert_step(path, 1)


def test_a_neighbour_that_was_replaced_meanwhile_is_left_as_it_is(directory: Path) -> None:
    path = make_chain(directory)[-1]
    flip_bit(shared_files(path)[0], 100)  # of step-1, too
    with held(lambda: ss.repair(path)) as ended:
        ss.save(small.state(9), checkpoint_id=directory / "step-1", overwrite=True)
    (report,) = ended
    assert isinstance(report, ss.RepairReport)
    assert report
    small.assert_holds(directory / "step-1", 9)
    for step in (2, 3):
        assert_step(directory / f"step-{step}", step)


def test_a_repair_that_knows_less_does_not_undo_another(directory: Path) -> None:
    run, replica = directory / "run", directory / "replica"
    path = make_chain(run)[-1]
    shutil.copytree(run, replica)
    shared = max(shared_files(path), key=lambda one: one.stat().st_size)
    with shared.open("r+b") as target:
        target.write(b"\xff" * 64)  # which one of them can put right
    flip_bit(shared, 70_000)  # and this both
    with held(lambda: ss.repair(run / "step-2")) as ended:
        assert ss.repair(path, sources=[replica])
    (error,) = ended
    assert isinstance(error, OSError)
    assert error.errno == errno.ESTALE
    for step in (1, 2, 3):
        assert_step(run / f"step-{step}", step)


def test_what_cannot_be_read_now_is_left_for_later(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make_chain(directory)[-1]
    shared = max(shared_files(path), key=lambda one: one.stat().st_size)
    flip_bit(shared, 100)
    before = contents(directory)
    pread = os.pread

    def fails_behind(descriptor: int, nbytes: int, offset: int) -> bytes:
        if offset >= 2 * 65536:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return pread(descriptor, nbytes, offset)

    with monkeypatch.context() as failing:
        failing.setattr(os, "pread", fails_behind)
        report = ss.repair(path)
    assert not report
    assert contents(directory) == before
    assert ss.repair(path)
    for step in (1, 2, 3):
        assert_step(directory / f"step-{step}", step)


def test_of_a_file_that_was_cut_all_that_is_there_stays(directory: Path) -> None:
    path = directory / "c"
    ss.save(small.state(1), checkpoint_id=path)
    (file,) = path.glob("rank-*.data")
    size, at = file.stat().st_size, 65536 + 1000
    kept = file.read_bytes()[:at]
    os.truncate(file, at)
    flip_bit(file, 100)
    assert not ss.repair(path)
    assert file.read_bytes() == kept + bytes(size - at)


@pytest.mark.skipif(os.geteuid() != 0, reason="gives files to another user")
def test_files_that_root_repairs_stay_their_owners(directory: Path) -> None:
    run, replica = directory / "run", directory / "replica"
    path = make_chain(run)[-1]
    shutil.copytree(run, replica)
    for one in [run, *run.rglob("*")]:
        os.chown(one, USER, USER)
        one.chmod(0o750 if one.is_dir() else 0o640)
    flip_bit(shared_files(path)[0], 100)
    flip_bit(path / "rank-00000.index", 100)
    next(path.glob("rank-*.data")).unlink()
    assert ss.repair(path, sources=[replica])
    for one in path.rglob("*"):
        facts, mode = one.stat(), 0o750 if one.is_dir() else 0o640
        assert (facts.st_uid, facts.st_gid, facts.st_mode & 0o777) == (USER, USER, mode), one
