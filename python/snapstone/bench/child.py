"""What runs in processes that have never seen the training: checks of checkpoints, and saves that are killed.

Each rank starts one child, and the children meet in a group of their own. They report through a pipe; what engines
print goes to a file. Everything here is called in the child.
"""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

__all__ = ["Task", "run"]

GROUP_TIMEOUT_SECONDS = 120


@dataclass(frozen=True, slots=True)
class Task:
    """`checks` with `killed` False: checkpoints, and for each the digests that this rank's tensors may have, as names
    of tensors to hex. With `killed`: save step 1, then begin step 2 and live until somebody ends this process.
    """

    engine: str
    home: tuple[str, str]
    plan: Any  # workload.Plan
    root: Path
    rank: int
    world: int
    store: tuple[str, int]  # host and port; served by rank 0's parent
    log: Path
    killed: bool
    checks: tuple[tuple[Path, tuple[dict[str, str], ...]], ...]


def run(task: Task, pipe: Connection) -> None:
    """The process's target. It leads a process group, so that what engines start ends with it."""
    os.setsid()
    log = os.open(task.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = str(True)  # a parent serves the store, as torchrun does
    os.environ.update({"RANK": str(task.rank), "WORLD_SIZE": str(task.world), "MASTER_ADDR": task.store[0]})
    os.environ.update({"MASTER_PORT": str(task.store[1]), "LOCAL_RANK": str(task.plan.local_rank)})
    try:
        answer = _work(task, pipe)
    except BaseException as error:
        answer = ("error", _line(error))
    with suppress(OSError):
        pipe.send(answer)
        pipe.poll(GROUP_TIMEOUT_SECONDS)  # nobody leaves before all have answered
    os.killpg(0, signal.SIGKILL)


def _work(task: Task, pipe: Connection) -> tuple[str, Any]:
    import torch
    import torch.distributed as dist

    from .engines import NAMES, Setting, engine_class, register
    from .workload import Workload, local_nbytes

    torch.set_num_threads(1)
    backend = "cpu:gloo,cuda:nccl" if task.plan.device == "cuda" else "gloo"
    timeout = timedelta(seconds=GROUP_TIMEOUT_SECONDS)
    dist.init_process_group(backend, timeout=timeout)
    plan = replace(task.plan, state_only=True, step_seconds=0.0)
    workload = Workload(plan)
    if task.engine not in NAMES:
        register(task.engine, ":".join(task.home))
    setting = Setting(
        rank=task.rank,
        world=task.world,
        device=plan.device,
        nbytes_of_rank=local_nbytes(workload.state),
        optimizer=workload.optimizer,
        group=dist.new_group(backend="gloo", timeout=timeout),
        keep=2,  # as many as it saves
    )
    engine = engine_class(task.engine)(setting)
    if task.killed:
        return _save_until_killed(task, workload, engine, pipe)
    return "checked", _check(task, workload, engine)


def _check(task: Task, workload: Any, engine: Any) -> list[str]:
    """What is wrong, a line for each checkpoint."""
    from .loop import ENGINE_ERRORS
    from .workload import digests

    problems: list[str] = []
    for path, acceptable in task.checks:
        target = workload.blank()
        try:
            engine.load(target, path)
        except ENGINE_ERRORS as error:
            problems.append(f"{path.name} cannot be loaded: {_line(error)}")
            continue
        found = digests(target)
        wrong = [sorted(name for name in found if found[name] != wanted.get(name)) for wanted in acceptable]
        fewest = min(wrong, key=len)
        if fewest:
            problems.append(
                f"{path.name} is not what was saved: {len(fewest)} of {len(found)} tensors differ on rank {task.rank}, "
                f"{fewest[0]} first"
            )
    return problems


def _save_until_killed(task: Task, workload: Any, engine: Any, pipe: Connection) -> tuple[str, Any]:
    from .workload import digests

    begin = time.perf_counter()
    steps = [digests(workload.state)]
    _saved(engine.save(workload.state, task.root / "step-00000001", 1))
    pipe.send(("saved", time.perf_counter() - begin))
    workload.update()
    steps.append(digests(workload.state))
    pipe.send(("digests", steps))
    pipe.recv()  # all ranks are here
    pipe.send(("begun", None))
    _saved(engine.save(workload.state, task.root / "step-00000002", 2))
    return "survived", None


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:600]


def _saved(pending: Any) -> None:
    if pending is not None:
        pending.fence()
        pending.complete()
        pending.wait()
        pending.finish()
