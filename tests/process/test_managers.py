"""Two jobs that save into one run directory, prune it and clean it up, without knowing of each other: a scheduler that
starts a run twice, or a run that was taken for dead.

Invariants:
  1. Nothing but FileExistsError for a name that the other was first to take, and what was acknowledged and not pruned
     is whole.
  2. Neither removes what the other is writing.
  3. At the end the newest checkpoints are there, and nothing else.
"""

from __future__ import annotations

import os
import random
import shutil
import time
from contextlib import suppress
from pathlib import Path

import pytest

import snapstone as ss
from distributed import ranks
from durability import small
from snapstone import manifest
from snapstone.integrations import numbered
from snapstone.integrations.step_folder import StepFolder

SEED = 77
STEPS = 14
KEEP = 3


@pytest.fixture(autouse=True)
def seeded(monkeypatch: pytest.MonkeyPatch) -> None:
    print(f"seed {SEED}")
    monkeypatch.setenv("SNAPSTONE_CHUNK_BYTES", "65536")


def manage(rank: int, directory: str, seed: int, base: str | None) -> tuple[int, int]:
    """Saves every step and keeps the newest; how many were its own, and how many the other's."""
    chosen, folder = random.Random(seed + rank), StepFolder(directory)
    mine = others = 0
    for step in range(1, STEPS + 1):
        path = Path(directory, f"step-{step}")
        time.sleep(chosen.uniform(0, 0.01))
        try:
            if chosen.random() < 0.5:
                ss.save(small.state(step), checkpoint_id=path, step=step, base=base, no_dist=True)
            else:
                ss.async_save(small.state(step), checkpoint_id=path, step=step, base=base, no_dist=True).result(60)
            mine += 1
        except FileExistsError:
            others += 1
        for trash in folder.prune(KEEP, step):
            shutil.rmtree(trash, ignore_errors=True)  # the other's next save may be at it too
        newest = folder.newest()
        assert newest >= step
    return mine, others


@pytest.mark.parametrize("base", [None, "auto"])
def test_two_managers_of_one_run(directory: Path, base: str | None) -> None:
    ends = ranks.values(ranks.run_ranks(2, manage, str(directory), SEED, base, store="none", timeout=100))
    assert sum(mine for mine, _ in ends) >= STEPS
    assert all(mine + others == STEPS for mine, others in ends)
    ss.save(small.state(0), checkpoint_id=directory / "after")
    shutil.rmtree(directory / "after")
    assert sorted(os.listdir(directory)) == sorted(f"step-{step}" for step in range(STEPS, STEPS - KEEP, -1))
    for step in range(STEPS, STEPS - KEEP, -1):
        small.assert_holds(directory / f"step-{step}", step)


# ---- retention of numbered checkpoints


def numbered_checkpoint(run: Path, number: int) -> Path:
    """As stock Accelerate leaves one."""
    path = run / f"checkpoint_{number}"
    path.mkdir()
    (path / "random_states_0.pkl").write_bytes(b"x")
    return path


def rotate_often(rank: int, directory: str) -> list[str]:
    removed: list[str] = []
    while not Path(directory, "go").exists():
        time.sleep(0.001)
    for keep in range(20, 0, -1):
        removed += numbered.rotate(directory, "checkpoint_", "random_states_0.pkl", keep, ())
    return removed


def test_two_rotations_of_one_run(directory: Path) -> None:
    for number in range(24):
        numbered_checkpoint(directory, number)
    with ranks.Ranks(2, rotate_often, str(directory), store="none") as both:
        time.sleep(0.3)
        (directory / "go").touch()
        removed = ranks.values(both.results(60))
    assert set(removed[0]) | set(removed[1]) == {str(directory / f"checkpoint_{number}") for number in range(23)}
    assert sorted(os.listdir(directory)) == ["checkpoint_23", "go"]


# ---- a reader beside both


def read_always(rank: int, directory: str) -> int:
    """Loads the newest again and again while the other rank saves, overwrites and prunes."""
    if rank == 0:
        while not Path(directory, "ready").exists():
            time.sleep(0.001)
        manage(rank, directory, SEED, None)
        Path(directory, "done").touch()
        return STEPS
    small.load(Path(directory, "warm"))  # imports what loads need, which takes longer than all saves
    StepFolder(directory).newest()
    Path(directory, "ready").touch()
    read = 0
    while not Path(directory, "done").exists():
        step = StepFolder(directory).newest()
        if step < 0:
            continue
        with suppress(FileNotFoundError, ss.CheckpointError):  # pruned meanwhile
            path = Path(directory, f"step-{step}")
            found = small.load(path, step)
            assert found == small.bits(small.state(step))
            assert manifest.read(str(path)).step == step
            read += 1
    return read


def test_a_reader_beside_a_manager_gets_whole_checkpoints_or_an_error(directory: Path) -> None:
    ss.save(small.state(1), checkpoint_id=directory / "warm")
    _, read = ranks.values(ranks.run_ranks(2, read_always, str(directory), store="none", timeout=100))
    assert read >= 1
