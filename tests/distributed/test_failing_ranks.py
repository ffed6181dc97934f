"""Promises 1, 3 and 6 across ranks: whatever one rank does in a save or a load, every rank knows it by the deadline.

Invariants, asked after every failure: the failing rank raises its own error, and every other rank RankFailedError
naming it, at once or `LATE_S` after the deadline at most; the checkpoint saved before is intact in every byte; nothing
of the failed save is visible, and what it left is gone after the next one; no descriptor and no slot stays in use; the
same job saves again, which shows that the ranks are still in step.
"""

from __future__ import annotations

import errno
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from rank_states import (
    AT_ONCE_S,
    LATE_S,
    LONG_S,
    Trap,
    assert_holds,
    attempt,
    blank,
    hidden,
    leaked,
    resources,
    said,
    same,
    save,
    state,
)
from ranks import run_ranks, values

import snapstone as ss
from snapstone import _native

pytestmark = [pytest.mark.timeout(60), pytest.mark.usefixtures("small_chunks")]


# ---- a rank raises


def _a_save_fails(rank: int, run: Path, failing: int, faults: str, sabotage: dict[str, Any]) -> dict[str, Any]:
    """Saves step 1, fails to save step 2, saves step 3."""
    save(rank, run, 1)
    dist.barrier()
    before = resources()
    if rank == failing and faults:
        _native.fault_arm(faults)
    ended = attempt(lambda: save(rank, run, 2, extra=sabotage if rank == failing else {}))
    _native.fault_disarm()
    ended["leaked"] = leaked(before)
    ended["visible"] = (run / "step-2").exists()
    save(rank, run, 3)
    return ended


def fail_a_save(run: Path, failing: int, faults: str = "", sabotage: dict[str, Any] | None = None) -> list[Any]:
    results = values(run_ranks(3, _a_save_fails, run, failing, faults, sabotage or {}))
    said(results, failing)
    for ended in results:
        assert ended["seconds"] < AT_ONCE_S, ended
        assert not ended["visible"]
        assert ended["leaked"] == [0, 0]
    for step in (1, 3):
        assert_holds(run / f"step-{step}", 3, step)
    assert hidden(run) == []
    assert sorted(os.listdir(run)) == ["step-1", "step-3"]
    return results


# Syncs of a rank: its data file, its index, the directory. Rank 0 has one before, of OWNER, and four after: of the
# manifest, its digest, the directory and its parent.
FAULTS = {
    "write": (1, "uring_write:1:errno=EIO;pwrite:1:errno=EIO", "EIO"),
    "write of rank 0": (0, "uring_write:1:errno=EIO;pwrite:2:errno=EIO", "EIO"),
    "sync of the data": (1, "fsync:1:errno=EIO", "EIO"),
    "sync of the index": (1, "fsync:2:errno=EIO", "EIO"),
    "sync of the directory": (2, "fsync:3:errno=EIO", "EIO"),
    "rank 0 makes no staging directory": (0, "mkdir:1:errno=EIO", "EIO"),
    "rank 0 syncs no manifest": (0, "fsync:4:errno=EIO", "EIO"),
    "rank 0 does not rename": (0, "renameat2:1:errno=EIO", "EIO"),
    "no space for the file": (2, "fallocate:1:errno=ENOSPC", "ENOSPC"),
    "no space for the file of rank 0": (0, "fallocate:1:errno=ENOSPC", "ENOSPC"),
    "no space at the third write": (1, "uring_write:3:errno=ENOSPC;pwrite:3:errno=ENOSPC", "ENOSPC"),
    "no space for the index": (2, "fsync:2:errno=ENOSPC", "ENOSPC"),
    "no descriptor to join with": (1, "open:1:errno=EMFILE", "EMFILE"),
    "error at close": (2, "close:1:errno=EIO", "EIO"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_rank_whose_disk_fails_raises_that_and_all_others_name_it(tmp_path: Path, name: str) -> None:
    failing, faults, code = FAULTS[name]
    ended = fail_a_save(tmp_path, failing, faults)[failing]
    assert ended["error"] == "OSError"
    assert ended["errno"] == getattr(errno, code)


@pytest.mark.parametrize("failing", [0, 2])
@pytest.mark.parametrize(
    ("sabotage", "error"),
    [
        ({"bad": torch.eye(3).to_sparse()}, "TypeError"),
        ({"bad": Trap("raises")}, "ZeroDivisionError"),
        ({"bad": object()}, "TypeError"),
    ],
    ids=["tensor", "state_dict", "value"],
)
def test_a_state_that_cannot_be_saved_on_one_rank(
    tmp_path: Path, failing: int, sabotage: dict[str, Any], error: str
) -> None:
    assert fail_a_save(tmp_path, failing, sabotage=sabotage)[failing]["error"] == error


def _a_slow_writer(rank: int, run: Path) -> dict[str, Any]:
    save(rank, run, 1)
    dist.barrier()
    if rank == 1:
        _native.fault_arm("fallocate:1:delay=500;fallocate:1:errno=ENOSPC")  # rank 2 is writing by then
    if rank == 2:
        _native.fault_arm("uring_write:1:delay=2000;pwrite:1:delay=2000")
    ended = attempt(lambda: save(rank, run, 2))
    _native.fault_disarm()
    save(rank, run, 3)
    return ended


def test_a_rank_that_writes_on_into_a_failed_save_hears_what_failed(tmp_path: Path) -> None:
    """Not that the directory is gone, which rank 0 has removed meanwhile."""
    results = values(run_ranks(3, _a_slow_writer, tmp_path))
    said(results, 1)
    assert results[0]["seconds"] < 1.8 < results[2]["seconds"]
    assert sorted(os.listdir(tmp_path)) == ["step-1", "step-3"]


def _bad_argument(rank: int, run: Path) -> list[Any]:
    arguments: list[dict[str, Any]] = [
        {"codec": "nope"},
        {"metadata": {"x": object()}},
        {"timeout": -1},
        {"full_every": 0},
    ]
    ended = [attempt(lambda: save(rank, run, 2, **(bad if rank == 1 else {}))) for bad in arguments]  # noqa: B023
    ended.append(
        attempt(lambda: ss.async_save(state(rank, 2), checkpoint_id=run / "step-2", fence="no" if rank else "now"))
    )
    ended += [attempt(lambda: ss.load({}, checkpoint_id=run / "none", strategy="no" if rank else "auto"))]
    ended += [attempt(lambda: ss.load((), checkpoint_id=run / "none") if rank else ss.load({}, checkpoint_id=run))]
    save(rank, run, 3)
    return ended


def test_a_bad_argument_on_one_rank_is_heard_by_all_and_leaves_them_in_step(tmp_path: Path) -> None:
    others, mine = values(run_ranks(2, _bad_argument, tmp_path))
    errors = [ended["error"] for ended in mine]
    assert errors == ["ValueError", "TypeError", "ValueError", "ValueError", "TypeError", "ValueError", "TypeError"]
    for ended in others[:5]:
        assert (ended["error"], ended["failed_ranks"]) == ("RankFailedError", (1,))
        assert ended["seconds"] < AT_ONCE_S
    assert [ended["error"] for ended in others[5:]] == ["CheckpointNotFoundError", "IncompleteCheckpointError"]
    assert_holds(tmp_path / "step-3", 2, 3)
    assert sorted(os.listdir(tmp_path)) == ["step-3"]


def _uncollected(rank: int, run: Path) -> list[Any]:
    if rank == 1:
        _native.fault_arm("fallocate:1:errno=ENOSPC")
    handle = ss.async_save(state(rank, 1), checkpoint_id=run / "step-1")
    while not handle.done():
        time.sleep(0.01)
    _native.fault_disarm()
    ended = [attempt(handle.result) if rank == 0 else None]
    ended.append(attempt(lambda: save(rank, run, 2)))
    save(rank, run, 3)
    return ended


def test_an_error_that_one_rank_did_not_collect_is_raised_there_and_leaves_the_ranks_in_step(tmp_path: Path) -> None:
    (collected, told), (_, raised) = values(run_ranks(2, _uncollected, tmp_path))
    for ended in (collected, told):
        assert (ended["error"], ended["failed_ranks"]) == ("RankFailedError", (1,))
    assert raised["errno"] == 28
    assert_holds(tmp_path / "step-3", 2, 3)
    assert sorted(os.listdir(tmp_path)) == ["step-3"]


def _last_sync_fails(rank: int, run: Path) -> Any:
    save(rank, run, 1)
    if rank == 0:
        _native.fault_arm("fsync:7:errno=EIO")
    ended = attempt(lambda: save(rank, run, 2))
    _native.fault_disarm()
    save(rank, run, 3)
    return ended


def test_a_commit_that_may_not_be_durable_is_an_error_on_every_rank(tmp_path: Path) -> None:
    results = values(run_ranks(2, _last_sync_fails, tmp_path))
    said(results, 0)
    assert results[0]["errno"] == 5
    for step in (1, 2, 3):  # visible, and complete
        assert_holds(tmp_path / f"step-{step}", 2, step)


# ---- a rank is slow


def _slow(rank: int, run: Path, failing: int, faults: str, timeout: float) -> dict[str, Any]:
    save(rank, run, 1)
    dist.barrier()
    before = resources()
    if rank == failing:
        _native.fault_arm(faults)
    ended = attempt(lambda: save(rank, run, 2, timeout=timeout))
    _native.fault_disarm()
    ended["leaked"] = leaked(before)
    save(rank, run, 3)
    return ended


@pytest.mark.parametrize("failing", [0, 1])
def test_a_write_that_outlasts_the_deadline_fails_the_save_everywhere(tmp_path: Path, failing: int) -> None:
    nth = 1 if failing else 2  # rank 0 has written OWNER before
    faults = f"uring_write:1:delay=3500;pwrite:{nth}:delay=3500"
    results = values(run_ranks(2, _slow, tmp_path, failing, faults, 1.0))
    said(results, failing)
    assert results[failing]["error"] == "CheckpointError"
    assert "longer than 1 s" in results[failing]["message"]
    for ended in results:
        assert 0.9 < ended["seconds"] < 1.0 + LATE_S
        assert ended["leaked"] == [0, 0]
    for step in (1, 3):
        assert_holds(tmp_path / f"step-{step}", 2, step)
    assert sorted(os.listdir(tmp_path)) == ["step-1", "step-3"]


def test_a_commit_that_outlasts_the_deadline_is_withdrawn_by_the_others(tmp_path: Path) -> None:
    results = values(run_ranks(3, _slow, tmp_path, 0, "renameat2:1:delay=3500", 1.0))
    said(results, 0)
    assert results[0]["error"] == "CheckpointError"
    assert "longer than 1 s" in results[0]["message"]
    for ended in results[1:]:
        assert 0.9 < ended["seconds"] < 1.0 + LATE_S
    for step in (1, 3):
        assert_holds(tmp_path / f"step-{step}", 3, step)
    assert sorted(os.listdir(tmp_path)) == ["step-1", "step-3"]


def test_a_commit_that_is_done_at_the_deadline_is_a_success_on_every_rank(tmp_path: Path) -> None:
    results = values(run_ranks(3, _slow, tmp_path, 0, "fsync:7:delay=3500", 1.0))
    assert [ended["error"] for ended in results] == [None, None, None]
    assert all(ended["seconds"] < 1.0 + LATE_S for ended in results[1:])
    for step in (1, 2, 3):
        assert_holds(tmp_path / f"step-{step}", 3, step)
    assert hidden(tmp_path) == []


# ---- Ctrl-C on one rank


def _interrupted(rank: int, run: Path, who: int, faults: str, head_start: float) -> dict[str, Any]:
    save(rank, run, 1)
    dist.barrier()
    if rank != who:
        time.sleep(head_start)
    else:
        if faults:
            _native.fault_arm(faults)
        threading.Timer(0.4, os.kill, [os.getpid(), signal.SIGINT]).start()
    ended = attempt(lambda: save(rank, run, 2))
    _native.fault_disarm()
    save(rank, run, 3)
    return ended


@pytest.mark.parametrize("who", [0, 1])
@pytest.mark.parametrize("where", ["writing", "waiting for the others"])
def test_ctrl_c_on_one_rank_ends_the_save_on_all(tmp_path: Path, who: int, where: str) -> None:
    slow_write = "uring_write:1:delay=1000;pwrite:2:delay=1000"
    faults, head_start = (slow_write, 0.0) if where == "writing" else ("", 0.8)
    results = values(run_ranks(2, _interrupted, tmp_path, who, faults, head_start))
    said(results, who)
    assert results[who]["error"] == "KeyboardInterrupt"
    assert all(ended["seconds"] < AT_ONCE_S for ended in results)
    for step in (1, 3):
        assert_holds(tmp_path / f"step-{step}", 2, step)
    assert sorted(os.listdir(tmp_path)) == ["step-1", "step-3"]


def test_ctrl_c_in_the_commit_of_rank_0_does_not_turn_a_success_into_a_failure(tmp_path: Path) -> None:
    first, second = values(run_ranks(2, _interrupted, tmp_path, 0, "renameat2:1:delay=1000", 0.0))
    assert first["error"] == "KeyboardInterrupt"
    assert second["error"] is None
    for step in (1, 2, 3):
        assert_holds(tmp_path / f"step-{step}", 2, step)


# ---- async_save


def _async_failure(rank: int, run: Path, fence_now: bool) -> dict[str, Any]:
    parameter = torch.nn.Parameter(torch.ones(50_000))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    save(rank, run, 1)
    dist.barrier()
    before = resources()
    if rank == 1:
        _native.fault_arm("uring_write:1:errno=EIO;pwrite:1:errno=EIO")
    handle = ss.async_save(
        {**state(rank, 2), "p": parameter},
        checkpoint_id=run / "step-2",
        fence="now" if fence_now else optimizer,
        timeout=LONG_S,
    )
    for _ in range(3):
        parameter.sum().backward()
        optimizer.step()
    ended = attempt(lambda: handle.result(20))
    _native.fault_disarm()
    ss.wait(5)
    ended["leaked"] = leaked(before)
    save(rank, run, 3)
    return ended


@pytest.mark.parametrize("fence_now", [True, False], ids=["now", "optimizer"])
def test_a_background_save_fails_on_every_rank_and_training_goes_on(tmp_path: Path, fence_now: bool) -> None:
    results = values(run_ranks(2, _async_failure, tmp_path, fence_now))
    said(results, 1)
    assert results[1]["errno"] == 5
    assert all(ended["seconds"] < AT_ONCE_S and ended["leaked"] == [0, 0] for ended in results)
    for step in (1, 3):
        assert_holds(tmp_path / f"step-{step}", 2, step)
    assert sorted(os.listdir(tmp_path)) == ["step-1", "step-3"]


def _cancelled(rank: int, run: Path) -> list[Any]:
    if rank == 1:
        _native.fault_arm("uring_write:1:delay=500;pwrite:1:delay=500")
    handle = ss.async_save(state(rank, 1), checkpoint_id=run / "step-1")
    stopped = handle.cancel() if rank == 1 else None
    ended = attempt(lambda: handle.result(20))
    _native.fault_disarm()
    save(rank, run, 3)
    return [stopped, ended]


def test_a_save_cancelled_by_one_rank_is_cancelled_on_all(tmp_path: Path) -> None:
    (_, told), (stopped, mine) = values(run_ranks(2, _cancelled, tmp_path))
    assert stopped
    said([told, mine], 1)
    assert "cancelled" in mine["message"]
    assert sorted(os.listdir(tmp_path)) == ["step-3"]


# ---- loading


def flip_a_byte(path: Path, offset: int = 0) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)
        file.seek(offset)
        file.write(bytes([byte[0] ^ 1]))


def _load_fails(rank: int, run: Path, failing: int, faults: str, timeout: float) -> dict[str, Any]:
    save(rank, run, 1)
    dist.barrier()
    before = resources()
    if rank == 0:
        # What rank 0 writes alone lies in its file, and the same for the others: a byte that only one rank reads.
        index = run / "step-1" / "rank-00001.data"
        if faults == "corrupt":
            with ss.Checkpoint.open(run / "step-1") as checkpoint:
                content = checkpoint.get_tensor("own.1").numpy().tobytes()
            flip_a_byte(index, index.read_bytes().index(content[:64]))
    dist.barrier()
    if rank == failing and faults != "corrupt":
        _native.fault_arm(faults)
    target = blank(rank)
    ended = attempt(lambda: ss.load(target, checkpoint_id=run / "step-1", strategy="direct", timeout=timeout))
    _native.fault_disarm()
    ended["leaked"] = leaked(before)
    ended["values"] = {name: item for name, item in target.items() if not isinstance(item, torch.Tensor)}
    save(rank, run, 3)
    target = blank(rank)
    ss.load(target, checkpoint_id=run / "step-3")
    ended["works"] = same(target, state(rank, 3))
    return ended


@pytest.mark.parametrize(
    ("faults", "error"),
    [
        ("corrupt", "CorruptCheckpointError"),
        ("open:2:errno=EACCES", "PermissionError"),
        ("uring_read:1:errno=EIO;pread:8:errno=EIO", "OSError"),
    ],
    ids=["a byte that only it reads", "an index that only it cannot open", "its disk"],
)
def test_a_load_that_fails_on_one_rank_fails_on_all_at_once(tmp_path: Path, faults: str, error: str) -> None:
    results = values(run_ranks(3, _load_fails, tmp_path, 1, faults, LONG_S))
    said(results, 1)
    assert results[1]["error"] == error, results[1]
    if faults == "corrupt":
        assert results[1]["tensor"] == "own.1"
        assert "rank-00001.data" in results[1]["message"]
    for ended in results:
        assert ended["seconds"] < AT_ONCE_S
        assert ended["leaked"] == [0, 0]
        assert set(ended["values"].values()) == {None}  # no value has been replaced on any rank
        assert ended["works"]


def test_a_read_that_outlasts_the_deadline_fails_the_load_everywhere(tmp_path: Path) -> None:
    results = values(run_ranks(2, _load_fails, tmp_path, 1, "uring_read:1:delay=3500;pread:8:delay=3500", 1.0))
    said(results, 1)
    assert results[1]["error"] == "CheckpointError"
    assert all(0.9 < ended["seconds"] < 1.0 + LATE_S and ended["works"] for ended in results)


def _cannot_take_it(rank: int, run: Path) -> Any:
    save(rank, run, 1)
    target = blank(rank)
    if rank == 1:
        target["empty"] = Trap("gives nothing")
    return attempt(lambda: ss.load(target, checkpoint_id=run / "step-1", timeout=LONG_S))


def test_a_load_state_dict_that_raises_on_one_rank_fails_the_load_on_all(tmp_path: Path) -> None:
    results = values(run_ranks(2, _cannot_take_it, tmp_path))
    said(results, 1)
    assert results[1]["error"] == "ZeroDivisionError"


def _load_here_and_there(rank: int, run: Path) -> Any:
    for place in ("here", "there"):  # as on local disks of two hosts
        ss.save(state(rank, 1), checkpoint_id=run / place / "last")
    target = blank(rank)
    return attempt(lambda: ss.load(target, checkpoint_id=run / ("there" if rank else "here") / "last"))


def test_ranks_that_read_different_checkpoints_all_refuse(tmp_path: Path) -> None:
    for ended in values(run_ranks(2, _load_here_and_there, tmp_path)):
        assert ended["error"] == "CorruptCheckpointError"
        assert "different checkpoints" in ended["message"]
