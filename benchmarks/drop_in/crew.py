"""Crew: rank processes joined by gloo that live as long as it does, and do what they are told over pipes."""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
import time
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import TracebackType
from typing import Any
from unittest import mock

import torch.distributed as dist

from drop_in.rank import serve

__all__ = ["Crew", "WorkFailed"]

CALL_SECONDS_MAX = 300.0
LEAVE_SECONDS_MAX = 15.0


class WorkFailed(RuntimeError):
    """What the lowest rank that failed said."""


class Crew:
    """Processes forked from a server that has imported torch and nothing more: no group, no thread.

    The store that joins the ranks is served by this process, as under torchrun. A crew that loses a rank, or does not
    answer in time, is ended, and what it printed is shown; every later call fails at once.
    """

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self._lost: str | None = None
        self._scratch = tempfile.TemporaryDirectory(prefix="ranks-")
        self._output = Path(self._scratch.name, "output")
        self._output.touch()
        self._store: Any = dist.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
        self._pipes: list[Connection] = []
        self._processes: list[Any] = []
        context = _context()
        for rank in range(world_size):
            mine, theirs = context.Pipe()
            arguments = (rank, world_size, self._store.port, str(self._output), theirs)
            # Not daemonic: DCP's process executor starts a process of its own below it.
            process = context.Process(target=serve, args=arguments)
            process.start()
            theirs.close()
            self._pipes.append(mine)
            self._processes.append(process)

    def __enter__(self) -> Crew:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def call(self, method: str, *arguments: Any) -> list[Any]:
        """`Rank.<method>(*arguments)` on every rank; what they return, in rank order.

        Raises:
            WorkFailed: a rank raised, died or did not answer in time.
        """
        if self._lost is not None:
            raise WorkFailed(self._lost)
        try:
            for pipe in self._pipes:
                pipe.send((method, arguments))
            answers = self._answers(method)
        except (EOFError, OSError) as error:
            self._end(f"a rank died in {method}: {type(error).__name__}")
        failures = [text for failed, text in answers if failed]
        if failures:
            raise WorkFailed(failures[0])
        return [value for _, value in answers]

    def _answers(self, method: str) -> list[tuple[bool, Any]]:
        answers: dict[int, tuple[bool, Any]] = {}
        rank_of = {pipe: rank for rank, pipe in enumerate(self._pipes)}
        deadline = time.monotonic() + CALL_SECONDS_MAX
        while len(answers) < self.world_size:
            ready = wait([pipe for pipe, rank in rank_of.items() if rank not in answers], deadline - time.monotonic())
            if not ready:
                self._end(f"{method} did not end within {CALL_SECONDS_MAX:g} s")
            for pipe in ready:
                assert isinstance(pipe, Connection)
                answers[rank_of[pipe]] = pipe.recv()
        return [answers[rank] for rank in range(self.world_size)]

    def _end(self, reason: str) -> None:
        self._lost = reason
        for process in self._processes:
            process.kill()
        print(self._output.read_text(errors="replace"), file=sys.stderr)
        raise WorkFailed(reason)

    def close(self) -> None:
        for pipe in self._pipes:
            pipe.close()  # which is how a rank learns that it may go
        end = time.monotonic() + LEAVE_SECONDS_MAX
        for process in self._processes:
            process.join(max(end - time.monotonic(), 0))
            if process.is_alive():
                process.kill()
                process.join()
        self._store = None
        self._scratch.cleanup()


def _context() -> Any:
    """With the server running: with one BLAS thread, which is none besides its own, since no thread survives a fork."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch.distributed.tensor", "torch.distributed.checkpoint"])
    with mock.patch.dict(os.environ, OPENBLAS_NUM_THREADS="1", OMP_NUM_THREADS="1"):
        forkserver.ensure_running()
    return context
