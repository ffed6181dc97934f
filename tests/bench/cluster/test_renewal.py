"""The exact form at its limits, and what must hold for every engine and cluster.

Invariants: shares are parts of 1; nothing that makes a cluster worse makes goodput better; the best cadence is best.
"""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from snapstone.bench.cluster import (
    Timing,
    best_cadence_seconds,
    best_interval_steps,
    daly_first_order_seconds,
    daly_seconds,
    first_order_goodput,
    goodput,
    shares,
    young_seconds,
)

PROPERTY = settings(max_examples=200, deadline=None)
NEVER = math.inf
SLACK = 1e-12  # of rounding, in a goodput

stalls = st.just(0.0) | st.floats(1e-9, 1e3)
longer = st.just(0.0) | st.floats(1e-9, 1e4)
cadences = st.floats(1e-2, 1e6)
mtbfs = st.floats(10, 1e9)
factors = st.floats(1, 100)


@st.composite
def timings(draw: st.DrawFn) -> Timing:
    stall = draw(stalls)
    return Timing(stall, stall + draw(longer), draw(longer), draw(mtbfs))


def changed(timing: Timing, **values: float) -> Timing:
    names = ("stall_seconds", "durable_seconds", "recovery_seconds", "mtbf_seconds")
    return Timing(**{name: values.get(name, getattr(timing, name)) for name in names})


def test_without_failures_only_the_stall_is_lost() -> None:
    assert goodput(Timing(5, 5, 300, NEVER), 95) == 0.95
    assert goodput(Timing(5, 40, 300, NEVER), 95) == 0.95
    assert goodput(Timing(5, 40, 300, 1e15), 95) == pytest.approx(0.95, abs=1e-9)
    assert shares(Timing(5, 40, 300, NEVER), 95).stall == pytest.approx(0.05)


def test_a_cadence_below_the_time_to_durable_waits_for_it() -> None:
    """Without failures a cycle is then the time to durable, of which only the cadence is training."""
    assert goodput(Timing(5, 40, 0, NEVER), 10) == 10 / 40
    assert goodput(Timing(5, 40, 0, NEVER), 35) == 35 / 40
    assert Timing(5, 40, 0, NEVER).shortest_cadence_seconds == 35


def test_free_saves_at_every_moment_lose_only_recoveries() -> None:
    """Up a share M / (M + V) of the time, V = M (exp(r / M) - 1) being the mean of recoveries that begin anew."""
    timing = Timing(0, 0, 500, 1000)
    mean_recovery = 1000 * math.expm1(0.5)
    assert goodput(timing, 1e-6) == pytest.approx(1000 / (1000 + mean_recovery), rel=1e-8)
    assert shares(timing, 1e-6).replay == pytest.approx(0, abs=1e-8)


def test_a_blocking_save_gives_dalys_model() -> None:
    """Daly, 2006: useful over wall time is the cadence over M exp(r / M) (exp((cadence + S) / M) - 1)."""
    expected = 200 / (1000 * math.exp(0.3) * math.expm1(0.25))
    assert goodput(Timing(50, 50, 300, 1000), 200) == pytest.approx(expected, rel=1e-12)


def test_failures_faster_than_saves_leave_nothing() -> None:
    assert goodput(Timing(5, 1000, 0, 1), 1000) < 1e-300
    assert shares(Timing(5, 1000, 0, 1), 1000).replay == pytest.approx(1)
    assert shares(Timing(5, 5, 10_000, 10), 100).recovery == 1


@PROPERTY
@given(timings(), cadences)
def test_shares_are_parts_of_one(timing: Timing, cadence: float) -> None:
    found = shares(timing, cadence)
    parts = (found.goodput, found.stall, found.replay, found.recovery)
    assert all(-SLACK <= part <= 1 + SLACK for part in parts)
    assert sum(parts) == pytest.approx(1, abs=1e-9)


@PROPERTY
@given(timings(), cadences, factors)
def test_worse_figures_never_give_better_goodput(timing: Timing, cadence: float, factor: float) -> None:
    before = goodput(timing, cadence) + SLACK
    assert goodput(changed(timing, mtbf_seconds=timing.mtbf_seconds / factor), cadence) <= before
    assert goodput(changed(timing, recovery_seconds=timing.recovery_seconds * factor), cadence) <= before
    assert goodput(changed(timing, durable_seconds=timing.durable_seconds * factor), cadence) <= before
    worse = changed(
        timing,
        stall_seconds=timing.stall_seconds * factor,
        durable_seconds=max(timing.durable_seconds, timing.stall_seconds * factor),
    )
    assert goodput(worse, cadence) <= before


@PROPERTY
@given(timings(), cadences)
def test_no_cadence_beats_the_best_one(timing: Timing, other: float) -> None:
    best = best_cadence_seconds(timing)
    assert best >= timing.shortest_cadence_seconds
    if best > 0:
        rival = max(other, timing.shortest_cadence_seconds)
        if rival > 0:
            assert goodput(timing, rival) <= goodput(timing, best) * (1 + 1e-9) + SLACK


@PROPERTY
@given(st.floats(1e-3, 1e3), st.floats(1e-12, 1e3), longer)
def test_the_best_cadence_solves_its_equation(mtbf: float, stall_share: float, recovery: float) -> None:
    """x = 1 - exp(-x - S / M), x being the cadence over M: the root of the derivative. Recovery is not in it."""
    stall = stall_share * mtbf
    x = best_cadence_seconds(Timing(stall, stall, recovery, mtbf)) / mtbf
    assert x == pytest.approx(-math.expm1(-x - stall_share), rel=1e-6)
    assert 0 < x <= 1
    assert best_cadence_seconds(Timing(stall, stall, 0, mtbf)) / mtbf == x


@PROPERTY
@given(timings(), st.floats(0.01, 100))
def test_the_best_number_of_steps_beats_its_neighbours(timing: Timing, step: float) -> None:
    steps = best_interval_steps(timing, step)
    found = goodput(timing, steps * step)
    assert steps >= 1
    assert steps * step >= timing.shortest_cadence_seconds * (1 - 1e-9)
    for other in (steps - 1, steps + 1, 2 * steps):
        if other >= 1 and other * step >= timing.shortest_cadence_seconds:
            assert goodput(timing, other * step) <= found * (1 + 1e-9) + SLACK


@PROPERTY
@given(st.floats(1e-10, 1e-4))
def test_young_and_daly_hold_for_stalls_far_below_the_mtbf(ratio: float) -> None:
    timing = Timing(ratio * 1e6, ratio * 1e6, 0, 1e6)
    best = best_cadence_seconds(timing)
    assert young_seconds(timing) == pytest.approx(best, rel=math.sqrt(ratio))
    assert daly_seconds(timing) == pytest.approx(best, rel=ratio)
    assert goodput(timing, young_seconds(timing)) == pytest.approx(goodput(timing, best), rel=ratio)


def test_young_is_off_where_the_mtbf_is_near_the_cadence() -> None:
    """A stall as long as the mean time between failures. Daly's higher order holds on for longer than Young's first."""
    timing = Timing(100, 100, 0, 100)
    best = best_cadence_seconds(timing)
    assert young_seconds(timing) == pytest.approx(141.42, abs=0.01)
    assert daly_seconds(timing) == pytest.approx(82.61, abs=0.01)
    assert best == pytest.approx(84.14, abs=0.01)
    assert goodput(timing, young_seconds(timing)) == pytest.approx(0.876 * goodput(timing, best), rel=1e-3)
    assert goodput(timing, daly_seconds(timing)) > 0.999 * goodput(timing, best)
    assert first_order_goodput(timing, best) < 0.25 * goodput(timing, best)
    assert daly_seconds(Timing(200, 200, 0, 100)) == 100
    assert daly_first_order_seconds(Timing(100, 100, 100, 100)) == 200


def test_young_does_not_know_the_time_to_durable() -> None:
    """A stall of 0.1 s and 60 s until durable: saves at Young's cadence wait for each other."""
    timing = Timing(0.1, 60, 300, 3600)
    assert young_seconds(timing) == pytest.approx(26.8, abs=0.1)
    assert best_cadence_seconds(timing) == pytest.approx(59.9)
    assert goodput(timing, young_seconds(timing)) < 0.5 * goodput(timing, best_cadence_seconds(timing))


@PROPERTY
@given(st.floats(0, 50), st.floats(0, 500), st.floats(0, 500), st.floats(600, 2000))
def test_the_first_order_is_the_limit_of_rare_failures(
    stall: float, more: float, recovery: float, cadence: float
) -> None:
    """What is left shrinks with the square of the failure rate."""
    errors = []
    for mtbf in (1e6, 1e7):
        timing = Timing(stall, stall + more, recovery, mtbf)
        errors.append(abs(goodput(timing, cadence) - first_order_goodput(timing, cadence)))
        assert errors[-1] <= (2 * (cadence + stall + more + recovery) / mtbf) ** 2 + 1e-14
    assert errors[1] <= errors[0] / 50 + 1e-13


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ((-1, 5, 5, 100), "stall_seconds=-1"),
        ((5, 4, 5, 100), "durable_seconds=4 is less than stall_seconds=5"),
        ((5, math.inf, 5, 100), "durable_seconds=inf"),
        ((5, 5, math.nan, 100), "recovery_seconds=nan"),
        ((5, 5, 5, 0), "mtbf_seconds=0"),
        ((5, 5, 5, math.nan), "mtbf_seconds=nan"),
    ],
)
def test_impossible_times_are_refused(values: tuple[float, float, float, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Timing(*values)


def test_a_cadence_that_is_none_is_refused() -> None:
    for cadence in (0, -1, math.inf, math.nan):
        with pytest.raises(ValueError, match="cadence_seconds"):
            goodput(Timing(1, 1, 1, 100), cadence)
    assert best_cadence_seconds(Timing(1, 1, 1, NEVER)) == math.inf
    with pytest.raises(ValueError, match="no cadence is best"):
        best_interval_steps(Timing(1, 1, 1, NEVER), 1)
