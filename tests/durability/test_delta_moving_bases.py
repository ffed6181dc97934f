"""Bases that are removed, renamed or replaced while a save is compared with them.

Invariants: what was committed holds what was saved, whatever becomes of the base, at any moment. A rank that had not
linked its files yet saves its share in full, with a warning; one that had needs the base no more.
"""

from __future__ import annotations

import os
import shutil
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import snapstone as ss
from distributed import ranks
from durability import small
from durability.based import NEXT, data_of_base, document, forget, names, save
from snapstone import _native


class Interference(threading.Thread):
    """Does something to the base while a call of the save is held up."""

    def __init__(self, reached: Callable[[], bool], deed: Callable[[], Any]) -> None:
        super().__init__()
        self.reached, self.deed = reached, deed
        self.error: BaseException | None = None
        self.in_time = False

    def run(self) -> None:
        try:
            end = time.monotonic() + 10
            while not self.reached():
                if time.monotonic() > end:
                    return
                time.sleep(0.001)
            self.deed()
            self.in_time = True
        except BaseException as error:
            self.error = error

    def __enter__(self) -> Interference:
        self.start()
        return self

    def __exit__(self, *args: object) -> None:
        self.join()
        _native.fault_disarm()
        if self.error is not None:
            raise self.error
        assert self.in_time


def removed(base: Path) -> None:
    shutil.rmtree(base)


def replaced(base: Path) -> None:
    """Another checkpoint has the name, with other bytes in files of the same names and sizes."""
    base.rename(base.parent.with_name("moved"))
    base.parent.with_name("prepared").rename(base)


def prepare_other(run: Path) -> None:
    shutil.copytree(run, run.with_name("for other"))
    ss.save(
        small.layers("55577"), checkpoint_id=run.with_name("prepared"), base=run.with_name("for other") / "previous"
    )
    forget()


def emptied(base: Path) -> None:
    """As a removal that was interrupted leaves it."""
    data_of_base(base).unlink()
    shutil.rmtree(base / "base")


def renamed(base: Path) -> None:
    base.rename(base.with_name("renamed"))


DEEDS: dict[str, Callable[[Path], None]] = {
    "removed": removed,
    "replaced": replaced,
    "emptied": emptied,
    "renamed": renamed,
}


def seen(call: str, nth: int) -> Callable[[], bool]:
    return lambda: _native.fault_seen(call) >= nth


@pytest.mark.parametrize("deed", list(DEEDS))
@pytest.mark.parametrize("moment", ["chosen", "linking", "half linked", "linked", "written", "committing"])
def test_a_base_that_goes_during_the_save(run: Path, deed: str, moment: str) -> None:
    prepare_other(run)
    call, nth = {
        "chosen": ("flock", 1),  # of the staging directory, before the ranks look at the base
        "linking": ("link", 1),
        "half linked": ("link", 2),
        "linked": ("fsync", 2),
        "written": ("fsync", 3),
        "committing": ("renameat2", 1),
    }[moment]
    _native.fault_arm(f"{call}:{nth}:delay=300")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with Interference(seen(call, nth), lambda: DEEDS[deed](run / "previous")):
            save(run)
    shared = len(document(run / "next").shared)
    if moment == "chosen":
        assert shared == 0
    elif moment in ("linking", "half linked"):
        assert shared == (2 if deed in ("replaced", "renamed") else 0), "an open directory is the one that was meant"
    else:
        assert shared == 2
    assert [str(run / "previous") in str(one.message) for one in caught] == [True] * (shared == 0)
    assert_stands_alone(run)


def assert_stands_alone(run: Path) -> None:
    assert small.leftovers(run) == []
    for name in set(names(run)) - {"next"}:
        shutil.rmtree(run / name)
    small.assert_holds(run / "next", NEXT)


def test_a_target_that_is_the_base_and_goes_during_the_save(run: Path) -> None:
    _native.fault_arm("fsync:2:delay=300")
    with Interference(seen("fsync", 2), lambda: shutil.rmtree(run / "previous")):
        save(run, checkpoint_id=run / "previous", overwrite=True)
    small.assert_holds(run / "previous", NEXT)


def test_checkpoints_that_are_rotated_while_the_next_is_saved(run: Path) -> None:
    """One thread removes all but the newest two; the other saves with the newest as base."""
    stop = threading.Event()

    def rotate() -> None:
        while not stop.is_set():
            for path in sorted(run.glob("step-*"))[:-2]:
                shutil.rmtree(path)
            time.sleep(0.002)

    rotating = threading.Thread(target=rotate)
    rotating.start()
    try:
        for step in range(15):
            seeds = f"1{step % 4}{step % 3}2{step % 10}"
            save(run, seeds, checkpoint_id=run / f"step-{step:03}", base="auto")
            small.assert_holds(run / f"step-{step:03}", seeds)
    finally:
        stop.set()
        rotating.join()
    assert small.leftovers(run) == []


# Among ranks ----------------------------------------------------------------------------------------------------------


def save_on_two(run: Path, rule: str) -> list[tuple[int, int]]:
    env = {"SNAPSTONE_CHUNK_BYTES": os.environ["SNAPSTONE_CHUNK_BYTES"]}
    return ranks.values(ranks.run_ranks(2, save_of_two, str(run), rule, env=env))


def save_of_two(rank: int, run: str, rule: str) -> tuple[int, int]:
    """The second rank is held up or fails, by `rule`. How many warnings, and how many chunks not written again."""
    if rank == 1:
        _native.fault_arm(rule)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        saved = save(Path(run), NEXT)
    _native.fault_disarm()
    return len(caught), saved.stats.get("unchanged_chunks", 0)


@pytest.mark.parametrize("fails_at", [1, 2])
def test_of_two_ranks_that_link_the_same_file_one_fails(run: Path, fails_at: int) -> None:
    """One writer made the base; both ranks need its files. The one that fails leaves what the other has made."""
    first, second = save_on_two(run, f"link:{fails_at}:errno=EPERM")
    assert first[0] == 0 < first[1]
    assert second == (1, 0)
    assert_stands_alone(run)


@pytest.mark.parametrize("deed", list(DEEDS))
def test_a_base_that_goes_between_the_links_of_two_ranks(run: Path, deed: str) -> None:
    """Rank 1 is held up before it looks at the base, until rank 0 has linked what it needs."""
    prepare_other(run)
    deeds = Interference(lambda: len(list(run.glob(".staging-*/base/*"))) >= 1, lambda: DEEDS[deed](run / "previous"))
    with deeds:
        first, second = save_on_two(run, "flock:1:delay=1500")
    assert first[0] == 0 < first[1]
    assert second == (1, 0)
    assert_stands_alone(run)
