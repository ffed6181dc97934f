"""What a run directory must be after a save in it was killed, by whatever and wherever."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import snapstone as ss
from durability import small
from durability.seam import Fault
from snapstone import _native


def assert_recovered(run: Path, kind: str) -> str:
    """Checks a run directory in which a save was killed; says whether the save had been committed."""
    previous, following = (small.PREVIOUS, small.DELTAS[kind]) if kind in small.DELTAS else (1, 2)
    if kind in ("overwrite", "replace"):
        assert ss.verify(run / "previous"), run
        held = small.load(run / "previous", following)
        old, new = small.bits(small.make(previous)), small.bits(small.make(following))
        assert held in (old, new), run
        committed = held == new
    else:
        small.assert_holds(run / "previous", previous)
        committed = (run / "next").exists()
        if committed:
            small.assert_holds(run / "next", following)
    assert sorted(set(os.listdir(run)) - {"origin", "previous", "next"}) == small.leftovers(run)
    before = small.leftovers(run)
    assert len(before) <= 1
    if kind in small.DELTAS:
        small.assert_holds(run / "origin", small.ORIGIN)
        ss.save(small.layers("45678"), checkpoint_id=run / "after", base="auto")
        for name in ("origin", "after"):
            shutil.rmtree(run / name)
        if committed:
            small.assert_holds(run / ("previous" if kind == "replace" else "next"), following)
    else:
        ss.save(small.state(3), checkpoint_id=run / "after")
        small.assert_holds(run / "after", 3)
    for name in small.leftovers(run):
        # Killed before it could say whose it is, or after it had said that all is done: a matter of ten minutes.
        assert not owner_of(run / name), name
        os.utime(run / name, (0, 0))
    _native.reap(str(run))
    assert small.leftovers(run) == []
    return "committed" if committed else "left " + "".join(name[:5] for name in before)


def assert_left_by_an_overwrite(run: Path, old: int, fault: Fault, is_unproven: bool) -> None:
    """Of one that `fault` hit, once the next save has been there: the replaced checkpoint `old`, whole, if it could not
    be renamed or may come back; an empty directory of a save that could remove nothing any more.
    """
    for name in small.leftovers(run):
        if is_unproven or fault.call == "rename":
            (run / name).rename(run / "replaced")
            small.assert_holds(run / "replaced", old)
            shutil.rmtree(run / "replaced")
        else:
            assert fault.lasting, (fault, name)
            assert os.listdir(run / name) == [], fault


def owner_of(staging: Path) -> str:
    owner = staging / "OWNER"
    return owner.read_text() if owner.exists() else ""
