"""What saves cost a transformer that trains in bfloat16: step times with and without them, engine by engine.

A turn of an engine is a block of steps without saves, then one with a save at its first step, then the wait until that
is durable, off the clock. Turns of all engines alternate, and each is compared with the quiet steps just before it.

    exposed = step with the save, call, fence and all - median of the quiet steps
    whole   = sum over the steps with the save in flight of what they took beyond that median
    slow-down = median of the steps in flight after the first / median of the quiet steps
"""

from __future__ import annotations

import itertools
import math
import shutil
import statistics
import time
from collections.abc import Iterator
from typing import Any

import snapstone as ss
from snapstone.bench.engines import Engine, Setting, engine_class
from snapstone.bench.loop import ENGINE_ERRORS, Block, Saver, run_block, sync_file_system
from snapstone.bench.ranks import Ranks
from snapstone.bench.workload import Plan, Workload, local_nbytes

from .bench import Bench, NoRoom, spread
from .engines import register_all
from .scale import Training
from .tensors import staging_bytes

__all__ = ["measure"]

OWN = "snapstone"
# Of the state: an engine's copy in host memory and the file, which may be memory too; pinned memory in powers of two.
HOST_COPIES = {"snapstone": 2.1, "dcp-pinned": 3.2}
HOST_COPIES_OTHERS = 2.3


class Trainer(Workload):
    """Several micro-batches make a step, so that forward and backward take as long as they must."""

    micro_batches = 1
    stand_in: Any = None

    def compute(self) -> None:
        if self.stand_in is not None:
            self.stand_in.delay(self.plan.step_seconds)
            return
        for _ in range(self.micro_batches):
            super().compute()


def measure(bench: Bench) -> None:
    training = bench.scale.training[bench.part]
    register_all()
    rows: dict[str, Any] = {}
    bench.results.update({"workload": None, "engines": rows})

    def run() -> None:
        turns = _Turns(bench, training, rows)
        try:
            turns.run()
        finally:
            turns.close()

    bench.step("run", run, seconds=6)
    del bench.results["run"]
    fine = ("measured", "absent")  # not every machine has every engine
    bench.problems += [f"{name}: {row['reason']}" for name, row in rows.items() if row["status"] not in fine]
    bench.write()


class _Turns:
    def __init__(self, bench: Bench, training: Training, rows: dict[str, Any]) -> None:
        self.bench = bench
        self.training = training
        self.rows = rows
        for name in training.engines:
            rows[name] = {"status": "not run", "reason": "no time left", "turns": []}
        self.ranks = Ranks("cpu")  # one rank: gloo will do, for engines that want a group
        plan = Plan(
            model=training.model,
            precision="bf16",
            fsdp=1,
            tp=1,
            device="cuda",
            local_rank=0,
            state_only=bench.fake,  # the fake's torch has no backward: a pause, and then every tensor changes
            step_seconds=training.compute_seconds_min,
            batch=training.batch,
            length=training.length,
            seed=0,
        )
        self.workload = Trainer(plan)
        self.workload.stand_in = bench.stand_in
        self.nbytes = local_nbytes(self.workload.state)
        self.savers: dict[str, Saver] = {}
        self._seconds: dict[str, float] = {}  # of the last turn

    def run(self) -> None:
        self._describe(self._calibrate())
        self.bench.check_host_memory(int(2.1 * self.nbytes), "staging and files")
        self.directory = self.bench.place(int(1.1 * self.nbytes))
        begin = time.perf_counter()
        ss.prepare(self.bench.device, staging_bytes(self.workload.state))
        self.bench.results["workload"]["prepare_seconds"] = time.perf_counter() - begin
        self.bench.write()
        for name in self._order():
            if not self._runs(name):
                continue
            if not self._has_time(name):
                if not any(self._has_time(other) for other in self.training.engines if self._runs(other)):
                    break
                continue
            begin = time.perf_counter()
            self._guarded(name)
            self._seconds[name] = time.perf_counter() - begin
            self.bench.write()

    def _has_time(self, name: str) -> bool:
        """By its last turn; one that had none may take as long as the longest."""
        seconds = self._seconds.get(name, max(self._seconds.values(), default=0.0))
        return self.bench.left() > 1.3 * seconds + 1

    def _order(self) -> Iterator[str]:
        """Rounds without end, as long as an engine is left; the engine's own twice in each: most is asked of them."""
        names = self.training.engines
        own = [name for name in names if name.startswith(OWN)]
        for number in itertools.count():
            if not any(self._runs(name) for name in names) or (self.bench.fake and number == self.bench.scale.saves):
                return
            yield from names
            yield from own

    def _runs(self, name: str) -> bool:
        return self.rows[name]["status"] in ("measured", "not run")

    def _calibrate(self) -> list[float]:
        """Seconds of forward and backward, made long enough; then of whole steps."""
        run_block(self.workload, None, 2, 1)

        def compute() -> float:
            found = [self.bench.timed(self.workload.compute) for _ in range(3)]
            self.workload.optimizer.zero_grad(set_to_none=True)
            return statistics.median(found)

        seconds = compute()
        if not self.bench.fake and seconds < self.training.compute_seconds_min:
            self.workload.micro_batches = math.ceil(1.1 * self.training.compute_seconds_min / seconds)
            seconds = compute()
        self.compute_seconds = seconds
        return [step.total for step in run_block(self.workload, None, 5, 1).steps]

    def _describe(self, steps: list[float]) -> None:
        plan = self.workload.plan
        self.bench.results["workload"] = {
            "model": plan.model,
            "state_only": plan.state_only,
            "tensors": len(self.workload.state),
            "nbytes": self.nbytes,
            "batch": plan.batch,
            "length": plan.length,
            "micro_batches": self.workload.micro_batches,
            "compute_seconds": self.compute_seconds,
            "step_seconds": spread(steps),
        }

    def _guarded(self, name: str) -> None:
        row = self.rows[name]
        try:
            saver = self.savers.get(name) or self._open(name)
            if saver is not None:
                self._turn(name, saver)
        except NoRoom as error:
            row.update(status="no room", reason=str(error))
        except ENGINE_ERRORS as error:
            row.update(status="failed", reason=f"{type(error).__name__}: {' '.join(str(error).split())}"[:600])
        self._clear()

    def _open(self, name: str) -> Saver | None:
        kind = engine_class(name)
        row = self.rows[name]
        row.update(title=kind.title, version=kind.version(), options=list(kind.options))
        reason = kind.absent("cuda")
        if reason is not None:
            row.update(status="absent", reason=reason)
            return None
        if not name.startswith(OWN):
            copies = HOST_COPIES.get(name, HOST_COPIES_OTHERS)
            self.bench.check_host_memory(int(copies * self.nbytes), f"copies of {name}")
        setting = Setting(
            rank=0,
            world=1,
            device="cuda",
            nbytes_of_rank=self.nbytes,
            optimizer=self.workload.optimizer,
            group=self.ranks.new_group(),
            keep=2,
        )
        engine: Engine = kind(setting)
        saver = self.savers[name] = Saver(engine, self.workload, self.directory / name)
        saver.root.mkdir()
        row["first_save"] = self._save(saver, 2)
        self._clear()
        return saver

    def _save(self, saver: Saver, steps: int) -> dict[str, Any]:
        block: Block = run_block(self.workload, saver, steps, steps)
        if saver.error is not None:
            raise saver.error
        timed = [step for step in block.steps if not step.drain]
        return {
            "steps": [
                {key: getattr(step, key) for key in ("total", "call", "fence", "finalize", "in_flight")}
                for step in timed
            ],
            "drain": sum(step.total for step in block.steps if step.drain),
            "durable": block.durable_seconds[0] if block.durable_seconds else None,
        }

    def _turn(self, name: str, saver: Saver) -> None:
        steps = self.training.steps
        sync_file_system(self.directory)
        quiet = [step.total for step in run_block(self.workload, None, steps, 1).steps][1:]
        found = self._save(saver, steps)
        usual = statistics.median(quiet)
        totals = [step["total"] for step in found["steps"]]
        flying = [step["total"] for step in found["steps"] if step["in_flight"]]
        beside = flying[1:]
        row = self.rows[name]
        row["turns"].append(
            {
                "quiet": quiet,
                **found,
                "exposed": totals[0] - usual,
                "whole": sum(one - usual for one in flying),
                "slow_down": statistics.median(beside) / usual if beside else None,
            }
        )
        row.update(status="measured", reason=None, summary=_summary(row["turns"]))

    def _clear(self) -> None:
        """Checkpoints go, outside all clocks."""
        for saver in self.savers.values():
            for path in saver.root.iterdir():
                shutil.rmtree(path, ignore_errors=True)

    def close(self) -> None:
        for name, saver in self.savers.items():
            try:
                saver.engine.close()
            except ENGINE_ERRORS as error:
                self.bench.problems.append(f"{name} did not close: {type(error).__name__}: {error}")


def _summary(turns: list[dict[str, Any]]) -> dict[str, Any]:
    """Seconds, and the slow-down as a ratio."""
    first = [turn["steps"][0] for turn in turns]
    return {
        "exposed_stall": spread([turn["exposed"] for turn in turns]),
        "stall_of_all_steps_in_flight": spread([turn["whole"] for turn in turns]),
        "call": spread([step["call"] for step in first]),
        "fence": spread([step["fence"] for step in first]),
        "slow_down": spread([turn["slow_down"] for turn in turns if turn["slow_down"] is not None]),
        "quiet_step": spread([step for turn in turns for step in turn["quiet"]]),
        "durable": spread([turn["durable"] for turn in turns if turn["durable"] is not None]),
    }
