"""The rows of a plan: every engine on every size of the cluster."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from typing import Final

from ..results import ModelRow, Spread
from .figures import GPUS_MAX, Cluster
from .renewal import Timing, best_cadence_seconds, best_interval_steps, goodput, shares
from .simulation import simulate
from .stall_models import StallModel, timing_of
from .young_daly import daly_first_order_seconds, daly_seconds, young_seconds

__all__ = ["SIZES", "Row", "plan", "plan_row"]

SIZES: Final = (8, 64, 512, 1024, 4096, 16_384, 32_768, 100_000)

_PERIODS_MAX = 200  # failures of running training that one simulation sees
_PERIODS_MIN = 20
_SAVES_MAX = 100_000  # of one simulation, about two seconds


class Row(ModelRow):
    """A row of a model document, in full: times are seconds, shares parts of the run's time."""

    load_seconds: float
    cadence_seconds_young: float
    cadence_seconds_daly_first_order: float
    cadence_seconds: float  # whole steps: the one that goodput and what is below are for
    interval_steps: int
    goodput_at_young: float | None  # None: no cadence, there is no stall
    goodput_at_daly: float | None
    stall_share: float
    replay_share: float
    recovery_share: float
    replay_seconds_per_failure: float


def plan(
    cluster: Cluster,
    engines: Iterable[StallModel],
    sizes: Sequence[int] = SIZES,
    *,
    interval_steps: int | None = None,
    runs: int = 0,
    seed: int = 0,
) -> list[Row]:
    """A row for each engine and number of GPUs, in that order.

    With `interval_steps` that cadence instead of the best one. With `runs` each row is simulated so many times, with
    seeds from `seed` on, where at least one failure comes every few thousand saves.

    Raises:
        ValueError: a size, `interval_steps` or `runs` is out of range. ImportError: `runs` without simpy.
    """
    for gpus in sizes:
        if not 1 <= gpus <= GPUS_MAX:
            raise ValueError(f"{gpus} GPUs: must be 1 to {GPUS_MAX}")
        if gpus % cluster.replicas:
            raise ValueError(f"{gpus} GPUs cannot hold {cluster.replicas} replicas of each byte")
    if interval_steps is not None and interval_steps < 1:
        raise ValueError(f"interval_steps={interval_steps}: must be 1 or more")
    if runs < 0:
        raise ValueError(f"runs={runs}: must be 0 or more")
    return [
        plan_row(cluster, engine, gpus, interval_steps=interval_steps, runs=runs, seed=seed)
        for engine in engines
        for gpus in sizes
    ]


def plan_row(
    cluster: Cluster,
    engine: StallModel,
    gpus: int,
    *,
    interval_steps: int | None = None,
    runs: int = 0,
    seed: int = 0,
) -> Row:
    """One engine on one size of the cluster."""
    timing = timing_of(engine, cluster, gpus)
    steps = best_interval_steps(timing, cluster.step_seconds) if interval_steps is None else interval_steps
    cadence = steps * cluster.step_seconds
    parts = shares(timing, cadence)
    young, daly = young_seconds(timing), daly_seconds(timing)
    return {
        "engine": engine.name,
        "gpus": gpus,
        "hosts": cluster.hosts(gpus),
        "stall_seconds": timing.stall_seconds,
        "durable_seconds": timing.durable_seconds,
        "load_seconds": engine.load_seconds(cluster, gpus),
        "mtbf_seconds": timing.mtbf_seconds,
        "cadence_seconds_young": young,
        "cadence_seconds_daly_first_order": daly_first_order_seconds(timing),
        "cadence_seconds_young_daly": daly,
        "cadence_seconds_exact": best_cadence_seconds(timing),
        "cadence_seconds": cadence,
        "interval_steps": steps,
        "goodput": parts.goodput,
        "goodput_at_young": goodput(timing, young) if young > 0 else None,
        "goodput_at_daly": goodput(timing, daly) if daly > 0 else None,
        "stall_share": parts.stall,
        "replay_share": parts.replay,
        "recovery_share": parts.recovery,
        "replay_seconds_per_failure": parts.replay * timing.mtbf_seconds,
        "lost_seconds_per_failure": (parts.replay + parts.recovery) * timing.mtbf_seconds,
        "simulated_goodput": _simulated(timing, cadence, runs, seed) if runs else None,
    }


def _simulated(timing: Timing, cadence_seconds: float, runs: int, seed: int) -> Spread | None:
    """Goodput of `runs` runs: median, lowest, highest. None where thousands of saves pass between two failures: a run
    with enough failures would take minutes, and there the closed forms have nothing to be wrong about.
    """
    saves_per_failure = timing.mtbf_seconds / timing.cycle_seconds(cadence_seconds)
    periods = min(_PERIODS_MAX, int(_SAVES_MAX / saves_per_failure))
    if periods < _PERIODS_MIN:
        return None
    found = [
        simulate(timing, cadence_seconds, periods=periods, seed=seed + number).shares().goodput
        for number in range(runs)
    ]
    return {"median": statistics.median(found), "low": min(found), "high": max(found)}
