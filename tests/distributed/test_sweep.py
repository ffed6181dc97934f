"""Every call that fails on one of several ranks: with each errno that it can give (`seam.GIVES`), once and for ever.

Invariants, after each: the rank whose call failed raises that error, and every other rank RankFailedError naming it, or
all succeed; a checkpoint that is visible is whole; the one saved before is untouched; nothing of the save is left but
what the next one removes; no rank leaks a descriptor, a slot or a thread; the next save works on all of them.

The ranks are processes that live through the whole sweep.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from rank_states import LONG_S, assert_holds, attempt, blank, hidden, leaked, resources, same, state
from ranks import run_ranks, values

import snapstone as ss
from durability import seam, small

pytestmark = [pytest.mark.timeout(300), pytest.mark.usefixtures("small_chunks")]

NEEDED = {"fsync", "close", "pwrite", "uring_write", "renameat2"}


class Sweep:
    """What one rank does for each fault; the ranks agree on the order beforehand."""

    def __init__(self, rank: int, run: Path, failing: list[int], operation: str) -> None:
        self.rank, self.run, self.operation = rank, run, operation
        self.state = state(rank, 2)
        ss.save(state(rank, 1), checkpoint_id=run / "previous", timeout=LONG_S)
        ss.save(state(rank, 1), checkpoint_id=run / "base", timeout=LONG_S)
        for _ in range(2):
            self.act(run / "warm")
        dist.barrier()
        mine = seam.calls_of(lambda: self.act(run / "counted"))
        counts: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(counts, mine)
        self.plan = [(who, *fault) for who in failing for fault in seam.every_fault(counts[who])]
        self.before = small.tree(run / "previous") if rank == 0 else {}
        self.resources, self.threads = resources(), small.Resources(run)

    def act(self, path: Path) -> None:
        if self.operation == "load":
            target = blank(self.rank)
            ss.load(target, checkpoint_id=self.run / "previous", timeout=LONG_S)
            assert same(target, state(self.rank, 1))
        else:
            base = self.run / "base" if self.operation == "delta" else None
            ss.save(self.state, checkpoint_id=path, timeout=LONG_S, overwrite=path.exists(), base=base)

    def ends(self, number: int, who: int, *fault: Any) -> dict[str, Any]:
        """How the operation with this fault ended on this rank, when the next one has worked."""
        path = self.run / f"c{number}"
        armed = seam.Fault(*fault) if who == self.rank else None
        ended = attempt(lambda: self.act(path))
        if armed is not None:
            ended["reached"] = armed.stop()
        dist.barrier()  # what stands there now nobody changes any more
        ended["leaked"] = leaked(self.resources)
        if self.rank == 0:
            ended["visible"] = path.exists()
            assert small.tree(self.run / "previous") == self.before
            if path.exists():
                assert_holds(path, dist.get_world_size(), 2)
                shutil.rmtree(path)
        self.act(self.run / "warm")
        if self.rank == 0:
            if fault[-1]:  # for ever: what could not be removed then, and does not say whose it is, goes when it is old
                small.reap_all(self.run)
            ended["hidden"] = hidden(self.run)
        ended["threads"] = len(self.threads.others()) - len(self.threads.before)
        return ended


def _sweep(rank: int, run: Path, failing: list[int], operation: str) -> list[tuple[Any, dict[str, Any]]]:
    sweep = Sweep(rank, run, failing, operation)
    return [(fault, sweep.ends(number, *fault)) for number, fault in enumerate(sweep.plan)]


@pytest.mark.parametrize(
    ("world_size", "failing", "operation"),
    [(2, [0, 1], "save"), (4, [3], "save"), (3, [2], "load"), (2, [1], "delta")],
    ids=["save-2", "save-4", "load-3", "delta-2"],
)
def test_one_failing_call_of_one_rank(tmp_path: Path, world_size: int, failing: list[int], operation: str) -> None:
    run = small.in_memory(tmp_path)
    try:
        told = values(run_ranks(world_size, _sweep, run, failing, operation, timeout=280))
        assert_holds(run / "previous", world_size, 1)
    finally:
        shutil.rmtree(run)
    failed = 0
    plan = [fault for fault, _ in told[0]]
    # Of the parent directory, after the commit: what it leaves is visible, and not proven.
    last_syncs = {max(((who, call, nth) for who, call, nth, *_ in plan if call == "fsync" and who == 0), default=None)}
    for per_rank in zip(*told, strict=True):
        who, *fault = per_rank[0][0]
        ended = [ended for _, ended in per_rank]
        failed += check(seam.Fault(*fault, armed=False), who, ended)
        may_be_visible = ended[0]["error"] is None or (who, *fault[:2]) in last_syncs
        assert may_be_visible or not ended[0]["visible"], (fault, ended)
    assert failed >= 20


def check(fault: seam.Fault, who: int, ended: list[dict[str, Any]]) -> bool:
    """Whether the operation failed."""
    own, others = ended[who], [one for rank, one in enumerate(ended) if rank != who]
    for one in ended:
        assert one["leaked"] == [0, 0], (fault, one)
        assert one["threads"] <= 0, (fault, one)
        assert one["seconds"] < 15, (fault, one)
    assert ended[0]["hidden"] == [], (fault, ended[0])
    assert own["reached"] or fault.call in seam.UNCOUNTED, fault
    if own["error"] is None:
        assert all(one["error"] is None for one in others), (fault, others)
        assert fault.call not in NEEDED or fault.may_be_got_over, fault
        return False
    assert not fault.is_got_over, (fault, own)
    assert own["errno"] == fault.number or own["error"].endswith("CheckpointError"), (fault, own)
    for one in others:
        assert (one["error"], one["failed_ranks"]) == ("RankFailedError", (who,)), (fault, one)
    return True
