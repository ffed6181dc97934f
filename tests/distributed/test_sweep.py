"""Every call that fails on one of several ranks: with each errno that it can give (`seam.GIVES`), once and for ever.

Invariants, after each: the rank whose call failed raises that error, and every other rank RankFailedError naming it, or
all succeed; a checkpoint that is visible is whole; the one saved before is untouched; nothing of the save is left but
what the next one removes; no rank leaks a descriptor, a slot or a thread; the next save works on all of them.

The ranks are processes that live through the whole sweep.
"""

from __future__ import annotations

import gc
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from rank_states import LONG_S, assert_holds, attempt, blank, hidden, leaked, objects_of, resources, same, state
from ranks import run_ranks, values

import snapstone as ss
from durability import seam, small
from snapstone.manifest import MANIFEST_NAME

pytestmark = [pytest.mark.timeout(300), pytest.mark.usefixtures("small_chunks")]


class Sweep:
    """What one rank does for each fault; the ranks agree on the order beforehand."""

    def __init__(self, rank: int, run: Path, failing: list[int], operation: str, thin: bool) -> None:
        gc.disable()  # an error that somebody keeps, and a cycle through its traceback, keep nothing else
        self.rank, self.run, self.operation = rank, run, operation
        self.state = state(rank, 2)
        for name in ("previous", "base", "replaced"):
            ss.save(state(rank, 1), checkpoint_id=run / name, timeout=LONG_S)
        for _ in range(2):
            self.go_on()
        dist.barrier()
        mine = seam.calls_of(lambda: self.act(self.path("counted")))
        self.go_on()
        counts: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(counts, mine)
        self.plan = [(who, *fault) for who in failing for fault in seam.every_fault(counts[who], thin=thin)]
        self.before = small.tree(run / "previous") if rank == 0 else {}
        self.resources, self.threads = resources(), small.Resources(run)

    def path(self, name: str) -> Path:
        return self.run / ("replaced" if self.operation == "overwrite" else name)

    def act(self, path: Path) -> None:
        if self.operation == "load":
            target = blank(self.rank)
            ss.load(target, checkpoint_id=self.run / "previous", timeout=LONG_S)
            assert same(target, state(self.rank, 1))
        else:
            base = self.run / "base" if self.operation == "delta" else None
            ss.save(self.state, checkpoint_id=path, timeout=LONG_S, overwrite=path.exists(), base=base)

    def go_on(self) -> None:
        """The next operation; of overwrites the one that puts the old state back."""
        if self.operation == "overwrite":
            ss.save(state(self.rank, 1), checkpoint_id=self.path(""), timeout=LONG_S, overwrite=True)
        else:
            self.act(self.run / "warm")

    def ends(self, number: int, who: int, *fault: Any) -> dict[str, Any]:
        """How the operation with this fault ended on this rank, when the next one has worked."""
        path = self.path(f"c{number}")
        armed = seam.Fault(*fault) if who == self.rank else None
        ended = attempt(lambda: self.act(path))
        if armed is not None:
            ended["reached"] = armed.stop()
        dist.barrier()  # what stands there now nobody changes any more
        ended["leaked"] = leaked(self.resources)
        if self.rank == 0:
            ended["visible"] = self.is_new(path)
            assert small.tree(self.run / "previous") == self.before
        dist.barrier()
        self.go_on()
        if self.rank == 0:
            if self.operation == "overwrite" and fault[0] in ("fsync", "rename"):
                self.take_replaced()
            if fault[-1]:  # for ever: what could not be removed then, and does not say whose it is, goes when it is old
                small.reap_all(self.run)
            ended["hidden"] = hidden(self.run)
        ended["threads"] = len(self.threads.others()) - len(self.threads.before)
        return ended

    def is_new(self, path: Path) -> bool:
        """Whether the new state is visible at `path`, and not nothing, or the old one; which it is, it is whole."""
        if not path.exists():
            assert self.operation != "overwrite", "nothing stands there any more"
            return False
        seed = objects_of(path, 0)["seed"]
        assert_holds(path, dist.get_world_size(), seed)
        if self.operation == "overwrite":
            return bool(seed == 2)
        assert seed == 2
        shutil.rmtree(path)
        return True

    def take_replaced(self) -> None:
        """The checkpoint whose replacement may not last, or that could not be renamed: it is kept, and whole."""
        for name in hidden(self.run):
            if (self.run / name / MANIFEST_NAME).exists():
                aside = (self.run / name).rename(self.run / "aside")
                assert_holds(aside, dist.get_world_size(), 1)
                shutil.rmtree(aside)


def _sweep(rank: int, run: Path, failing: list[int], operation: str, thin: bool) -> list[tuple[Any, dict[str, Any]]]:
    sweep = Sweep(rank, run, failing, operation, thin)
    return [(fault, sweep.ends(number, *fault)) for number, fault in enumerate(sweep.plan)]


CASES: dict[str, tuple[int, list[int], str, bool]] = {
    "save-2": (2, [0, 1], "save", False),
    "save-4": (4, [3], "save", False),
    "load-3": (3, [2], "load", False),
    "load-2-lead": (2, [0], "load", True),
    "delta-2": (2, [1], "delta", False),
    "delta-2-lead": (2, [0], "delta", True),
    "overwrite-2": (2, [0, 1], "overwrite", True),
}


@pytest.mark.parametrize(("world_size", "failing", "operation", "thin"), list(CASES.values()), ids=list(CASES))
def test_one_failing_call_of_one_rank(
    tmp_path: Path, world_size: int, failing: list[int], operation: str, thin: bool
) -> None:
    run = small.in_memory(tmp_path)
    try:
        told = values(run_ranks(world_size, _sweep, run, failing, operation, thin, timeout=280))
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
        has_failed = check(seam.Fault(*fault, armed=False), who, ended)
        failed += has_failed
        may_be_visible = not has_failed or (who, *fault[:2]) in last_syncs
        assert may_be_visible or not ended[0]["visible"], (fault, ended)
        assert has_failed or ended[0]["visible"] or operation == "load", (fault, ended)
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
        assert not fault.must_fail or not own["reached"], fault
        return False
    assert not fault.is_got_over, (fault, own)
    assert own["errno"] == fault.number or own["error"].endswith("CheckpointError"), (fault, own)
    for one in others:
        assert (one["error"], one["failed_ranks"]) == ("RankFailedError", (who,)), (fault, one)
    return True
