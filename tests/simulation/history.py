"""Plays the history of one seed: the operation with its faults, then what must work after it, on a real directory."""

from __future__ import annotations

import math
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch

import snapstone as ss
from simulation import judge
from simulation.engine import simulated
from simulation.network import Fabric, Link, Server, Store
from simulation.scenario import Scenario, arm, draw
from simulation.world import Hung, Killed, Process, World, current_process
from snapstone.collective import Group

__all__ = ["Ended", "Played", "play"]

AGAIN_S = 10.0  # for what nothing disturbs
HORIZON_S = 60.0  # virtual; every history is over long before
LEAVES_AFTER_S = 0.001  # a process that ends with its operation
COMMON_WORDS = 70_000  # two chunks
OWN_WORDS = 3_000


@dataclass
class Ended:
    """How one rank's operation ended: `error` is None for success."""

    error: BaseException | None
    begun_s: float
    ended_s: float
    value: Any = None


@dataclass
class Played:
    """`problems` is empty when every invariant held."""

    scenario: Scenario
    world: World
    ended: dict[int, Ended] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    stage: str = "first"

    def tell(self) -> str:
        lines = [str(self.scenario)]
        lines += [f"{when:10.6f}  rank {rank:2d}  {what}" for when, rank, what in self.world.history]
        return "\n".join([*lines, *(f"PROBLEM: {problem}" for problem in self.problems)])


def play(seed: int, scenario: Scenario | None = None) -> Played:
    scenario = scenario or draw(seed)
    for fault in scenario.faults:
        fault.fired = False
    world = World(seed)
    played = Played(scenario, world)
    directory = Path(tempfile.mkdtemp(prefix="ranks-", dir=_memory()))
    try:
        _play(played, directory)
    except Hung as hung:
        played.problems.append(f"{played.stage}: {hung}")
    finally:
        shutil.rmtree(directory)
    return played


def _play(played: Played, directory: Path) -> None:
    scenario, world = played.scenario, played.world
    template(scenario.writers), template(2)  # histories cannot be nested
    link = Link(world, scenario.latency_s, scenario.slow)
    processes = _start(world, link, scenario.world_size, scenario.store, scenario.node_count)
    before = None
    if scenario.operation in ("overwrite", "delta"):
        shutil.copytree(template(2), directory / "old")
        before = judge.seen(directory / "old")
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        with simulated(world, Fabric(world, link, processes)):
            for fault in scenario.faults:
                arm(fault, processes[fault.rank])
            played.ended = _run(world, processes, _operation(scenario, directory))
            judge.first(played, processes, directory, before)
            if played.problems:
                return
            stays = all(fault.kind != "leave" for fault in scenario.faults)
            if (
                scenario.seed % 2 == 0
                and stays
                and all(process.alive and process.stopped_until < math.inf for process in processes)
            ):
                _again(played, processes, directory)
        if not played.problems:
            _new_job(played, directory)


def _again(played: Played, processes: list[Process], directory: Path) -> None:
    """The same ranks save once more, with nothing in their way."""
    world = played.world
    played.stage = "again"
    wait = max(process.stopped_until for process in processes)
    for process in processes:
        process.at_step.clear()
        process.interrupted = False
        process.cut_until = min(process.cut_until, world.now)
        for name in ("commit", "write_error", "read_error", "slow_write"):
            process.facts.pop(name, None)
        process.facts["spared"] = True
        _reconnect(process)
    world.now = max(world.now, wait)
    if any(process.facts["connections"][-1].was_reset for process in processes):
        ended = _run(world, processes, lambda rank: _save(rank, directory / "reconnected", AGAIN_S))
        judge.reconnected(played, ended, processes, directory / "reconnected")
    ended = _run(world, processes, lambda rank: _save(rank, directory / "again", AGAIN_S))
    judge.undisturbed(played, ended, processes, directory / "again")


def _new_job(played: Played, directory: Path) -> None:
    """The job is dead; another one, of fewer ranks, saves beside what it left, and removes that."""
    played.stage = "new job"
    world = World(played.scenario.seed + 1)
    link = Link(world, 1e-4, 1.0)
    processes = _start(world, link, 1 + (played.scenario.seed % 4 == 0), "launcher", 1)
    with simulated(world, Fabric(world, link, processes)):
        ended = _run(world, processes, lambda rank: _save(rank, directory / "next", AGAIN_S))
        judge.undisturbed(played, ended, processes, directory / "next")
    judge.clean(played, directory)


def _start(world: World, link: Link, size: int, store: str, node_count: int) -> list[Process]:
    processes = [world.process(rank) for rank in range(size)]
    server = Server(world, link, processes[0] if store == "rank 0" else None, has_address=store != "file")
    for process in processes:
        process.node = f"node-{process.rank % node_count}"
        process.facts["group"] = Group(process.rank, range(size), Store(server, process), "snapstone/1")  # type: ignore[arg-type]
    return processes


def _reconnect(process: Process) -> None:
    """A call that hangs in a link which is up again: TCP sends it once more."""
    for connection in process.facts["connections"]:
        connection.resend()


def _operation(scenario: Scenario, directory: Path) -> Callable[[int], Any]:
    timeout_s = scenario.timeout_s
    if scenario.operation == "load":
        return lambda rank: _load(rank, template(scenario.writers), scenario.strategy, timeout_s)
    if scenario.operation == "overwrite":
        return lambda rank: _save(rank, directory / "old", timeout_s, overwrite=True)
    if scenario.operation == "delta":
        return lambda rank: _save(rank, directory / "new", timeout_s, base=directory / "old")
    return lambda rank: _save(rank, directory / "new", timeout_s)


def _run(world: World, processes: list[Process], operation: Callable[[int], Any]) -> dict[int, Ended]:
    """The operation on all ranks at once; how those ended that did. Hung when some rank never would."""
    ended: dict[int, Ended] = {}
    start_s = world.now

    def attempt(process: Process) -> None:
        begun_s = world.now
        value, error = None, None
        try:
            value = operation(process.rank)
        except Killed:
            raise
        except BaseException as failure:
            error = failure
        if not process.alive:
            return
        ended[process.rank] = Ended(error, begun_s, world.now, value)
        world.note(process, "ended: " + ("success" if error is None else f"{type(error).__name__}: {error}"))
        process.facts["spared"] = True
        if process.facts.get("leaves"):
            world.at(world.now + LEAVES_AFTER_S, process.kill)

    for process in processes:
        process.main = process.spawn(lambda process=process: attempt(process))  # type: ignore[misc]

    def pending() -> list[int]:
        return [
            process.rank
            for process in processes
            if process.alive and process.stopped_until < math.inf and process.rank not in ended
        ]

    world.run(lambda: not pending() or world.now > start_s + HORIZON_S)
    if left := pending():
        raise Hung(f"ranks {left} have not ended after {world.now - start_s:.1f} s")
    return ended


def _save(rank: int, path: Path, timeout_s: float, **options: Any) -> str:
    """The save_id."""
    state = {"w": torch.full((4,), 1.0), f"own.{rank}": torch.full((2,), float(rank))}
    checkpoint = ss.save(state, checkpoint_id=path, step=2, timeout=timeout_s, on_unchanged="ignore", **options)
    return str(checkpoint.save_id) if hasattr(checkpoint, "save_id") else ""


def _load(rank: int, path: Path, strategy: Any, timeout_s: float) -> bool:
    """Whether every byte is the one that was saved."""
    own = f"own.{rank % 2}"
    target: dict[str, Any] = {"w": torch.zeros(COMMON_WORDS), own: torch.zeros(OWN_WORDS), "epoch": 0}
    process = current_process()
    try:
        ss.load(target, checkpoint_id=path, strategy=strategy, timeout=timeout_s, strict=False)
    finally:
        process.facts["took values"] = target["epoch"] != 0
    expected = _state(rank % 2)
    right = all(torch.equal(target[name], expected[name]) for name in ("w", own))
    return right and target["epoch"] == expected["epoch"]


def _state(rank: int) -> dict[str, Any]:
    return {
        "epoch": 7,
        "w": torch.arange(COMMON_WORDS, dtype=torch.float32),
        f"own.{rank}": torch.full((OWN_WORDS,), float(rank + 1)),
    }


@cache
def template(writers: int) -> Path:
    """A checkpoint in every byte, saved by so many simulated ranks; made once per process."""
    path = Path(_kept().name) / f"saved-by-{writers}"
    world = World(writers)
    torch.set_num_threads(1)
    link = Link(world, 1e-4, 1.0)
    processes = _start(world, link, writers, "launcher", 1)
    with simulated(world, Fabric(world, link, processes), real_shares=True):
        ended = _run(world, processes, lambda rank: ss.save(_state(rank), checkpoint_id=path, step=1))
    assert all(one.error is None for one in ended.values()), ended
    report = ss.verify(path)
    assert report, report.problems
    return path


@cache
def _kept() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="ranks-", dir=_memory())


def _memory() -> str | None:
    """A directory in memory, where there is one: histories sync."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
