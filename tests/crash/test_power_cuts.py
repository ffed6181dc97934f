"""Promises 1 and 2 on real file systems: cut off from their device in the middle of saves, and mounted again."""

from __future__ import annotations

import os
import random
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import snapstone as ss
from crash.loop_mount import FILE_SYSTEMS, LoopMount, mounted, why_not
from distributed.ranks import Ranks
from durability import doomed, small
from durability.chain import CHUNK_BYTES
from lacking import skip_without

SEED = int(os.environ.get("SNAPSTONE_CRASH_SEED", "1"))
ROUNDS = int(os.environ.get("SNAPSTONE_CRASH_ROUNDS", "3"))
FIRST_S = 60.0

pytestmark = pytest.mark.timeout(300 + 30 * ROUNDS)


@pytest.fixture(params=sorted(FILE_SYSTEMS))
def mount(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopMount]:
    monkeypatch.setenv("SNAPSTONE_CHUNK_BYTES", str(CHUNK_BYTES))
    scratch = Path(tempfile.mkdtemp(prefix="snapstone-cut-"))
    try:
        if reason := why_not(request.param, scratch):
            skip_without("mounts", reason)
        with mounted(request.param, scratch) as one:
            yield one
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _saves(rank: int, run: Path, kind: str, acknowledged: Path) -> None:
    doomed.save_forever(run, kind, os.open(acknowledged, os.O_WRONLY | os.O_CREAT | os.O_APPEND))


def _acknowledged(path: Path) -> int:
    """The newest step that was; -1 for none."""
    return len(path.read_bytes().split(b"\n")) - 2 if path.exists() else -1


def _cut_amid_saves(mount: LoopMount, run: Path, kind: str, log: Path, chosen: random.Random) -> int:
    """Right after an acknowledgement, or at any moment; the newest step that was acknowledged before."""
    with Ranks(1, _saves, run, kind, log, store="none"):
        wanted = chosen.randrange(4)
        end = time.monotonic() + FIRST_S
        while _acknowledged(log) < wanted:
            assert time.monotonic() < end, "nothing was saved"
        if chosen.random() < 0.5:
            time.sleep(chosen.uniform(0.0, 0.05))
        before = _acknowledged(log)
        mount.cut()
    mount.again()
    return before


@pytest.mark.parametrize("kind", ["sync", "overwrite"])
def test_a_power_cut_leaves_what_was_acknowledged_and_nothing_in_part(
    mount: LoopMount, tmp_path: Path, kind: str
) -> None:
    chosen = random.Random(SEED)
    for number in range(ROUNDS):
        run, log = mount.path / f"run{number}", tmp_path / f"log{number}"
        run.mkdir()
        os.sync()
        step = _cut_amid_saves(mount, run, kind, log, chosen)
        there = sorted(name for name in os.listdir(run) if not name.startswith("."))
        print(f"seed {SEED}, round {number}: {step} was acknowledged, {there} are there")
        if kind == "overwrite":
            # The cut may have come after the next one's commit, before anybody was told.
            held = [ss.Checkpoint.open(run / "last").step]
            assert held[0] in (step, step + 1, step + 2)
            small.assert_holds(run / "last", held[0])
        else:
            steps = [int(name.removeprefix("step-")) for name in there]
            assert set(steps) >= set(range(step + 1)), "what was acknowledged is gone"
            for held_step in steps:
                small.assert_holds(run / f"step-{held_step}", held_step)
        ss.save(small.state(99), checkpoint_id=run / "again")
        small.assert_holds(run / "again", 99)
        assert [name for name in small.leftovers(run) if name.startswith(".trash-")] == []


def test_without_its_syncs_a_power_cut_is_seen(mount: LoopMount, tmp_path: Path) -> None:
    """The cut is a cut: what was not synced is not there in full."""
    (mount.path / "run").mkdir()
    os.sync()
    (mount.path / "run" / "file").write_bytes(b"x" * 100_000)
    mount.cut()
    mount.again()
    file = mount.path / "run" / "file"
    assert not file.exists() or file.read_bytes() != b"x" * 100_000
