"""Runs a function on N real ranks and says how each of them ended.

`run_ranks(4, function, *args)` calls `function(rank, *args)` in four processes joined by a gloo process group on this
machine, and returns four `Result`s within `timeout` seconds, whatever the ranks do: return, raise, die, stop or hang.
`Ranks` is the same with a hand on the processes in between: `wait_for` a mark that a rank announces, then `signal` it.

Functions are top-level functions of the test module. Every process starts with one torch thread, its output in a file
(`Result.output`), and is gone when the call returns. A rank lives on after its function until all have ended theirs,
so that the store which rank 0 serves does not vanish under the others; one that must leave early calls `os._exit`.

Processes are forked from a server that has imported torch and nothing else, which costs milliseconds instead of
seconds per rank. It holds no process group, no CUDA context and no thread, so a fork of it is as good as a new process.
"""

from __future__ import annotations

import ctypes
import faulthandler
import importlib.util
import inspect
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, Self
from unittest import mock

Store = Literal["file", "tcp", "launcher", "env", "none"]
Outcome = Literal["returned", "raised", "died", "stopped", "timed out"]

PR_SET_PDEATHSIG = 1
LEAVE_S = 5.0  # for an ended rank to shut its interpreter down
STACKS_S = 0.3  # for a hung rank to write its stacks

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["torch.distributed.tensor"])  # what a rank would spend its first seconds on
_marks: Connection | None = None  # of this process, when it is a rank


@dataclass(frozen=True)
class Result:
    """How one rank ended. `seconds` is the time inside the function, `exitcode` negative for a signal."""

    rank: int
    outcome: Outcome
    value: Any = None
    error: BaseException | None = None
    trace: str = ""
    seconds: float = 0.0
    exitcode: int | None = None
    output: str = ""


def run_ranks(
    world_size: int,
    function: Callable[..., Any],
    *args: Any,
    timeout: float = 60.0,
    store: Store = "file",
    env: Mapping[str, str] | None = None,
) -> list[Result]:
    """Call `function(rank, *args)` on every rank. See `Ranks` for `store` and `env`."""
    with Ranks(world_size, function, *args, store=store, env=env) as ranks:
        return ranks.results(timeout)


def values(results: list[Result]) -> list[Any]:
    """What the ranks returned, in rank order; fails with the story of the first rank that did anything else."""
    for result in results:
        if result.outcome != "returned":
            raise AssertionError(f"rank {result.rank} {result.outcome}\n{result.trace}{result.output}")
    return [result.value for result in results]


def announce(mark: str) -> None:
    """In a rank: tell the launcher that this point is reached."""
    assert _marks is not None, "announce() is for functions run by run_ranks"
    _marks.send(("mark", mark))


class Ranks:
    """Running ranks; leaving the context kills what is left.

    `store` is where they meet: a FileStore ("file"), a TCPStore served by rank 0 ("tcp") or by this process
    ("launcher"), the same found through torchrun's variables ("env"), or no process group at all ("none").
    `env` is added to this process's variables.
    """

    def __init__(
        self,
        world_size: int,
        function: Callable[..., Any],
        *args: Any,
        store: Store = "file",
        env: Mapping[str, str] | None = None,
    ) -> None:
        self._directory = tempfile.TemporaryDirectory(prefix="ranks-")
        self._pipes: list[Connection] = []
        self._processes: list[Any] = []
        self._marks: list[list[str]] = [[] for _ in range(world_size)]
        self._ends: dict[int, dict[str, Any]] = {}
        self._served: Any = None
        port = 0
        if store in ("env", "launcher"):
            self._served = serve_store()
            port = self._served.port
        setup = _Setup(world_size, store, port, self._directory.name, {**os.environ, **(env or {})})
        where = (function.__module__, inspect.getsourcefile(function), function.__qualname__)
        _start_server()
        for rank in range(world_size):
            mine, theirs = _context.Pipe()
            process = _context.Process(target=_run_rank, args=(rank, setup, where, theirs, args), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(mine)
            self._processes.append(process)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._kill()
        self._directory.cleanup()

    def signal(self, rank: int, signum: int) -> None:
        os.kill(self._processes[rank].pid, signum)

    def wait_for(self, rank: int, mark: str, timeout: float = 30.0) -> None:
        """Until `rank` announces `mark`."""
        end = time.monotonic() + timeout
        while mark not in self._marks[rank]:
            if rank in self._ends or time.monotonic() > end:
                raise AssertionError(
                    f"rank {rank} never announced {mark!r}: {self._ends.get(rank)} {self._output(rank)}"
                )
            self._listen()

    def results(self, timeout: float = 60.0) -> list[Result]:
        """How every rank ended. Returns when all have, or are stopped; those that run after `timeout` are killed."""
        end = time.monotonic() + timeout
        while (pending := self._pending()) and time.monotonic() < end:
            if all(_is_stopped(self._processes[rank].pid) for rank in pending):
                break
            self._listen()
        for rank in pending:
            stopped = _is_stopped(self._processes[rank].pid)
            self._ends[rank] = {"outcome": "stopped" if stopped else "timed out"}
            if not stopped:
                self.signal(rank, signal.SIGUSR1)  # faulthandler writes the stacks to the output
                time.sleep(STACKS_S)
        for rank, pipe in enumerate(self._pipes):
            if self._ends[rank]["outcome"] in ("returned", "raised"):
                pipe.send("leave")
        for rank, process in enumerate(self._processes):
            if self._ends[rank]["outcome"] not in ("stopped", "timed out"):
                process.join(LEAVE_S)
        exitcodes = [process.exitcode for process in self._processes]
        self._kill()
        return [
            Result(rank, exitcode=exitcodes[rank], output=self._output(rank), **self._ends[rank])
            for rank in range(len(self._processes))
        ]

    def _pending(self) -> list[int]:
        return [rank for rank in range(len(self._processes)) if rank not in self._ends]

    def _listen(self) -> None:
        pending = {self._pipes[rank]: rank for rank in self._pending()}
        for pipe in wait(list(pending), timeout=0.05):
            assert isinstance(pipe, Connection)
            rank = pending[pipe]
            try:
                kind, message = pipe.recv()
            except (EOFError, ConnectionResetError):
                self._ends[rank] = {"outcome": "died"}
                continue
            if kind == "mark":
                self._marks[rank].append(message)
            else:
                self._ends[rank] = message

    def _output(self, rank: int) -> str:
        path = _output_path(self._directory.name, rank)
        return path.read_text(errors="replace") if path.exists() else ""

    def _kill(self) -> None:
        for process in self._processes:
            if process.is_alive():
                process.kill()
        for process in self._processes:
            process.join()
        for pipe in self._pipes:
            pipe.close()
        self._served = None


@dataclass(frozen=True)
class _Setup:
    world_size: int
    store: Store
    port: int
    directory: str
    env: dict[str, str]


def _run_rank(rank: int, setup: _Setup, where: tuple[str, str, str], pipe: Connection, args: tuple[Any, ...]) -> None:
    """The whole life of a rank process."""
    global _marks
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # never outlive the fork server
    output = os.open(_output_path(setup.directory, rank), os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o600)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1)
    os.environ.clear()
    os.environ.update(setup.env)
    _marks = pipe
    begin = time.monotonic()
    try:
        function = _load(*where)
        keep_store = _join_group(rank, setup)
        begin = time.monotonic()
        value = function(rank, *args)
        end = {"outcome": "returned", "value": value}
    except BaseException as error:
        keep_store = None
        end = {"outcome": "raised", "error": _portable(error), "trace": traceback.format_exc()}
    end["seconds"] = time.monotonic() - begin
    pipe.send(("end", end))
    try:
        pipe.recv()
    except EOFError:
        os._exit(1)  # the launcher is gone
    del keep_store


def _join_group(rank: int, setup: _Setup) -> Any:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    if setup.store == "none":
        return None
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    options: dict[str, Any] = {"rank": rank, "world_size": setup.world_size, "timeout": timedelta(seconds=30)}
    if setup.store == "env":
        os.environ.update(at_store(setup.port))
        options["init_method"] = "env://"
    elif setup.store == "file":
        options["store"] = dist.FileStore(os.path.join(setup.directory, "store"), setup.world_size)
    elif setup.store == "tcp" and rank == 0:
        options["store"] = dist.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
        port_file = Path(setup.directory, "port")
        port_file.with_suffix(".new").write_text(str(options["store"].port))
        port_file.with_suffix(".new").rename(port_file)
    else:
        port = setup.port or _read_port(Path(setup.directory, "port"))
        options["store"] = dist.TCPStore("127.0.0.1", port, None, False, wait_for_workers=False)
    dist.init_process_group("gloo", **options)
    return options.get("store")


def _start_server() -> None:
    """With one BLAS thread, which is none besides its own: threads do not survive a fork."""
    with mock.patch.dict(os.environ, OPENBLAS_NUM_THREADS="1", OMP_NUM_THREADS="1"):
        forkserver.ensure_running()


def serve_store() -> Any:
    """A TCPStore of this process, at a port that the kernel picks."""
    import torch.distributed as dist

    return dist.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)


def _read_port(path: Path) -> int:
    end = time.monotonic() + 30
    while not path.exists():
        if time.monotonic() > end:
            raise TimeoutError("rank 0 serves no store")
        time.sleep(0.005)
    return int(path.read_text())


def at_store(port: int) -> dict[str, str]:
    """The variables by which torchrun tells its ranks of the store that it serves."""
    return {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": str(True)}


def _load(module_name: str, path: str, qualname: str) -> Callable[..., Any]:
    """By path: how pytest names and finds test modules depends on its import mode."""
    module: ModuleType | None = sys.modules.get(module_name)
    if module is None:
        spec = importlib.util.spec_from_file_location(module_name, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[module_name] = module
        spec.loader.exec_module(module)
    function: Any = module
    for name in qualname.split("."):
        function = getattr(function, name)
    return function  # type: ignore[no-any-return]


def _portable(error: BaseException) -> BaseException:
    """The error itself when it survives pickling, else a RuntimeError that tells its type and message."""
    try:
        copy = pickle.loads(pickle.dumps(error))
    except Exception:
        copy = None
    return error if type(copy) is type(error) else RuntimeError(f"{type(error).__qualname__}: {error}")


def _is_stopped(pid: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] == "T"


def _output_path(directory: str, rank: int) -> Path:
    return Path(directory, f"output-{rank}")
