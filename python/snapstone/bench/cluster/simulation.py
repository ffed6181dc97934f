"""The same run as a discrete-event simulation, which knows none of the formulae.

Three SimPy processes: training, which recovers, works, and calls saves; one save at a time, which is durable later; and
failures, at any moment, which end both. Needs the package `simpy` (extra `bench`).
"""

from __future__ import annotations

import math
import random
from collections.abc import Generator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .renewal import Shares, Timing

if TYPE_CHECKING:
    from simpy import Environment, Process

    Events = Generator[Any, Any, None]

__all__ = ["Period", "Simulated", "simulate"]

_NORMAL_95 = 1.959964  # two-sided


@dataclass(slots=True)
class Period:
    """Seconds between two failures that struck running training: one or more recoveries, then uptime."""

    recovery: float = 0.0
    stall: float = 0.0
    worked: float = 0.0
    kept: float = 0.0  # of `worked`: durable when the failure came

    @property
    def seconds(self) -> float:
        return self.recovery + self.stall + self.worked


@dataclass(frozen=True, slots=True)
class Simulated:
    """What one simulation saw."""

    periods: list[Period]
    failures: int

    @property
    def seconds(self) -> float:
        return sum(period.seconds for period in self.periods)

    def shares(self) -> Shares:
        total = self.seconds
        kept = sum(period.kept for period in self.periods) / total
        stall = sum(period.stall for period in self.periods) / total
        recovery = sum(period.recovery for period in self.periods) / total
        return Shares(kept, stall, 1 - kept - stall - recovery, recovery)

    def goodput_error(self, z: float = _NORMAL_95) -> float:
        """Half the width of goodput's confidence interval, 95 % by default: that of a ratio of means of periods."""
        count, ratio = len(self.periods), self.shares().goodput
        squares = sum((period.kept - ratio * period.seconds) ** 2 for period in self.periods)
        return z * math.sqrt(squares / (count * (count - 1))) / (self.seconds / count)

    @property
    def lost_seconds_per_failure(self) -> float:
        """Restart, load and training done again, over all failures, those during a recovery included."""
        lost = sum(period.recovery + period.worked - period.kept for period in self.periods)
        return lost / self.failures


def simulate(timing: Timing, cadence_seconds: float, *, periods: int, seed: int) -> Simulated:
    """Runs until `periods` failures, two or more, struck running training. The same seed gives the same run.

    Raises:
        ValueError: fewer than two periods, no failures, or a cadence that is not positive. ImportError: no simpy.
    """
    if periods < 2:
        raise ValueError(f"periods={periods}: a simulation needs two or more")
    if math.isinf(timing.mtbf_seconds):
        raise ValueError("mtbf_seconds is infinite: a simulation ends with a failure")
    if not 0 < cadence_seconds < math.inf:
        raise ValueError(f"cadence_seconds={cadence_seconds}: must be more than 0 and finite")
    try:
        import simpy
    except ImportError as error:
        raise ImportError("the simulation needs the package simpy: pip install 'snapstone[bench]'") from error
    environment = simpy.Environment()
    run = _Run(environment, timing, cadence_seconds, random.Random(seed))
    run.training = environment.process(run.train(periods))
    environment.process(run.fail())
    environment.run(until=run.training)
    return Simulated(run.periods, run.failures)


@dataclass(slots=True)
class _Run:
    environment: Environment
    timing: Timing
    cadence_seconds: float
    random: random.Random
    training: Process | None = None
    saving: Process | None = None
    position: float = 0.0  # seconds of training behind the state in memory
    durable: float = 0.0  # and behind the newest durable checkpoint
    failures: int = 0
    periods: list[Period] = field(default_factory=list)

    def fail(self) -> Events:
        while True:
            yield self.environment.timeout(self.random.expovariate(1 / self.timing.mtbf_seconds))
            self.failures += 1
            for victim in (self.training, self.saving):
                if victim is not None and victim.is_alive:
                    victim.interrupt()

    def train(self, periods: int) -> Events:
        while len(self.periods) < periods:
            period, durable_before = Period(), self.durable
            yield from self._recover(period)
            self.position = self.durable
            yield from self._work_until_failure(period)
            period.kept = self.durable - durable_before
            self.periods.append(period)

    def _recover(self, period: Period) -> Events:
        from simpy import Interrupt

        while True:
            begin = self.environment.now
            try:
                yield self.environment.timeout(self.timing.recovery_seconds)
                return
            except Interrupt:
                continue
            finally:
                period.recovery += self.environment.now - begin

    def _work_until_failure(self, period: Period) -> Events:
        from simpy import Interrupt

        try:
            while True:
                yield from self._work(period)
                yield from self._hold(period)
        except Interrupt:
            self.saving = None

    def _work(self, period: Period) -> Events:
        begin = self.environment.now
        try:
            yield self.environment.timeout(self.cadence_seconds)
        finally:
            done = self.environment.now - begin
            self.position += done
            period.worked += done

    def _hold(self, period: Period) -> Events:
        """The wait for the previous save, the next save's call, and its stall."""
        begin = self.environment.now
        try:
            if self.saving is not None and self.saving.is_alive:
                yield self.saving
            self.saving = self.environment.process(self._save(self.position))
            yield self.environment.timeout(self.timing.stall_seconds)
        finally:
            period.stall += self.environment.now - begin

    def _save(self, position: float) -> Events:
        from simpy import Interrupt

        try:
            yield self.environment.timeout(self.timing.durable_seconds)
            self.durable = position
        except Interrupt:
            return
