"""Whether an engine saves what it was given: loads in processes that have seen nothing, compared bit for bit, and
ranks killed in the middle of a save.

1. Before a save that is checked, every rank keeps digests of its tensors. The next step changes the state as soon as
   the engine's fence lets it.
2. Once the engine calls the checkpoint saved and its bytes are synced, one new process per rank opens it.
3. For a kill, new processes save a state twice; one of them, by seed, is killed at a random moment of the second save.
   The newest checkpoint that bears the engine's mark of completeness must load, and be the first or the second state.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import shutil
import signal
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from torch.distributed import TCPStore  # type: ignore[attr-defined]

from .child import GROUP_TIMEOUT_SECONDS, Task, run
from .engines import NAMES, Engine
from .models import shape_of, state_nbytes
from .ranks import Ranks, serve_store
from .workload import Plan

__all__ = ["Check", "Witness"]

Check = tuple[Path, dict[str, str]]
KILLED_NBYTES_MAX = 512 << 20  # per rank: a larger model is stood for by a smaller one
SURVIVORS_SECONDS = 0.5
LEAVE_SECONDS = 10.0


def _forking() -> Any:
    """A server that has imported torch and nothing else forks the children: new processes in milliseconds."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["snapstone.bench.child", "torch.distributed.tensor"])
    return context


class Witness:
    """Starts children for one engine. Every method is called by all ranks and gives all the same answer."""

    def __init__(self, engine: str, plan: Plan, ranks: Ranks, root: Path, seed: int) -> None:
        self._engine = engine
        self._home = NAMES[engine]
        self._plan = plan
        self._ranks = ranks
        self._root = root
        self._random = random.Random(f"{seed} {engine}")  # alike on all ranks
        self._context = _forking()
        self._store: TCPStore | None = None  # of rank 0: where the children meet
        self._log = root / f"child-{ranks.rank:05d}.log"

    def check(self, checks: Sequence[Check], plan: Plan | None = None) -> list[str]:
        """Failures of loading these checkpoints, each with the digests that this rank expects of it."""
        return self._loaded(tuple((path, (digests,)) for path, digests in checks), plan or self._plan)

    def _loaded(self, checks: tuple[tuple[Path, tuple[dict[str, str], ...]], ...], plan: Plan) -> list[str]:
        child = self._start(replace(plan, device="cpu"), self._root, killed=False, checks=checks)
        try:
            kind, found = child.receive()
        except (EOFError, TimeoutError) as error:
            kind, found = "error", f"the process that loads {_how(error)}"
        problems = found if kind == "checked" else [f"checkpoints cannot be loaded: {found}"]
        everyone = self._ranks.gather(problems)
        child.end()
        return list(dict.fromkeys(problem for one in everyone for problem in one))

    def kill(self, engine: Engine) -> list[str]:
        """One kill -9 of a rank during a save; what was wrong afterwards."""
        root = self._root / "killed"
        if self._ranks.rank == 0:
            shutil.rmtree(root, ignore_errors=True)
            root.mkdir()
        self._ranks.barrier()
        plan = self._stand_in()
        victim, moment = self._random.randrange(self._ranks.world), self._random.random()
        child = self._start(plan, root, killed=True, checks=())
        problem, expected = None, []
        try:
            seconds = child.wanted("saved")
            expected = child.wanted("digests")
        except (EOFError, TimeoutError, RuntimeError) as error:
            problem, seconds = f"the first of two saves failed: {_how(error)}", 0.0
        problems = [one for one in self._ranks.gather(problem) if one]
        slowest = max(self._ranks.gather(seconds))
        if not problems:
            self._strike(child, victim == self._ranks.rank, moment * slowest)
        child.kill()
        self._ranks.barrier()
        if problems:
            return list(dict.fromkeys(problems))
        return self._resume(engine, root, plan, expected)

    def _strike(self, child: _Child, victim: bool, delay: float) -> None:
        child.send("go")
        try:
            child.wanted("begun")
        except (EOFError, TimeoutError, RuntimeError):
            return  # it ended on its own: no less of a crash
        time.sleep(delay)
        if victim:
            child.kill()
        time.sleep(SURVIVORS_SECONDS)

    def _resume(self, engine: Engine, root: Path, plan: Plan, expected: Any) -> list[str]:
        """Loads the newest checkpoint that counts as complete on rank 0."""
        newest = None
        for path in sorted(root.glob("step-*"), reverse=True):
            if engine.is_complete(path):
                newest = path
                break
        newest = self._ranks.gather(newest)[0]
        if newest is None:
            return ["after kill -9 of a rank no complete checkpoint was left, though one had been saved"]
        found = self._loaded(((newest, tuple(expected)),), plan)
        return [f"after kill -9 of a rank: {problem}" for problem in found]

    def _stand_in(self) -> Plan:
        """The model itself, or the largest of some smaller ones that a rank can save twice in no time."""
        for name in (self._plan.model, "small", "tiny"):
            shape = shape_of(name)
            fits = shape.key_heads % self._plan.tp == 0
            if fits and state_nbytes(shape, self._plan.precision) // self._plan.fsdp <= KILLED_NBYTES_MAX:
                return replace(self._plan, model=name)
        return replace(self._plan, model="tiny", tp=1, fsdp=1)

    def _start(self, plan: Plan, root: Path, *, killed: bool, checks: Any) -> _Child:
        if self._ranks.rank == 0:
            self._store = serve_store()
        address = self._ranks.gather((self._store.host, self._store.port) if self._store else None)[0]
        task = Task(
            engine=self._engine,
            home=self._home,
            plan=plan,
            root=root,
            rank=self._ranks.rank,
            world=self._ranks.world,
            store=address,
            log=self._log,
            killed=killed,
            checks=checks,
        )
        return _Child(self._context, task)


class _Child:
    def __init__(self, context: Any, task: Task) -> None:
        self._pipe: Connection
        self._pipe, other = context.Pipe()
        self._process = context.Process(target=run, args=(task, other), daemon=False)
        self._process.start()
        other.close()

    def receive(self) -> tuple[str, Any]:
        if not self._pipe.poll(2 * GROUP_TIMEOUT_SECONDS):
            raise TimeoutError("did not answer")
        kind, value = self._pipe.recv()
        return kind, value

    def wanted(self, expected: str) -> Any:
        kind, value = self.receive()
        if kind != expected:
            raise RuntimeError(str(value))
        return value

    def send(self, word: str) -> None:
        self._pipe.send(word)

    def end(self) -> None:
        """Lets it go, and waits."""
        with suppress(OSError):
            self._pipe.send("leave")
        self._process.join(LEAVE_SECONDS)
        self.kill()

    def kill(self) -> None:
        """Ends it and everything that it started, at once."""
        assert self._process.pid is not None
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.kill()
        self._process.join()
        self._pipe.close()


def _how(error: BaseException) -> str:
    return "died" if isinstance(error, EOFError) else str(error) or type(error).__name__
