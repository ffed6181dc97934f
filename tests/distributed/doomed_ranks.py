"""Saves of several ranks, some of which are killed at a point (durability/points.py), many such saves side by side.

`sweep` runs in a process of its own (ranks.py) that has imported everything and started nothing: each rank is a fork of
it, as good as a new process, for a few milliseconds. Survivors spend most of their time waiting for their deadline, so
many saves wait at once, but only few run: a save is begun when the victims of those before it are dead.
"""

from __future__ import annotations

import json
import os
import select
import shutil
import signal
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed as dist
from rank_states import attempt, state

import snapstone as ss
from durability import points
from durability.counted import count

TIMEOUT_S = 12.0  # of a save: long beside the save, also on a busy machine
LATE_S = 10.0  # past it: busy machines again, and less than a second deadline; test_dying_ranks.py asks for less
START_S = 120.0
RUNNING_MAX = 2
WAITING_MAX = 40


@dataclass(frozen=True)
class Doom:
    """`kills`: a point for each victim. `kind`: "new", "overwrite" or "delta"."""

    world_size: int
    kind: str
    kills: tuple[tuple[int, str], ...]

    def __str__(self) -> str:
        return f"{self.kind} on {self.world_size}: " + ", ".join(
            f"rank {rank} at {point}" for rank, point in self.kills
        )


@dataclass
class End:
    """`ends`: of each rank what `attempt` says, or None if it was killed. `hung`: ranks that had to be ended."""

    ends: list[dict[str, Any] | None]
    hung: list[int]


@dataclass
class _Running:
    number: int
    pipes: dict[int, int]  # rank by descriptor
    pids: list[int]
    victims: set[int]
    begin: float = field(default_factory=time.monotonic)
    told: dict[int, bytes] = field(default_factory=dict)

    @property
    def is_over(self) -> bool:
        return not self.pipes

    @property
    def waits(self) -> bool:
        """Nothing but deadlines is left."""
        return self.victims.isdisjoint(self.pipes.values())


def prepare(rank: int, run: str) -> None:
    ss.save(state(rank, 1), checkpoint_id=Path(run, "step-1"), timeout=START_S)


def sweep(rank: int, run: str, dooms: list[Doom]) -> list[End]:
    """Each in a directory of its own, `run/NUMBER`, a copy of `run/of-WORLD_SIZE` that `prepare` has saved into."""
    ends: dict[int, End] = {}
    running: list[_Running] = []
    waiting = list(enumerate(dooms))
    while waiting or running:
        busy = sum(not one.waits for one in running)
        if waiting and busy < RUNNING_MAX and len(running) < WAITING_MAX:
            running.append(_begin(Path(run), *waiting.pop(0)))
            continue
        _listen(running)
        for one in [one for one in running if one.is_over]:
            running.remove(one)
            ends[one.number] = _end(one, len(one.pids))
    return [ends[number] for number in range(len(dooms))]


def _begin(run: Path, number: int, doom: Doom) -> _Running:
    directory = run / str(number)
    shutil.copytree(run / f"of-{doom.world_size}", directory, copy_function=os.link)
    pipes: dict[int, int] = {}
    pids = []
    for rank in range(doom.world_size):
        read_end, write_end = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(read_end)
            _be(rank, directory, doom, write_end)
        os.close(write_end)
        pipes[read_end] = rank
        pids.append(pid)
    return _Running(number, pipes, pids, {rank for rank, _ in doom.kills})


def _be(rank: int, directory: Path, doom: Doom, tell: int) -> None:
    """The whole life of a rank."""
    try:
        store = dist.FileStore(str(directory / ".store"), doom.world_size)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=doom.world_size)
        dist.barrier()
        for victim, point in doom.kills:
            if victim == rank:
                points.arm(point)
        ended = attempt(lambda: save(rank, directory, doom.kind))
        os.write(tell, json.dumps(ended).encode())
    finally:
        os._exit(0)


def save(rank: int, run: Path, kind: str) -> None:
    """State 2, as "step-2" or in the place of state 1."""
    path = run / ("step-1" if kind == "overwrite" else "step-2")
    base = run / "step-1" if kind == "delta" else None
    ss.save(state(rank, 2), checkpoint_id=path, base=base, overwrite=kind == "overwrite", timeout=TIMEOUT_S)


def _listen(running: list[_Running]) -> None:
    by_pipe = {pipe: one for one in running for pipe in one.pipes}
    for pipe in select.select(list(by_pipe), [], [], 0.05)[0]:
        one = by_pipe[pipe]
        if told := os.read(pipe, 65536):
            one.told[one.pipes[pipe]] = one.told.get(one.pipes[pipe], b"") + told
        else:
            os.close(pipe)
            del one.pipes[pipe]
    for one in running:
        if time.monotonic() > one.begin + START_S:
            for rank in one.pipes.values():
                with suppress(ProcessLookupError):
                    os.kill(one.pids[rank], signal.SIGABRT)


def _end(one: _Running, world_size: int) -> End:
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in one.pids]
    ends = [json.loads(one.told[rank]) if rank in one.told else None for rank in range(world_size)]
    died = {rank for rank, code in enumerate(codes) if code == -signal.SIGKILL}
    count("kills", len(died))
    hung = [rank for rank in range(world_size) if ends[rank] is None and rank not in died]
    return End(ends, hung)


def blames_the_dead(doom: Doom, end: End) -> str:
    """Why the survivors' ends are none that they may come to; empty if they are."""
    if end.hung:
        return f"ranks {end.hung} said nothing"
    dead = {rank for rank, one in enumerate(end.ends) if one is None}
    if not dead <= {rank for rank, _ in doom.kills}:
        return f"ranks {dead} died"
    survivors = [one for one in end.ends if one is not None]
    if len({one["error"] is None for one in survivors}) > 1:
        return f"two outcomes: {survivors}"
    for one in survivors:
        if one["error"] is None:
            continue
        if one["error"] != "RankFailedError" or not one["failed_ranks"] or not set(one["failed_ranks"]) <= dead:
            return f"not the dead rank's: {one}"
        if one["seconds"] > TIMEOUT_S + LATE_S:
            return f"late: {one}"
    return ""
