"""Others at the place of a checkpoint that is compacted, and whose it is.

Invariants:
  1. What another process acknowledged under the name meanwhile stays, and what it removed stays removed.
  2. Owner, group and permissions stay, or nothing changes.
"""

from __future__ import annotations

import os
import shutil
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

import snapstone as ss
from distributed import ranks
from durability import small
from durability.chain import assert_step, assert_unchanged, contents, make_chain, state_at
from durability.doomed import forked, how_it_ended
from snapstone import _native

USER, GROUP, STRANGER = 12345, 12346, 12347
AFTER_THE_LAST_LOOK_OF_PYTHON = "unlink:1:delay=1000"  # OWNER, once the manifest is written
AT_THE_EXCHANGE = "renameat2:1:delay=1000"
AT_BOTH_EXCHANGES = "renameat2:1+:delay=1000"

pytestmark = pytest.mark.usefixtures("small_chunks")
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root to give files away")


# Others at the place -------------------------------------------------------------------------------------------------


def compact_into(pipe: int, path: Path, rule: str) -> None:
    _native.fault_arm(rule)
    try:
        ss.compact(path)
    except ss.CheckpointError as error:
        os.write(pipe, f"{type(error).__name__}: {error}".encode())
    else:
        os.write(pipe, b"compacted")


def wait_for(condition: Any) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.002)


def act_while_it_is_held(rank: int, run: str, rule: str, what: str) -> str:
    """Compacts step-3 in a fork that the rule holds up, and does `what` meanwhile; how the fork ended."""
    ss.compact  # noqa: B018 - imported before the fork
    path = Path(run, "step-3")
    pid, pipe = forked(lambda to: compact_into(to, path, rule))
    wait_for(lambda: list(Path(run).glob(".staging-*/MANIFEST.xxh128")))
    (staging,) = Path(run).glob(".staging-*")
    inode = staging.stat().st_ino
    if rule != AFTER_THE_LAST_LOOK_OF_PYTHON:
        wait_for(lambda: not (staging / "OWNER").exists())
        time.sleep(0.3)  # from there to the exchange it takes microseconds
    act(path, what)
    if what == "move in twice":
        wait_for(lambda: path.stat().st_ino == inode)
        time.sleep(0.3)
        path.rename(path.with_name("ours"))
        path.with_name("third").rename(path)
    assert how_it_ended(pid) == 0
    return os.read(pipe, 4096).decode()


def act(path: Path, what: str) -> None:
    if what == "save":
        ss.save(small.state(9), checkpoint_id=path, overwrite=True)
    elif what == "remove":
        shutil.rmtree(path)
    else:  # without a lock
        path.rename(path.with_name("aside"))
        path.with_name("second").rename(path)


def ended(directory: Path, rule: str, what: str) -> str:
    (said,) = ranks.values(ranks.run_ranks(1, act_while_it_is_held, str(directory), rule, what, store="none"))
    return str(said)


def test_a_save_acknowledged_after_the_look_at_the_place_stays(directory: Path) -> None:
    path = make_chain(directory)[-1]
    assert "took its place" in ended(directory, AFTER_THE_LAST_LOOK_OF_PYTHON, "save")
    small.assert_holds(path, 9)
    assert small.leftovers(directory) == []


def test_a_save_that_meets_the_exchange_comes_after_it(directory: Path) -> None:
    path = make_chain(directory)[-1]
    assert ended(directory, AT_THE_EXCHANGE, "save") == "compacted"
    small.assert_holds(path, 9)
    assert small.leftovers(directory) == []


@pytest.mark.parametrize("rule", [AFTER_THE_LAST_LOOK_OF_PYTHON, AT_THE_EXCHANGE])
def test_what_is_removed_after_the_look_stays_removed(directory: Path, rule: str) -> None:
    path = make_chain(directory)[-1]
    assert ended(directory, rule, "remove").startswith("CheckpointNotFoundError")
    assert not path.exists()
    assert small.leftovers(directory) == []


def test_what_moves_in_without_a_lock_is_put_back(directory: Path) -> None:
    path = make_chain(directory)[-1]
    ss.save(small.state(2), checkpoint_id=directory / "second")
    assert "took its place" in ended(directory, AT_THE_EXCHANGE, "move in")
    small.assert_holds(path, 2)
    assert_step(directory / "aside", 3)
    assert small.leftovers(directory) == []


def test_the_newest_of_two_that_move_in_stays(directory: Path) -> None:
    path = make_chain(directory)[-1]
    for seed, name in ((2, "second"), (3, "third")):
        ss.save(small.state(seed), checkpoint_id=directory / name)
    assert "took its place" in ended(directory, AT_BOTH_EXCHANGES, "move in twice")
    small.assert_holds(path, 3)
    assert_step(directory / "aside", 3)
    assert small.leftovers(directory) == []


def save_and_compact(rank: int, run: str, saves: int) -> list[tuple[int, int | None]]:
    """Saves over and over to one name, which a fork compacts all the time; what was found there later than it was
    acknowledged, and not it.
    """
    last, base = Path(run, "last"), Path(run, "base")
    ss.compact  # noqa: B018 - imported before the fork
    pid, pipe = forked(lambda to: compact_for_ever(last, to))
    ss.save(state_at(1), checkpoint_id=base, step=0)
    wrong: list[tuple[int, int | None]] = []
    for step in range(1, saves):
        ss.save(state_at(2), checkpoint_id=last, step=step, base=base, overwrite=True)
        for _ in range(4):
            time.sleep(0.004)
            with suppress(ss.CheckpointError):  # half of it from before an exchange, half from after it
                found = ss.Checkpoint.open(last).step
                if found != step:
                    wrong.append((step, found))
    Path(run, "stop").touch()
    assert how_it_ended(pid) == 0
    assert int(os.read(pipe, 100)) > 3, "nothing was compacted"
    return wrong


def compact_for_ever(path: Path, pipe: int) -> None:
    compacted = 0
    while not path.with_name("stop").exists():
        _native.fault_arm("unlink:1:delay=5")
        try:
            compacted += bool(ss.compact(path).stats)
        except (ss.CheckpointError, OSError):
            time.sleep(0.001)
    os.write(pipe, str(compacted).encode())


def test_of_many_saves_beside_compactions_none_is_undone(directory: Path) -> None:
    assert ranks.values(ranks.run_ranks(1, save_and_compact, str(directory), 60, store="none", timeout=100)) == [[]]
    assert ss.verify(directory / "last")


# Whose it is ---------------------------------------------------------------------------------------------------------


def give_away(run: Path, path: Path, user: int = USER, group: int = GROUP) -> dict[str, tuple[int, int, int]]:
    """The checkpoint to `user`, with other permissions for each file."""
    run.chmod(0o777)
    modes = {"MANIFEST.json": 0o644, "MANIFEST.xxh128": 0o604, "rank-00000.data": 0o640, "rank-00000.index": 0o444}
    for file in path.rglob("*"):
        os.chown(file, user, group)
        file.chmod(0o755 if file.is_dir() else modes.get(file.name, 0o644))
    os.chown(path, user, group)
    path.chmod(0o2755)
    return owners(path)


def owners(path: Path) -> dict[str, tuple[int, int, int]]:
    facts = {file.name: file.stat() for file in (path, *path.iterdir()) if file.name != "base"}
    return {name: (one.st_uid, one.st_gid, one.st_mode & 0o7777) for name, one in facts.items()}


def become(user: int, group: int) -> None:
    os.setgroups([])
    os.setgid(group)
    os.setuid(user)


def use_as_its_owner(rank: int, path: str) -> None:
    become(USER, GROUP)
    assert_step(Path(path), 3)
    ss.save(small.state(4), checkpoint_id=path, overwrite=True)
    small.assert_holds(Path(path), 4)
    shutil.rmtree(path)


@needs_root
def test_what_root_compacts_stays_its_owners(directory: Path) -> None:
    path = make_chain(directory)[-1]
    before = give_away(directory, path)
    ss.compact(path)
    assert not (path / "base").exists()
    assert owners(path) == before
    ranks.values(ranks.run_ranks(1, use_as_its_owner, str(path), store="none"))
    assert not path.exists()


def test_permissions_that_were_set_stay(directory: Path) -> None:
    path = make_chain(directory)[-1]
    path.chmod(0o555)
    for name, mode in (("MANIFEST.json", 0o644), ("MANIFEST.xxh128", 0o444), ("rank-00000.data", 0o600)):
        (path / name).chmod(mode)
    before = owners(path)
    ss.compact(path)
    assert owners(path) == before
    path.chmod(0o755)


def compact_as(rank: int, path: str, user: int, group: int) -> str:
    become(user, group)
    try:
        ss.compact(path)
    except PermissionError as error:
        return str(error)
    return "compacted"


@needs_root
def test_who_cannot_give_it_to_its_owner_changes_nothing(directory: Path) -> None:
    path = make_chain(directory)[-1]
    owned, before = give_away(directory, path), contents(path)
    (said,) = ranks.values(ranks.run_ranks(1, compact_as, str(path), STRANGER, STRANGER, store="none"))
    assert f"user {USER} owns the checkpoint" in said
    assert owners(path) == owned
    assert_unchanged(path, before)


@needs_root
def test_a_group_that_cannot_be_given_gives_no_other_more(directory: Path) -> None:
    path = make_chain(directory)[-1]
    give_away(directory, path, USER, STRANGER)
    assert ranks.values(ranks.run_ranks(1, compact_as, str(path), USER, GROUP, store="none")) == ["compacted"]
    assert owners(path)["rank-00000.data"] == (USER, GROUP, 0o600)
    assert owners(path)["MANIFEST.json"] == (USER, GROUP, 0o644)


@needs_root
@pytest.mark.parametrize(
    "rule", ["fchown:1:errno=EIO", "fchown:3:errno=EIO", "fchown:1:errno=EPERM", "fchmod:2:errno=EIO"]
)
def test_a_failure_to_give_it_away_changes_nothing(directory: Path, rule: str) -> None:
    path = make_chain(directory)[-1]
    owned, before = give_away(directory, path), contents(path)
    _native.fault_arm(rule)
    with pytest.raises(OSError, match=rule.partition(":")[0]):
        ss.compact(path)
    _native.fault_disarm()
    assert owners(path) == owned
    assert_unchanged(path, before)


@needs_root
def test_permissions_that_cannot_be_set_are_left(directory: Path) -> None:
    path = make_chain(directory)[-1]
    give_away(directory, path)
    _native.fault_arm("fchmod:1+:errno=EPERM")
    ss.compact(path)
    _native.fault_disarm()
    assert {facts[2] for name, facts in owners(path).items() if name != path.name} == {0o600}
    assert_step(path, 3)
