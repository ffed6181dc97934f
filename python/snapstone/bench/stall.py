"""One engine's measurement: first save, changed plan, truth, then A/B pairs at each cadence.

1. The first save of the process, cold, with the steps that it delays. Its checkpoint is checked, as is that of a
   second save, with the optimizer's steps following at once.
2. A save after a tensor was added to the state, and one after it was taken away.
3. A kill -9 of a rank during a save, in processes of their own.
4. Of an engine that tells its stages a save for the time line: noting them costs time, so it counts for nothing else.
5. Pairs: a block without saves, then a block with saves and the final drain, at the cadence "relaxed", whose interval
   is longer than the time to durable, and "tight", whose interval is shorter.

An engine that fails 1 to 3 is not timed.
"""

from __future__ import annotations

import math
import shutil
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from .counters import Sampler, merged
from .engines import Engine, Setting
from .engines.inner_stages import InnerSpan
from .ledger import Pair, cadence_of, pair_of, spread_of, strip_of, walls_of
from .loop import ENGINE_ERRORS, Block, Flight, Saver, StepTimes, described, run_block, sync_file_system
from .ranks import Ranks
from .results import EngineResult, SaveTimes, Span, Spread
from .truth import Check, Witness
from .workload import ADDED, Workload, digests, local_nbytes

__all__ = ["Measurement", "Protocol", "blank_result", "single_saves"]

BASELINE_STEPS = 5
RELAXED_FACTOR = 1.5  # of the time to durable
TIGHT_FACTOR = 0.5
INTERVAL_STEPS_MAX = 10_000


@dataclass(frozen=True, slots=True)
class Protocol:
    pairs: int
    saves: int  # in a block
    cadences: tuple[str, ...]
    interval_steps: int | None  # of "relaxed"; None: from the time to durable
    checks: int
    kills: int
    seed: int


class EngineFailed(Exception):
    """What an engine did wrong, in a line; it gets no time."""


def single_saves(checks: int) -> int:
    """How many saves of an engine come before its pairs, all of which stay until they were checked."""
    return 2 + max(1, checks - 1)


def blank_result(name: str, kind: type[Engine]) -> EngineResult:
    """An engine of which nothing is known yet."""
    return {
        "name": name,
        "title": kind.title,
        "version": kind.version(),
        "status": "measured",
        "reason": None,
        "options": list(kind.options),
        "syncs": kind.syncs,
        "truth": {"checks": 0, "failures": [], "kills": 0},
        "cadences": [],
        "first_save": None,
        "changed_plan_save": None,
        "counters": None,
        "timeline": [],
        "steps": [],
    }


class Measurement:
    """Called by all ranks; `result` is filled on all of them, and `keep` called whenever it has grown."""

    def __init__(
        self,
        name: str,
        kind: type[Engine],
        workload: Workload,
        ranks: Ranks,
        root: Path,
        protocol: Protocol,
        result: EngineResult,
        keep: Callable[[], None],
    ) -> None:
        self.name = name
        self.kind = kind
        self.workload = workload
        self.ranks = ranks
        self.root = root
        self.protocol = protocol
        self.result = result
        self.keep = keep
        self.steps_per_block_max = 0
        self.step_seconds: Spread | None = None
        self._durable: list[float] = []

    def run(self) -> None:
        """Errors of the engine end in `result`; those of the world, and Ctrl-C, are raised."""
        setting = Setting(
            rank=self.ranks.rank,
            world=self.ranks.world,
            device=self.workload.plan.device,
            nbytes_of_rank=local_nbytes(self.workload.state),
            optimizer=self.workload.optimizer,
            group=self.ranks.new_group(),
            keep=max(self.protocol.saves, self.protocol.checks + 2),  # those to check, and two with a changed plan
        )
        engine, error = None, None
        try:
            engine = self.kind(setting)
        except ENGINE_ERRORS as raised:
            error = raised
        try:
            self._agree("cannot be opened", described(error))
            assert engine is not None
            self._measure(engine)
        except EngineFailed as failure:
            self._fail(str(failure))
        finally:
            if engine is not None:
                engine.close()

    def _measure(self, engine: Engine) -> None:
        saver = Saver(engine, self.workload, self.root)
        witness = Witness(self.name, self.workload.plan, self.ranks, self.root, self.protocol.seed)
        baseline = self._baseline()
        self._first_saves(saver, witness)
        for _ in range(self.protocol.kills):
            self.result["truth"]["kills"] += 1
            self._judge(witness.kill(engine))
        self._prune()
        self._trace(saver)
        self._prune()
        self.keep()
        with Sampler() as sampler:
            for cadence in self.protocol.cadences:
                self._cadence(saver, cadence, self._interval(cadence, baseline))
        self.result["counters"] = merged(self.ranks.gather(sampler.counters))

    def _baseline(self) -> float:
        """Median seconds of a step without saves; the first steps warm up."""
        run_block(self.workload, None, 2, 1)
        return statistics.median(walls_of(self._blocks(run_block(self.workload, None, BASELINE_STEPS, 1))))

    def _first_saves(self, saver: Saver, witness: Witness) -> None:
        checks: list[Check] = []
        self.result["first_save"] = self._single(saver, checks)
        self.workload.change_plan(on=True)
        self.result["changed_plan_save"] = self._single(saver, None)
        self.workload.change_plan(on=False)
        for number in range(single_saves(self.protocol.checks) - 2):
            self._single(saver, checks if number < self.protocol.checks - 1 else None)
        if self.protocol.checks:
            checks = checks[: self.protocol.checks]
            self.result["truth"]["checks"] = len(checks)
            self._judge(witness.check(checks))

    def _single(self, saver: Saver, checks: list[Check] | None) -> SaveTimes:
        """One save with a step at once after its fence, then the drain. With `checks`, what it must be is noted."""
        expected = digests(self.workload.state) if checks is not None else {}
        sync_file_system(self.root)  # what is removed of another engine's checkpoints is no business of this one
        self.ranks.barrier()
        times = StepTimes()
        saver.finished.clear()
        saver.begin(times)
        begin = time.perf_counter()
        self.workload.compute()
        saver.fence(times)
        self.workload.update()
        self.workload.synchronize()
        times.total = time.perf_counter() - begin
        saver.drain(times)
        self._agree("a save failed", described(saver.error))
        skipped = not saver.finished
        if any(self.ranks.gather(skipped)):
            raise EngineFailed("a save that was alone was skipped")
        flight = saver.finished[0]
        if checks is not None:
            checks.append((flight.directory, expected))
        self.result["timeline"] = self._timeline(flight)  # the last of these saves is the one that stays
        waited = max(self.ranks.gather(times.call + times.fence))
        durable = max(self.ranks.gather(flight.durable - flight.begin))
        self._durable.append(durable)
        return {"call": waited, "durable": durable}

    def _trace(self, saver: Saver) -> None:
        """A time line with the engine's own stages, of an engine that tells them."""
        recording = saver.engine.traced()
        if recording is None:
            return
        durable = list(self._durable)
        with recording as inner:
            self._single(saver, None)
        self._durable = durable
        self.result["timeline"] = self._timeline(saver.finished[0], inner)

    def _timeline(self, flight: Flight, inner: Sequence[InnerSpan] = ()) -> list[Span]:
        """Of all ranks. With `inner` the stages of the engine take the place of "save", which says less."""
        nbytes = local_nbytes(self.workload.state)
        stages = [("training", "call", flight.begin, flight.called, nbytes)]
        if flight.fence_begin is not None and flight.fenced is not None:
            stages.append(("training", "fence", flight.fence_begin, flight.fenced, 0))
        if not inner:
            stages.append(("background", "save", flight.called, max(flight.called, flight.saved), nbytes))
        if not self.kind.syncs:
            stages.append(("background", "syncfs", flight.saved, flight.durable, 0))
        stages += inner
        own: list[Span] = [
            {
                "rank": self.ranks.rank,
                "lane": lane,
                "stage": stage,
                "begin": begin - flight.begin,
                "end": end - flight.begin,
                "nbytes": size,
            }
            for lane, stage, begin, end, size in stages
        ]
        return [span for spans in self.ranks.gather(own) for span in spans]

    def _interval(self, cadence: str, step_seconds: float) -> int:
        """Steps between saves, alike on all ranks: the saves that were alone tell the time to durable."""
        if cadence == "relaxed" and self.protocol.interval_steps is not None:
            return self.protocol.interval_steps
        steady = self._durable[-1] / step_seconds
        steps = math.ceil(steady * RELAXED_FACTOR) + 1 if cadence == "relaxed" else math.floor(steady * TIGHT_FACTOR)
        return min(max(steps, 1), INTERVAL_STEPS_MAX)

    def _cadence(self, saver: Saver, cadence: str, interval: int) -> None:
        interval = self.ranks.gather(interval)[0]
        steps = interval * self.protocol.saves
        self.steps_per_block_max = max(self.steps_per_block_max, steps)
        pairs: list[Pair] = []
        baselines: list[float] = []
        position = len(self.result["cadences"])
        for _ in range(self.protocol.pairs):
            without = self._blocks(self._quiet_block(None, steps, interval))
            saving = self._blocks(self._quiet_block(saver, steps, interval))
            self._agree("a save failed", next((block.error for block in saving if block.error), None))
            pairs.append(pair_of(without, saving, self.protocol.saves))
            baselines.extend(walls_of(without))
            self.result["cadences"][position:] = [cadence_of(cadence, interval, pairs)]
            if not self.result["steps"]:
                self.result["steps"] = strip_of(without, saving)
            self.step_seconds = spread_of(baselines)
            self._prune()
            self.keep()

    def _quiet_block(self, saver: Saver | None, steps: int, interval: int) -> Block:
        """After a sync, so that no block pays for what an earlier one left in the page cache."""
        sync_file_system(self.root)
        self.ranks.barrier()
        return run_block(self.workload, saver, steps, interval)

    def _blocks(self, own: Block) -> list[Block]:
        return [Block.of(values) for values in self.ranks.gather(own.as_values())]

    def _prune(self) -> None:
        """All checkpoints but the newest go, outside the clock."""
        self.ranks.barrier()
        if self.ranks.rank == 0:
            for path in sorted(self.root.glob("step-*"))[:-1]:
                shutil.rmtree(path)
            shutil.rmtree(self.root / "killed", ignore_errors=True)
        self.ranks.barrier()

    def _agree(self, what: str, problem: str | None) -> None:
        """EngineFailed on every rank when one has a problem."""
        problems = self.ranks.gather(problem)
        for rank, found in enumerate(problems):
            if found is not None:
                raise EngineFailed(f"{what}: {found}" + (f" (rank {rank})" if self.ranks.world > 1 else ""))

    def _judge(self, failures: list[str]) -> None:
        if failures:
            self.result["truth"]["failures"].extend(failures)
            raise EngineFailed(f"truth check: {failures[0]}")

    def _fail(self, reason: str) -> None:
        """A red mark, and no time."""
        self.result.update(
            {
                "status": "failed",
                "reason": reason,
                "cadences": [],
                "first_save": None,
                "changed_plan_save": None,
                "counters": None,
                "timeline": [],
                "steps": [],
            }
        )
        if ADDED in self.workload.state:
            self.workload.change_plan(on=False)
