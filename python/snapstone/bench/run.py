"""`bench stall`, whole: what was asked for, whether it fits, each engine in turn, and the document as it grows.

The document is written after every pair, so that whatever ends this process leaves what was measured.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from . import results
from .engines import chosen, engine_class
from .environment import environment, memory_available_bytes
from .layout import Layout
from .loop import described
from .models import Precision, shape_of, state_nbytes
from .ranks import Ranks
from .results import Document, EngineResult
from .stall import Measurement, Protocol, blank_result, single_saves
from .workload import Plan, Workload, local_nbytes

__all__ = ["PAIRS_MIN", "Request", "leave", "run"]

PAIRS_MIN = 5
# The state, an engine's copy of it, and the tensors that a new process loads a checkpoint into; and what an engine
# before may keep, as snapstone keeps its staging memory for the next save.
COPIES_OF_ONE_ENGINE = 3
COPIES_OF_SEVERAL = 4
DISK_MARGIN = 1.1


@dataclass(frozen=True, slots=True)
class Request:
    """The options of the command, as given."""

    model: str
    engine: str
    out: Path
    directory: Path | None  # for the checkpoints; default: below `out`
    saves: int
    pairs: int
    cadences: tuple[str, ...]
    interval_steps: int | None
    fsdp: int
    tp: int
    precision: Precision
    device: str
    state_only: bool
    step_seconds: float
    batch: int
    length: int
    checks: int
    kills: int
    seed: int
    label: str | None
    command: tuple[str, ...]


def run(request: Request, report: Callable[[str], None]) -> int:
    """Measures, on every rank of the world, and tells `report` of rank 0 how it goes, a line each.

    Returns the exit code: 0, 1 when an engine failed or a rank died, 130 after Ctrl-C.

    Raises:
        ValueError, OSError: wrong options, or what was asked for does not fit; nothing has been started then.
    """
    names = chosen(request.engine)
    check_request(request)
    signal.signal(signal.SIGTERM, _interrupt)
    directory = request.directory or request.out
    _check_place(request, directory, COPIES_OF_ONE_ENGINE if len(names) == 1 else COPIES_OF_SEVERAL)
    return _Run(request, names, Ranks(request.device), directory, report).measure()


def _interrupt(number: int, frame: object) -> NoReturn:
    """torchrun ends ranks with SIGTERM when another one died: what was measured is kept as after Ctrl-C."""
    raise KeyboardInterrupt


def _finish_undisturbed() -> None:
    """What was measured is being written: torchrun, which may hear of a dead rank later than this one, waits for it."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def check_request(request: Request) -> None:
    """ValueError for numbers that make no sense, and for layouts that do not fit the ranks and the model."""
    shape = shape_of(request.model)
    Layout.of(_from_launcher("WORLD_SIZE", 1), request.fsdp, request.tp, shape.key_heads)
    for name in ("saves", "pairs", "batch", "length"):
        if getattr(request, name) < 1:
            raise ValueError(f"--{name} {getattr(request, name)}: must be at least 1")
    if request.interval_steps is not None and request.interval_steps < 1:
        raise ValueError(f"--interval-steps {request.interval_steps}: must be at least 1")


def _from_launcher(name: str, default: int) -> int:
    """What torchrun says about the ranks, before they meet."""
    return int(os.environ.get(name, default))


def _check_place(request: Request, directory: Path, copies: int) -> None:
    """Whether directories can be written, and memory and disk hold what is to come; raises with the numbers."""
    for path in {request.out, directory}:
        path.mkdir(parents=True, exist_ok=True)
        if not os.access(path, os.W_OK | os.X_OK):
            raise PermissionError(13, "the directory cannot be written", os.fspath(path))
    shape = shape_of(request.model)
    nbytes = state_nbytes(shape, request.precision)
    world = _from_launcher("WORLD_SIZE", 1)
    local_ranks = _from_launcher("LOCAL_WORLD_SIZE", world)
    needed = copies * local_ranks * nbytes // (request.fsdp * request.tp)
    available = memory_available_bytes()
    if _from_launcher("LOCAL_RANK", 0) == 0 and needed > available:
        raise ValueError(
            f"--model {request.model}: {_gib(needed)} of memory are needed on this machine (the state of {local_ranks} "
            f"ranks {copies} times: itself, an engine's copy, a load that is compared"
            f"{', what an engine before keeps' if copies == COPIES_OF_SEVERAL else ''}), {_gib(available)} are "
            "available; take a smaller model, one engine at a time or more ranks with --fsdp"
        )
    # Engines without deduplication write the replicas too.
    stored = nbytes * world // (request.fsdp * request.tp)
    kept = 1 + max(request.saves + 1, single_saves(request.checks))  # a block's and the newest before it; one is spare
    wanted = int(DISK_MARGIN * stored * kept)
    free = shutil.disk_usage(directory).free
    if _from_launcher("RANK", 0) == 0 and wanted > free:
        raise ValueError(
            f"{directory}: {_gib(wanted)} of disk are needed ({kept} saves of {_gib(stored)}), {_gib(free)} are free; "
            "take fewer --saves or --checks, or another --dir"
        )


def _gib(nbytes: int) -> str:
    return f"{nbytes / 2**30:.2f} GiB"


class _Run:
    def __init__(
        self, request: Request, names: list[str], ranks: Ranks, directory: Path, report: Callable[[str], None]
    ) -> None:
        self.request = request
        self.names = names
        self.ranks = ranks
        self.begin = time.monotonic()
        self.report = report if ranks.rank == 0 else _silent
        self.label = request.label or request.model
        self.root = directory / f".bench-{results.path_of(directory, 'stall', self.label).stem}"
        self.results: list[EngineResult] = []
        self.document = self._new_document()

    def _new_document(self) -> Document:
        request, ranks = self.request, self.ranks
        found = environment(
            self.root.parent, device=request.device, ranks=ranks.world, nodes=ranks.nodes, backend=ranks.backend
        )
        document = results.new_document("stall", request.command, found)
        layout = Layout.of(ranks.world, request.fsdp, request.tp, shape_of(request.model).key_heads)
        document["workload"] = {
            "model": request.model,
            "parallelism": str(layout),
            "state_only": request.state_only,
            "tensors": 0,
            "nbytes": state_nbytes(shape_of(request.model), request.precision),
            "nbytes_of_rank": [],
            "step_seconds": None,
        }
        document["protocol"] = {
            "pairs": request.pairs,
            "saves_per_block": request.saves,
            "steps_per_block": 0,
            "seed": request.seed,
        }
        document["engines"] = self.results
        if request.pairs < PAIRS_MIN:
            document["problems"].append(f"only {request.pairs} pairs: {PAIRS_MIN} are the least for a spread")
        return document

    def measure(self) -> int:
        code = 0
        try:
            self._prepare()
            for name in self.names:
                self._engine(name)
            self.document["complete"] = True
            _finish_undisturbed()
            self.ranks.barrier()  # when an engine failed, the first rank that leaves makes torchrun end the others
        except KeyboardInterrupt:
            _finish_undisturbed()
            self.document["problems"].append("interrupted")
            code = 130
        except Exception as error:  # a rank that died shows as an error of whatever talked to it
            _finish_undisturbed()
            self.document["problems"].append(f"rank {self.ranks.rank}: {described(error)}")
            self.report(f"stopped: {described(error)}")
            code = 1
        if code:
            self._mark_unfinished()
        self._write()
        if self.ranks.rank == 0:
            shutil.rmtree(self.root, ignore_errors=True)
        failed = any(result["status"] == "failed" for result in self.results)
        return code or int(failed)

    def _prepare(self) -> None:
        request = self.request
        if self.ranks.rank == 0:
            shutil.rmtree(self.root, ignore_errors=True)
            self.root.mkdir()
        self.ranks.barrier()
        self.plan = Plan(
            model=request.model,
            precision=request.precision,
            fsdp=request.fsdp,
            tp=request.tp,
            device=request.device,
            local_rank=self.ranks.local_rank,
            state_only=request.state_only,
            step_seconds=request.step_seconds,
            batch=request.batch,
            length=request.length,
            seed=request.seed,
        )
        self.workload = Workload(self.plan)
        described_workload = self.document["workload"]
        described_workload["tensors"] = len(self.workload.state)
        described_workload["nbytes"] = self.workload.nbytes
        described_workload["nbytes_of_rank"] = self.ranks.gather(local_nbytes(self.workload.state))
        size = described_workload["nbytes"] / 1e9
        self.report(f"{request.model}, {described_workload['parallelism']}: {size:.3f} GB, {len(self.names)} engines")

    def _engine(self, name: str) -> None:
        kind = engine_class(name)
        reasons = [reason for reason in self.ranks.gather(kind.absent(self.request.device)) if reason]
        result = blank_result(name, kind)
        self.results.append(result)
        if reasons:
            result["status"], result["reason"] = "absent", reasons[0]
            self.report(f"{name}: absent, {reasons[0]}")
            self._write()
            return
        protocol = Protocol(
            pairs=self.request.pairs,
            saves=self.request.saves,
            cadences=self.request.cadences,
            interval_steps=self.request.interval_steps,
            checks=self.request.checks,
            kills=self.request.kills,
            seed=self.request.seed,
        )
        root = self.root / name
        if self.ranks.rank == 0:
            root.mkdir()
        self.ranks.barrier()
        measurement = Measurement(name, kind, self.workload, self.ranks, root, protocol, result, self._write)
        measurement.run()
        self.document["protocol"]["steps_per_block"] = max(
            self.document["protocol"]["steps_per_block"], measurement.steps_per_block_max
        )
        if measurement.step_seconds:
            self.document["workload"]["step_seconds"] = measurement.step_seconds
        if self.ranks.rank == 0:
            shutil.rmtree(root, ignore_errors=True)
        self._write()
        self.report(f"{name}: {_summary(result)}")

    def _mark_unfinished(self) -> None:
        for result in self.results:
            if result["status"] == "measured" and not measured_whole(result, self.request):
                result["status"], result["reason"] = "partial", "the run was stopped during this engine"
        known = {result["name"] for result in self.results}
        for name in self.names:
            if name not in known:
                result = blank_result(name, engine_class(name))
                result["status"], result["reason"] = "partial", "the run was stopped before this engine"
                self.results.append(result)

    def _write(self) -> None:
        if self.ranks.rank == 0:
            self.document["seconds"] = time.monotonic() - self.begin
            results.write(self.document, self.request.out, self.label)


def measured_whole(result: EngineResult, request: Request) -> bool:
    return len(result["cadences"]) == len(request.cadences) and all(
        len(cadence["stall_seconds"]) == request.pairs for cadence in result["cadences"]
    )


def _summary(result: EngineResult) -> str:
    if result["status"] == "failed":
        return f"failed, {result['reason']}"
    parts: list[str] = []
    for cadence in result["cadences"]:
        stalls = sorted(cadence["stall_seconds"])
        if stalls:
            median = stalls[len(stalls) // 2]
            parts.append(f"{cadence['name']} {median * 1e3:.1f} ms ({stalls[0] * 1e3:.1f} to {stalls[-1] * 1e3:.1f})")
    return f"stall per save: {', '.join(parts) or 'not measured'}"


def _silent(text: str) -> None:
    pass


def leave(code: int) -> NoReturn:
    """Ends this process without the interpreter's teardown, which would wait for engines that were interrupted."""
    for process in multiprocessing.active_children():
        process.kill()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
