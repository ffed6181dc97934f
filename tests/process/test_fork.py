"""A process that forks while it saves, as every trainer with data loaders does.

Invariants:
  1. The save is what it would have been, at whatever moment the fork came and whatever the child does and how it ends.
  2. The child keeps nothing of the save: no descriptor of its files, no lock on its directory, no paused collector.
  3. The child can save and load on its own, at once; what it inherited of its parent's saves says so, and never hangs.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import random
import signal
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn, optim
from torch.utils.data import DataLoader, Dataset

import snapstone as ss
from distributed import ranks
from distributed.ranks import announce
from durability import small
from process.forks import assert_ends_well, assert_in_child, fork
from snapstone import _native, garbage

SEED = 4711
FORKS = 15
MIB = 1 << 20
SLOW = "uring_write:1+:delay=10;pwrite:1+:delay=10"


def run(function: Any, *arguments: Any, **options: Any) -> Any:
    return ranks.values(ranks.run_ranks(1, function, *arguments, store="none", timeout=100, **options))[0]


@pytest.fixture(autouse=True)
def seeded(monkeypatch: pytest.MonkeyPatch) -> None:
    print(f"seed {SEED}")
    monkeypatch.setenv("SNAPSTONE_CHUNK_BYTES", "65536")


def large(number: int) -> dict[str, Any]:
    return {"t": torch.full((MIB,), float(number)), "n": number}


def assert_is_large(path: Path, number: int) -> None:
    assert (ss.Checkpoint.open(path).get_tensor("t") == number).all()
    assert ss.verify(path)


# ---- at any moment


def fork_at_random(rank: int, directory: str, seed: int) -> list[str]:
    """Saves without a pause, on a thread; forks meanwhile. What the children did."""
    chosen, path, done = random.Random(seed), Path(directory), threading.Event()
    save_async(path / "first")  # a child waits for ever for a module that another thread was importing
    saved: list[int] = []

    def save() -> None:
        while not done.is_set():
            ss.async_save(large(len(saved)), checkpoint_id=path / f"parent-{len(saved)}").result(60)
            saved.append(len(saved))

    thread = threading.Thread(target=save)
    thread.start()
    acts = {"leave": lambda _: None, "save": save_and_load, "forget": forget, "fork": fork_again, "async": save_async}
    did = []
    for number in range(FORKS):
        time.sleep(chosen.uniform(0, 0.02))
        name = list(acts)[number % len(acts)]
        assert_in_child(lambda name=name, number=number: acts[name](path / f"child-{number}"))
        did.append(name)
    done.set()
    thread.join(60)
    for number in saved:
        assert_is_large(path / f"parent-{number}", number)
    assert small.leftovers(path) == []
    assert len(saved) >= 3
    return did


def save_and_load(path: Path) -> None:
    ss.save(small.state(3), checkpoint_id=path)
    small.assert_holds(path, 3)
    assert gc.isenabled()


def save_async(path: Path) -> None:
    handle = ss.async_save(small.state(4), checkpoint_id=path)
    ss.wait(30)
    assert handle.done()
    small.assert_holds(path, 4)


def forget(path: Path) -> None:
    ss.wait(0)
    gc.collect()
    assert gc.isenabled()


def fork_again(path: Path) -> None:
    assert_in_child(lambda: save_and_load(path))


def test_forks_at_any_moment_harm_neither_parent_nor_child(directory: Path) -> None:
    assert len(run(fork_at_random, str(directory), SEED)) == FORKS


# ---- data loaders


class Rows(Dataset[torch.Tensor]):
    """Row n is n; a worker also tells what it has open below the run."""

    def __init__(self, run: Path) -> None:
        self.run = run

    def __len__(self) -> int:
        return 64

    def __getitem__(self, number: int) -> torch.Tensor:
        open_here = small.open_files(self.run)
        assert open_here == [], open_here
        assert gc.isenabled()
        return torch.tensor(float(number))


def train_with_loaders(rank: int, directory: str) -> None:
    path = Path(directory)
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]  # a rank is one
    parameter = nn.Parameter(torch.zeros(MIB // 4))
    optimizer = optim.SGD([parameter], lr=1.0)
    parameter.grad = torch.ones_like(parameter)
    in_flight = 0
    for epoch in range(3):
        _native.fault_arm("uring_write:1+:delay=60;pwrite:1+:delay=60")
        handle = ss.async_save({"w": parameter}, checkpoint_id=path / str(epoch), fence=optimizer)
        while not list(path.glob(".staging-*/*.data")):
            time.sleep(0.001)
        loader = DataLoader(Rows(path), batch_size=8, num_workers=2, persistent_workers=True)
        rows = iter(loader)  # workers are forked here, in the middle of the save
        in_flight += not handle.done()
        seen = torch.cat(list(rows))
        assert seen.tolist() == list(range(64))
        optimizer.step()
        handle.result(60)
        _native.fault_disarm()
        assert (ss.Checkpoint.open(path / str(epoch)).get_tensor("w") == -float(epoch)).all()
        assert ss.verify(path / str(epoch))
    assert in_flight >= 1


def test_data_loader_workers_that_start_in_the_middle_of_a_save(directory: Path) -> None:
    run(train_with_loaders, str(directory))


# ---- what a child keeps


def outlive() -> None:
    assert ranks._marks is not None
    ranks._marks.close()  # or the launcher takes this process for the rank
    time.sleep(60)


def save_until_killed(rank: int, directory: str, worker: str) -> None:
    _native.fault_arm("unlink:1:delay=60000")  # just before the commit
    ss.async_save(small.state(6), checkpoint_id=Path(directory, "stopped"))
    while not list(Path(directory).glob(".staging-*/MANIFEST.xxh128")):
        time.sleep(0.005)
    Path(worker).write_text(str(fork(outlive)))
    announce("forked")
    time.sleep(60)


def test_a_worker_that_outlives_a_killed_trainer_holds_nothing_back(directory: Path, tmp_path: Path) -> None:
    worker = tmp_path / "pid"
    with ranks.Ranks(1, save_until_killed, str(directory), str(worker), store="none") as trainer:
        trainer.wait_for(0, "forked")
        trainer.signal(0, signal.SIGKILL)
        try:
            assert trainer.results(30)[0].exitcode == -signal.SIGKILL
            (staging,) = small.leftovers(directory)
            os.kill(int(worker.read_text()), 0)
            assert _native.reap(str(directory)) == [staging]
        finally:
            with suppress(ProcessLookupError):
                os.kill(int(worker.read_text()), signal.SIGKILL)


def unwind_in_child(rank: int, directory: str) -> None:
    """The child leaves the parent's save by an exception, and cleans up after it as any save would."""
    path, me = Path(directory), os.getpid()
    children: list[int] = []

    def progress(done: int, total: int) -> None:
        if not children:
            children.append(os.fork())
            if children[0] == 0:
                raise RuntimeError("the child leaves")

    _native.fault_arm(SLOW)
    try:
        ss.save(large(1), checkpoint_id=path / "c", progress=progress)
    except RuntimeError:
        os._exit(0 if os.getpid() != me else 2)
    assert os.getpid() == me
    assert_ends_well(children[0])
    assert_is_large(path / "c", 1)


def test_a_child_that_leaves_the_save_by_an_exception_does_not_discard_it(directory: Path) -> None:
    run(unwind_in_child, str(directory))


def test_a_child_collects_garbage_though_its_parent_was_planning() -> None:
    inside, done = threading.Event(), threading.Event()

    def plan() -> None:
        with garbage.paused():
            inside.set()
            done.wait(30)

    def check() -> None:
        assert gc.isenabled()
        with garbage.paused():
            assert not gc.isenabled()
        assert gc.isenabled()

    thread = threading.Thread(target=plan)
    thread.start()
    try:
        assert inside.wait(30)
        assert not gc.isenabled()
        assert_in_child(check)
    finally:
        done.set()
        thread.join()
    assert gc.isenabled()


# ---- what a child can do


def fork_during_a_first_save(rank: int, directory: str) -> None:
    """The first save probes the directory, under a lock that the child inherits locked."""
    path = Path(directory)
    assert all((ss.save, ss.load, ss.verify))  # imported: a module that another thread is importing stays locked
    _native.fault_arm("fsync:1:delay=700")
    thread = threading.Thread(target=lambda: ss.save(small.state(1), checkpoint_id=path / "parent"))
    thread.start()
    while not _native.fault_seen("fsync"):
        time.sleep(0.001)
    assert thread.is_alive()
    assert_in_child(lambda: save_and_load(path / "child"), 20)
    thread.join(30)
    small.assert_holds(path / "parent", 1)


def test_a_child_saves_though_its_parent_was_probing(directory: Path) -> None:
    run(fork_during_a_first_save, str(directory))


def use_inherited_handles(rank: int, directory: str) -> None:
    path = Path(directory)
    _native.fault_arm(SLOW)
    handle = ss.async_save(large(2), checkpoint_id=path / "c")
    upload = handle.upload_completion

    def ask() -> None:
        assert handle.done()
        assert not handle.cancel()
        for wait_for in (handle.result, upload.result):
            with pytest.raises(ss.CheckpointError, match="forked"):
                wait_for(20)
        ss.wait(0)
        save_and_load(path / "child")

    assert not handle.done()
    assert_in_child(ask)
    handle.result(60)
    assert_is_large(path / "c", 2)


def test_a_child_is_told_that_a_save_is_its_parents(directory: Path) -> None:
    run(use_inherited_handles, str(directory))


def use_an_inherited_group(rank: int, directory: str) -> None:
    path = Path(directory)
    ss.save(small.state(1), checkpoint_id=path / "all")

    def ask() -> None:
        for attempt in (
            lambda: ss.save(small.state(2), checkpoint_id=path / f"child-{rank}"),
            lambda: ss.load(small.blank(), checkpoint_id=path / "all"),
        ):
            with pytest.raises(ValueError, match="forked"):
                attempt()
        ss.save(small.state(2), checkpoint_id=path / f"child-{rank}", no_dist=True)
        target = small.blank()
        ss.load(target, checkpoint_id=path / f"child-{rank}", no_dist=True)
        assert small.bits(target) == small.bits(small.state(2))

    assert_in_child(ask)
    ss.save(small.state(3), checkpoint_id=path / "after")
    assert dist.get_world_size() == 2


def test_a_child_does_not_speak_for_its_parents_rank(directory: Path) -> None:
    ranks.values(ranks.run_ranks(2, use_an_inherited_group, str(directory)))
    small.assert_holds(directory / "after", 3)
