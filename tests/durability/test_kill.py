"""SIGKILL, at every step of a save and at random times. A killed process runs no handler and closes nothing itself.

Invariants:
  1. Every checkpoint that was acknowledged before the kill loads bit for bit and verifies.
  2. Whatever is visible under a checkpoint's name is whole: the old one, the new one, never anything between.
  3. The next save in the directory works, and removes what the dead left. What belongs to a living process, to
     somebody else, or to nobody known, stays.
  4. A delta save that was killed has not touched its base, and one that was committed needs none.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest

import snapstone as ss
from distributed import ranks
from durability import doomed, small
from durability.recovered import assert_recovered, owner_of
from snapstone import _native

SEED = 9909
UNOWNED_SECONDS = 600
NOBODY = 12345
KILLED = -signal.SIGKILL


@pytest.fixture(autouse=True)
def seeded(monkeypatch: pytest.MonkeyPatch) -> None:
    print(f"seed {SEED}")
    monkeypatch.setenv("SNAPSTONE_CHUNK_BYTES", "65536")


@pytest.mark.parametrize(
    ("rung", "kind", "start", "stride"),
    [
        ("", "sync", 1, 1),
        ("", "overwrite", 1, 1),
        ("uring", "async", 2, 3),
        ("threads-direct", "zstd", 3, 3),
        ("", "link", 1, 1),
        ("", "carry", 1, 1),
        ("", "replace", 1, 1),
        ("threads-direct", "carry", 2, 3),
    ],
)
def test_killed_at_every_call(
    directory: Path, monkeypatch: pytest.MonkeyPatch, rung: str, kind: str, start: int, stride: int
) -> None:
    if rung:
        if _native.try_rung(str(directory), rung):
            pytest.skip(f"{rung}: {_native.try_rung(str(directory), rung)}")
        monkeypatch.setenv("SNAPSTONE_IO", rung)
    if kind in small.DELTAS:
        small.save_previous(directory / "prepared")
    (ended,) = ranks.values(
        ranks.run_ranks(1, doomed.killed_at_every_call, str(directory), kind, start, stride, store="none", timeout=100)
    )
    assert [code for _, code in ended[:-1]] == [KILLED] * (len(ended) - 1)
    assert ended[-1][1] == 0
    assert len(ended) * stride > 40
    outcomes = [assert_recovered(directory / f"n{nth}", kind) for nth, _ in ended]
    assert {"committed", "left .stag", "left "} <= set(outcomes), set(outcomes)
    assert sorted(outcomes, key="committed".__eq__) == outcomes, "once committed, it stays committed"


RULES = ["mkdir:1:kill", "flock:1:kill", "fsync:1:kill", "fsync:2:kill", "fsync:3:kill", "fsync:4:kill", "fsync:5:kill"]
RULES += ["fsync:6:kill", "fsync:7:kill", "unlink:1:kill", "renameat2:1:kill", "pwrite:2:kill"]
RULES += ["uring_write:1:kill", "uring_write:2:kill", "close:2:kill"]


def test_killed_at_named_steps_on_disk(tmp_path: Path) -> None:
    (codes,) = ranks.values(ranks.run_ranks(1, doomed.killed_at, str(tmp_path), "sync", RULES, store="none"))
    for number, (rule, code) in enumerate(zip(RULES, codes, strict=True)):
        if not rule.startswith("uring"):  # the others are made on every way of doing I/O
            assert code == KILLED, rule
        outcome = assert_recovered(tmp_path / f"r{number}", "sync")
        if code == KILLED and rule != "fsync:7:kill":  # the parent's, after the rename
            assert outcome != "committed", rule


@pytest.mark.parametrize("rule", ["fsync:2:kill", "renameat2:1:kill", "pwrite:3:kill;fsync:1+:delay=1"])
def test_killed_by_the_environment(tmp_path: Path, rule: str) -> None:
    ss.save(small.state(1), checkpoint_id=tmp_path / "previous")
    results = ranks.run_ranks(
        1, doomed.save_from_the_environment, str(tmp_path), store="none", env={"SNAPSTONE_FAULT": rule}
    )
    assert (results[0].outcome, results[0].exitcode) == ("died", KILLED)
    assert assert_recovered(tmp_path, "sync") == "left .stag"


@pytest.mark.parametrize("rung", ["", "threads-direct"])
def test_killed_at_random_times_every_acknowledged_checkpoint_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rung: str
) -> None:
    count = 16
    if rung:
        monkeypatch.setenv("SNAPSTONE_IO", rung)
    arguments = (str(tmp_path), SEED + len(rung), count)
    (newest,) = ranks.values(ranks.run_ranks(1, doomed.killed_at_random, *arguments, store="none", timeout=100))
    monkeypatch.delenv("SNAPSTONE_IO", raising=False)
    assert len(newest) == count
    assert sum(step >= 0 for step in newest) >= count * 3 // 4, newest
    for number, step in enumerate(newest):
        run = tmp_path / f"k{number}"
        visible = sorted(path for path in run.iterdir() if not path.name.startswith("."))
        steps = {path: step_of(path) for path in visible}
        for path, found in steps.items():
            small.assert_holds(path, found)
        if step >= 0:
            assert step in steps.values() or (run / "last").exists(), (number, step)
            assert max(steps.values()) in (step, step + 1), "the kernel had the acknowledgement before the kill"
        ss.save(small.state(3), checkpoint_id=run / "after")
        assert not any(owner_of(run / name) for name in small.leftovers(run))


def step_of(path: Path) -> int:
    step = json.loads((path / "MANIFEST.json").read_bytes())["step"]
    assert isinstance(step, int)
    return step


# What the dead leave, and what is left alone --------------------------------------------------------------------------


def test_what_a_living_process_writes_survives_the_saves_of_others(directory: Path) -> None:
    with ranks.Ranks(1, doomed.save_slowly, str(directory), store="none") as slow:
        slow.wait_for(0, "about to commit")
        (staging,) = small.leftovers(directory)
        for step in range(3):
            ss.save(small.state(1), checkpoint_id=directory / f"step-{step}")
            assert small.leftovers(directory) == [staging]
        ranks.values(slow.results(30))
    small.assert_holds(directory / "slow", 5)
    assert small.leftovers(directory) == []


def test_a_stopped_process_is_alive_and_a_killed_one_is_dead(directory: Path) -> None:
    with ranks.Ranks(1, doomed.save_and_stop, str(directory), store="none") as stopped:
        stopped.wait_for(0, "about to commit")
        stopped.signal(0, signal.SIGSTOP)
        (staging,) = small.leftovers(directory)
        os.utime(directory / staging, (0, 0))  # age is no proof
        ss.save(small.state(1), checkpoint_id=directory / "one")
        assert small.leftovers(directory) == [staging]
        stopped.signal(0, signal.SIGKILL)
        assert stopped.results(30)[0].exitcode == KILLED
    ss.save(small.state(2), checkpoint_id=directory / "two")
    assert small.leftovers(directory) == []
    small.assert_holds(directory / "one", 1)


def staging(run: Path, digit: str, *, owner: str | None, age_seconds: float = 0.0) -> Path:
    """A directory as a dead save leaves it."""
    path = run / f".staging-{digit * 32}"
    path.mkdir(mode=0o700)
    (path / "rank-00000.data").write_bytes(bytes(4096))
    if owner is not None:
        (path / "OWNER").write_text(owner)
    os.utime(path, (time.time() - age_seconds,) * 2)
    return path


def test_what_is_provably_dead_is_removed_and_nothing_else(directory: Path) -> None:
    ss.save(small.state(1), checkpoint_id=directory / "previous")
    mine, other = _native.boot_id() + "\n", "0123456789abcdef0123456789abcdef\n"
    dead = [
        staging(directory, "0", owner=mine),
        staging(directory, "1", owner=mine * 3),
        staging(directory, "2", owner=other),  # an earlier boot: no other host writes to a local file system
        staging(directory, "3", owner=None, age_seconds=UNOWNED_SECONDS + 60),
        staging(directory, "4", owner="", age_seconds=UNOWNED_SECONDS + 60),
        staging(directory, "5", owner=mine, age_seconds=-3600),
    ]
    trash = directory / f".trash-{'6' * 32}"
    shutil.copytree(directory / "previous", trash)
    young = [staging(directory, "7", owner=None), staging(directory, "8", owner="", age_seconds=UNOWNED_SECONDS - 60)]
    if _native.file_system_facts(str(directory))["network"]:
        pytest.skip("a network file system: other hosts may write here")
    ss.save(small.state(2), checkpoint_id=directory / "next")
    assert [path.name for path in (*dead, trash) if path.exists()] == []
    assert [path.name for path in young if not path.exists()] == []
    small.assert_holds(directory / "previous", 1)


@pytest.mark.skipif(os.geteuid() != 0, reason="giving files away needs root")
def test_what_another_user_left_is_kept(directory: Path) -> None:
    kept = staging(directory, "a", owner=_native.boot_id() + "\n", age_seconds=UNOWNED_SECONDS * 10)
    os.chown(kept, NOBODY, NOBODY)
    trash = directory / f".trash-{'b' * 32}"
    trash.mkdir()
    os.chown(trash, NOBODY, NOBODY)
    ss.save(small.state(1), checkpoint_id=directory / "c")
    assert small.leftovers(directory) == [kept.name, trash.name]
    assert sorted(os.listdir(kept)) == ["OWNER", "rank-00000.data"]


def test_names_that_are_not_ours_are_never_touched(directory: Path) -> None:
    old = UNOWNED_SECONDS * 1000
    precious = directory / "precious"
    precious.mkdir()
    (precious / "weights.bin").write_bytes(b"precious")
    names = [".staging-", ".staging-x", f".staging-{'a' * 31}", f".staging-{'a' * 33}", f".staging-{'A' * 32}"]
    names += [f"staging-{'a' * 32}", f".trash-{'g' * 32}", ".trash", f"..trash-{'a' * 32}", f".trash-{'a' * 32}.bak"]
    for name in names:
        (directory / name).mkdir()
        (directory / name / "file").write_text("mine")
        os.utime(directory / name, (time.time() - old,) * 2)
    (directory / f".staging-{'c' * 32}").symlink_to("precious")
    (directory / f".trash-{'c' * 32}").symlink_to("precious")
    (directory / f".staging-{'d' * 32}").write_text("a file")
    os.mkfifo(directory / f".trash-{'d' * 32}")
    dead = staging(directory, "e", owner=_native.boot_id() + "\n")
    (dead / "link").symlink_to("../precious")
    (dead / "deeper").mkdir()
    (dead / "deeper" / "link").symlink_to(precious / "weights.bin")
    before = sorted(set(os.listdir(directory)) - {dead.name})
    ss.save(small.state(1), checkpoint_id=directory / "c")
    assert sorted(os.listdir(directory)) == sorted([*before, "c"])
    assert all((directory / name / "file").read_text() == "mine" for name in names)
    assert (precious / "weights.bin").read_bytes() == b"precious"


def test_a_leftover_that_cannot_be_removed_does_not_stop_a_save(directory: Path) -> None:
    dead = staging(directory, "f", owner=_native.boot_id() + "\n")
    _native.fault_arm("unlink:1:errno=EIO")
    ss.save(small.state(1), checkpoint_id=directory / "c")
    _native.fault_disarm()
    assert small.leftovers(directory) == [dead.name]
    ss.save(small.state(2), checkpoint_id=directory / "d")
    assert small.leftovers(directory) == []
