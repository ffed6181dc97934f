"""The closed forms against the simulation, which shares nothing with them but the meaning of its four inputs.

Seeds are fixed, so a test passes always or never. Intervals of single cases are those of 99.9 %, since there are many.
"""

from __future__ import annotations

import math
from dataclasses import astuple

import pytest

from snapstone.bench.cluster import Timing, best_cadence_seconds, first_order_goodput, goodput, shares, young_seconds

pytest.importorskip("simpy", reason="the simulation needs the package simpy")

from snapstone.bench.cluster import Simulated, simulate

Z_999 = 3.2905

CASES = {
    "rare failures": (Timing(5, 5, 60, 3600), 190.0),
    "durable long after the stall": (Timing(5, 100, 60, 3600), 190.0),
    "durable just before the next save": (Timing(5, 194, 60, 3600), 190.0),
    "saves that wait for each other": (Timing(5, 100, 60, 3600), 20.0),
    "saves that wait, and many failures": (Timing(2, 100, 60, 200), 30.0),
    "cadence as long as the mtbf": (Timing(30, 30, 10, 100), 100.0),
    "cadence of three mtbfs": (Timing(10, 20, 10, 100), 300.0),
    "time to durable as long as the mtbf": (Timing(1, 100, 10, 100), 120.0),
    "recovery longer than the mtbf": (Timing(10, 40, 500, 400), 100.0),
    "no stall": (Timing(0, 30, 300, 600), 30.0),
    "nothing but failures": (Timing(0, 0, 0, 50), 10.0),
    "stall longer than the cadence": (Timing(100, 150, 20, 500), 40.0),
}


def simulated(timing: Timing, cadence: float, *, periods: int | None = None, seed: int = 1) -> Simulated:
    """By default 2,000 to 20,000 failures of running training, the more the fewer saves lie between two of them."""
    if periods is None:
        periods = max(2000, min(20_000, int(40_000 * timing.cycle_seconds(cadence) / timing.mtbf_seconds)))
    return simulate(timing, cadence, periods=periods, seed=seed)


@pytest.mark.parametrize("name", CASES)
def test_the_exact_form_is_within_the_confidence_interval(name: str) -> None:
    timing, cadence = CASES[name]
    run = simulated(timing, cadence)
    error = run.goodput_error(Z_999)
    assert abs(run.shares().goodput - goodput(timing, cadence)) < error
    assert error < 0.08 * goodput(timing, cadence) + 0.005, "the interval says nothing"


@pytest.mark.parametrize("name", CASES)
def test_the_rest_of_the_time_goes_where_the_model_says(name: str) -> None:
    timing, cadence = CASES[name]
    run, expected = simulated(timing, cadence), shares(timing, cadence)
    for share, model in zip(astuple(run.shares()), astuple(expected), strict=True):
        assert share == pytest.approx(model, rel=0.06, abs=0.004)
    lost = (expected.replay + expected.recovery) * timing.mtbf_seconds
    assert run.lost_seconds_per_failure == pytest.approx(lost, rel=0.06, abs=1e-9)
    assert run.seconds / run.failures == pytest.approx(timing.mtbf_seconds, rel=0.06)


def test_the_confidence_interval_keeps_its_promise() -> None:
    """Of 200 intervals of 95 %, 190 should hold the exact value. Fewer than 180: once in 5,000 such tests."""
    timing, cadence = Timing(5, 60, 60, 600), 100.0
    exact = goodput(timing, cadence)
    runs = [simulated(timing, cadence, periods=200, seed=seed) for seed in range(200)]
    assert 180 <= sum(abs(run.shares().goodput - exact) <= run.goodput_error() for run in runs) <= 199


@pytest.mark.parametrize(
    ("timing", "cadence"),
    [
        (Timing(30, 30, 10, 100), 100.0),
        (Timing(10, 20, 10, 100), 300.0),
        (Timing(10, 40, 500, 400), 100.0),
        (Timing(5, 200, 60, 600), 250.0),
    ],
)
def test_the_first_order_is_off_where_the_simulation_says_so(timing: Timing, cadence: float) -> None:
    run = simulated(timing, cadence)
    measured, error = run.shares().goodput, run.goodput_error(Z_999)
    assert abs(measured - goodput(timing, cadence)) < error
    assert abs(measured - first_order_goodput(timing, cadence)) > 3 * error


@pytest.mark.parametrize("timing", [Timing(100, 100, 10, 100), Timing(0.1, 60, 30, 600)])
def test_the_exact_cadence_beats_youngs_in_the_simulation(timing: Timing) -> None:
    """A stall as long as the mtbf; a stall that is nothing beside the time to durable."""
    best = simulated(timing, best_cadence_seconds(timing))
    young = simulated(timing, young_seconds(timing))
    difference = best.shares().goodput - young.shares().goodput
    assert difference > best.goodput_error(Z_999) + young.goodput_error(Z_999)


def test_the_simulation_itself_finds_the_best_cadence() -> None:
    """Over a grid of cadences, none is better than the exact one by more than the noise."""
    timing = Timing(20, 60, 30, 300)
    best = simulated(timing, best_cadence_seconds(timing))
    for factor in (0.5, 0.7, 1.4, 2.0, 3.0):
        other = simulated(timing, best_cadence_seconds(timing) * factor)
        noise = best.goodput_error(Z_999) + other.goodput_error(Z_999)
        assert other.shares().goodput < best.shares().goodput + noise
    assert other.shares().goodput < best.shares().goodput - noise, "the grid's end is no worse: it says nothing"


def test_a_seed_gives_one_run() -> None:
    timing, cadence = CASES["rare failures"]
    first, again, other = (simulated(timing, cadence, periods=50, seed=seed) for seed in (7, 7, 8))
    assert first == again
    assert first != other


def test_what_is_kept_is_whole_saves() -> None:
    """Nothing between two saves is ever kept, and what is kept was worked for."""
    run = simulated(Timing(5, 100, 60, 600), 120.0, periods=300)
    for period in run.periods:
        assert period.kept / 120 == pytest.approx(round(period.kept / 120), abs=1e-6)
        assert period.kept <= period.worked + 1e-6
    assert any(period.kept for period in run.periods)
    assert run.failures > len(run.periods), "some failures struck a recovery"


def test_impossible_simulations_are_refused() -> None:
    timing = Timing(1, 1, 1, 100)
    with pytest.raises(ValueError, match="periods=1"):
        simulate(timing, 10, periods=1, seed=0)
    with pytest.raises(ValueError, match="infinite"):
        simulate(Timing(1, 1, 1, math.inf), 10, periods=10, seed=0)
    with pytest.raises(ValueError, match="cadence_seconds=0"):
        simulate(timing, 0, periods=10, seed=0)
