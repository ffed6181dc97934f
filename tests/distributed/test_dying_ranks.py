"""Promises 1, 3 and 6 when a rank dies or stops in the middle of a save or a load.

Invariants: every survivor knows by `LATE_S` after the deadline, and names the rank, or has the checkpoint; either all
of them have it or none; the checkpoint saved before is intact in every byte, or what replaced it is; no descriptor and
no slot stays in use; a new job of the survivors saves, and removes what the dead one left.
"""

from __future__ import annotations

import fcntl
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from rank_states import (
    AT_ONCE_S,
    LATE_S,
    Trap,
    assert_holds,
    attempt,
    blank,
    hidden,
    leaked,
    resources,
    said,
    save,
    state,
)
from ranks import Ranks, Result, Store, announce, run_ranks, values

import snapstone as ss
from snapstone import RankFailedError, _native
from snapstone.collective import Deadline, Group
from snapstone.outcome import Outcome

pytestmark = [pytest.mark.timeout(60), pytest.mark.usefixtures("small_chunks")]


def new_job_saves(run: Path, survivors: int, before: int = 1) -> None:
    """What the failure left does not disturb the next job; what it found is intact; its remains are gone."""
    values(run_ranks(survivors, _save_only, run, 9))
    assert_holds(run / "step-9", survivors, 9)
    assert hidden(run) == []
    assert sorted(os.listdir(run)) == [f"step-{before}", "step-9"]


def _save_only(rank: int, run: Path, step: int) -> None:
    save(rank, run, step)


def _dies(rank: int, run: Path, failing: int, faults: str, sabotage: dict[str, Any], timeout: float) -> Any:
    save(rank, run, 1)
    dist.barrier()
    before = resources()
    if rank == failing and faults:
        _native.fault_arm(faults)
    ended = attempt(lambda: save(rank, run, 2, timeout=timeout, extra=sabotage if rank == failing else {}))
    ended["leaked"] = leaked(before)
    return ended


def survivors(results: list[Result], failing: int, outcome: str = "died") -> list[Any]:
    assert results[failing].outcome == outcome, results[failing]
    ended = values(results[:failing] + results[failing + 1 :])
    for one in ended:
        assert one["leaked"] == [0, 0], one
    return [*ended[:failing], None, *ended[failing:]]


DEATHS: dict[str, tuple[str, dict[str, Any]]] = {
    "before the vote": ("", {"bad": Trap("SIGKILL")}),
    "while it writes": ("uring_write:2:kill;pwrite:2:kill", {}),
    "at its last sync": ("fsync:3:kill", {}),
}


@pytest.mark.parametrize("when", DEATHS)
def test_a_killed_rank_is_named_by_the_deadline(tmp_path: Path, when: str) -> None:
    faults, sabotage = DEATHS[when]
    results = survivors(run_ranks(3, _dies, tmp_path, 1, faults, sabotage, 1.5), 1)
    said(results, 1)
    for ended in (results[0], results[2]):
        assert 1.4 < ended["seconds"] < 1.5 + LATE_S
    assert not (tmp_path / "step-2").exists()
    assert hidden(tmp_path) == []  # rank 0 has removed it
    assert_holds(tmp_path / "step-1", 3, 1)
    new_job_saves(tmp_path, 2)


@pytest.mark.parametrize("store", ["launcher", "tcp"])
@pytest.mark.parametrize(
    "faults", ["fsync:1:kill", "fsync:4:kill", "renameat2:1:kill"], ids=["data", "manifest", "rename"]
)
def test_rank_0_killed_before_the_rename_is_named_and_nothing_is_visible(
    tmp_path: Path, faults: str, store: Store
) -> None:
    results = survivors(run_ranks(3, _dies, tmp_path, 0, faults, {}, 1.5, store=store), 0)
    for ended in results[1:]:
        assert ended["error"] == "RankFailedError"
        assert ended["failed_ranks"] == (0,)
        assert ended["seconds"] < 1.5 + LATE_S
    assert not (tmp_path / "step-2").exists()
    assert_holds(tmp_path / "step-1", 3, 1)
    new_job_saves(tmp_path, 2)


@pytest.mark.parametrize("store", ["launcher", "tcp"])
def test_rank_0_killed_between_rename_and_announcement_leaves_a_success(tmp_path: Path, store: Store) -> None:
    results = survivors(run_ranks(3, _dies, tmp_path, 0, "fsync:7:kill", {}, 1.5, store=store), 0)
    for ended in results[1:]:
        assert ended["error"] is None, ended
        assert ended["seconds"] < 1.5 + LATE_S
    assert_holds(tmp_path / "step-1", 3, 1)
    assert_holds(tmp_path / "step-2", 3, 2)
    assert hidden(tmp_path) == []


def _dies_of_its_last_sync(rank: int, run: Path, overwrite: bool, withdrawn: bool) -> Any:
    ss.save(state(rank, 1), checkpoint_id=run / "step-1")
    dist.barrier()
    if rank == 0:
        Outcome.announce = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[method-assign]
        _native.fault_arm("fsync:7:errno=EIO")
        if withdrawn:  # by a rank that was too late for it, and so took the checkpoint that was replaced
            commit = Outcome.commit

            def beside_trash(outcome: Outcome, *arguments: Any, **named: Any) -> None:
                os.makedirs(Path(outcome.target.parent, f".trash-{outcome.save_id}", "replaced"))
                commit(outcome, *arguments, **named)

            Outcome.commit = beside_trash  # type: ignore[method-assign]
    path = run / ("step-1" if overwrite else "step-2")
    return attempt(lambda: ss.save(state(rank, 2), checkpoint_id=path, overwrite=overwrite, timeout=1.5))


@pytest.mark.parametrize(
    ("overwrite", "withdrawn"),
    [(False, False), (True, False), (True, True)],
    ids=["new", "overwrite", "overwrite, withdrawn late"],
)
def test_a_commit_that_may_not_be_durable_is_no_success_where_rank_0_cannot_say_so(
    tmp_path: Path, overwrite: bool, withdrawn: bool
) -> None:
    results = run_ranks(3, _dies_of_its_last_sync, tmp_path, overwrite, withdrawn, store="launcher")
    assert results[0].outcome == "died"
    for ended in values(results[1:]):
        assert ended["error"] == "RankFailedError", ended
        assert ended["failed_ranks"] == (0,)
        assert ended["seconds"] < 1.5 + LATE_S
    assert_holds(tmp_path / ("step-1" if overwrite else "step-2"), 3, 2)  # visible, and complete
    values(run_ranks(2, _save_only, tmp_path, 9))
    assert [name for name in hidden(tmp_path) if not name.startswith(".staging-")] == []


def _rank_0_dies_replacing(rank: int, run: Path, faults: str) -> Any:
    path = run / "last"
    ss.save(state(rank, 1), checkpoint_id=path)
    dist.barrier()
    if rank == 0:
        _native.fault_arm(faults)
    return attempt(lambda: ss.save(state(rank, 2), checkpoint_id=path, overwrite=True, timeout=1.5))


@pytest.mark.parametrize(("faults", "seed"), [("renameat2:1:kill", 1), ("fsync:7:kill", 2), ("rename:1:kill", 2)])
def test_rank_0_killed_around_a_replacement_leaves_the_old_or_the_new(tmp_path: Path, faults: str, seed: int) -> None:
    results = run_ranks(2, _rank_0_dies_replacing, tmp_path, faults, store="launcher")
    assert results[0].outcome == "died"
    (ended,) = values(results[1:])
    assert ended["error"] == ("RankFailedError" if seed == 1 else None)
    assert_holds(tmp_path / "last", 2, seed)


def _stops(rank: int, run: Path, where: str) -> dict[str, Any]:
    save(rank, run, 1)
    dist.barrier()
    more: dict[str, Any] = {}
    if rank == 1:
        stop = Trap("SIGSTOP")
        more = (
            {"extra": {"bad": stop}} if where == "state_dict" else {"progress": lambda done, total: stop.state_dict()}
        )
    ended = attempt(lambda: save(rank, run, 2, timeout=1.5, **more))
    announce("ended")
    save(rank, run, 3)
    return ended


@pytest.mark.parametrize("where", ["state_dict", "progress"])
def test_a_stopped_rank_is_named_by_the_deadline_and_told_when_it_wakes(tmp_path: Path, where: str) -> None:
    with Ranks(3, _stops, tmp_path, where) as ranks:
        for rank in (0, 2):
            ranks.wait_for(rank, "ended")
        ranks.signal(1, signal.SIGCONT)
        woken = time.monotonic()
        ranks.wait_for(1, "ended")
        assert time.monotonic() - woken < AT_ONCE_S
        results = values(ranks.results())
    said(results, 1)
    assert all(1.4 < ended["seconds"] < 1.5 + LATE_S for ended in (results[0], results[2]))
    assert results[1]["error"] in ("RankFailedError", "CheckpointError")
    for step in (1, 3):
        assert_holds(tmp_path / f"step-{step}", 3, step)
    assert sorted(os.listdir(tmp_path)) == ["step-1", "step-3"]


# ---- loading


def _load_and_die(rank: int, run: Path) -> Any:
    save(rank, run, 1)
    dist.barrier()
    if rank == 1:
        _native.fault_arm("open:3:kill")
    target = blank(rank)
    return attempt(lambda: ss.load(target, checkpoint_id=run / "step-1", timeout=1.5))


def test_a_rank_killed_while_it_loads_is_named_by_the_deadline(tmp_path: Path) -> None:
    results = run_ranks(3, _load_and_die, tmp_path)
    assert results[1].outcome == "died"
    first, third = values([results[0], results[2]])
    said([first, None, third], 1)
    assert all(1.4 < ended["seconds"] < 1.5 + LATE_S for ended in (first, third))


def test_rank_0_is_named_too_when_the_store_falls_silent_that_no_rank_serves(tmp_path: Path) -> None:
    path = tmp_path / "store"
    channel = Group(1, range(3), dist.FileStore(str(path), 3)).channel("save")
    with path.open("rb") as file:
        silence = threading.Timer(0.3, fcntl.flock, (file, fcntl.LOCK_EX))
        silence.start()
        with pytest.raises(RankFailedError, match="no answer from rank 0 within 1 s") as caught:
            channel.broadcast("outcome", None, Deadline(1.0))
        silence.join()
    assert caught.value.failed_ranks == (0,)
    assert "FileStore gave no answer" in str(caught.value.__cause__)
    assert channel.lost
    channel.close()


def test_rank_0_is_not_named_when_the_store_breaks_that_no_rank_serves(tmp_path: Path) -> None:
    path = tmp_path / "store"
    channel = Group(1, range(3), dist.FileStore(str(path), 3)).channel("save")

    def break_store() -> None:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            time.sleep(0.5)  # the next question waits for the lock, and makes no new file meanwhile
            path.rename(tmp_path / "was")
            path.mkdir()

    breaks = threading.Timer(0.3, break_store)
    breaks.start()
    try:
        with pytest.raises(RankFailedError, match="FileStore broke the connection") as caught:
            channel.broadcast("outcome", None, Deadline(20))
    finally:
        breaks.join()
        path.rmdir()
        (tmp_path / "was").rename(path)  # which the store's destructor needs
    assert caught.value.failed_ranks == ()
    channel.close()
