"""A short soak, and that the oracle finds what it is there to find. `make soak` runs as long as asked."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from soak.driver import Soak, soak
from soak.lives import Life, life_of

SECONDS = 15.0
LIVES_MIN = 6
SEED = 20

pytestmark = pytest.mark.timeout(900)


def test_whatever_is_killed_every_acknowledged_checkpoint_is_there(tmp_path: Path) -> None:
    result = soak(tmp_path, SEED, SECONDS, lives_min=LIVES_MIN)
    print(result)
    assert not result["found"]
    counts = result["counts"]
    assert counts["lives"] >= LIVES_MIN
    assert counts["kills"] >= LIVES_MIN // 2
    assert counts["acknowledged"] >= LIVES_MIN
    assert counts["checkpoints checked"] >= LIVES_MIN


@pytest.fixture
def one(tmp_path: Path) -> Iterator[Soak]:
    soaking = Soak(tmp_path, SEED)
    yield soaking
    soaking.close()


def whole_life(number: int, saves: int = 4) -> Life:
    return replace(life_of(SEED, number), world_size=1, ends="by itself", saves=saves)


def test_the_oracle_finds_what_is_lost_damaged_forged_or_left(one: Soak) -> None:
    one.live(whole_life(0))
    assert one.found == []
    run = one.run
    newest = max(run.glob("step-*"), key=lambda path: int(path.name.removeprefix("step-")))
    aside = run.with_name("aside")

    newest.rename(aside)
    assert [f"{newest.name} was acknowledged and is not there"] == one.judge()["found"]

    aside.rename(newest)
    (data,) = newest.glob("rank-*.data")
    whole = data.read_bytes()
    data.write_bytes(bytes([whole[0] ^ 1]) + whole[1:])
    (problem,) = one.judge()["found"]
    assert f"{newest.name} does not verify" in problem

    data.write_bytes(whole)
    older = min(run.glob("step-*"), key=lambda path: int(path.name.removeprefix("step-")))
    newest.rename(aside)
    shutil.copytree(older, newest)
    assert f"{newest.name} holds step {older.name.removeprefix('step-')}" in one.judge()["found"][0]

    shutil.rmtree(newest)
    aside.rename(newest)
    assert one.judge()["found"] == []


def test_the_oracle_finds_what_no_later_save_removes(one: Soak) -> None:
    one.live(whole_life(0))
    trash, note = one.run / ".trash-of-nobody", one.run / ".saving-something"
    trash.mkdir()
    note.write_bytes(bytes(70_000))
    assert one.judge()["found"] == []
    one.live(whole_life(1, saves=1))
    assert [problem.split(",")[0] for problem in one.found] == [f"{trash.name} outlived a save"]
    one.found.clear()
    trash.rmdir()
    os.utime(note, (0, 0))
    one.live(whole_life(2, saves=8))
    assert [problem.split(",")[0] for problem in one.found] == [f"{note.name} outlived a save"]


def test_the_oracle_finds_a_job_that_resumes_from_an_older_checkpoint(one: Soak) -> None:
    one.live(whole_life(0))
    newest = max(one.run.glob("step-*"), key=lambda path: int(path.name.removeprefix("step-")))
    shutil.rmtree(newest)  # unseen by the oracle, which has judged
    one.live(whole_life(1, saves=1))
    assert any("resumed from" in found for found in one.found), one.found
