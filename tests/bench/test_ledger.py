"""The arithmetic of a pair: rows add up to the stall, and the delay of one rank is blamed on that rank."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from snapstone.bench.ledger import pair_of, walls_of
from snapstone.bench.loop import Block, StepTimes
from snapstone.bench.results import LEDGER_ROWS


def block(*steps: StepTimes) -> Block:
    return Block(list(steps), [], 0, None)


seconds = st.floats(0, 1)
step = st.builds(
    lambda rest, call, wait, fence, finalize, in_flight: StepTimes(
        rest + call + wait + fence + finalize, call, wait, fence, finalize, False, in_flight
    ),
    seconds,
    seconds,
    seconds,
    seconds,
    seconds,
    st.booleans(),
)


@given(st.lists(st.tuples(step, step, step, step), min_size=1, max_size=6), st.integers(1, 3), seconds)
def test_the_rows_of_a_pair_add_up_to_its_stall(
    steps: list[tuple[StepTimes, StepTimes, StepTimes, StepTimes]], saves: int, drain: float
) -> None:
    without = [block(*(one[rank] for one in steps)) for rank in (0, 1)]
    saving = [block(*(one[rank] for one in steps), StepTimes(drain, finalize=drain, drain=True)) for rank in (2, 3)]
    pair = pair_of(without, saving, saves)
    assert set(pair.rows) == set(LEDGER_ROWS)
    assert sum(pair.rows.values()) == pytest.approx(pair.stall, abs=1e-9)
    assert pair.stall == pytest.approx((sum(walls_of(saving)) - sum(walls_of(without))) / saves, abs=1e-9)


def test_the_rank_that_is_held_up_is_blamed_and_not_those_that_wait_for_it() -> None:
    quiet = [block(*(StepTimes(1.0) for _ in range(4)))] * 2
    held = block(StepTimes(3.0, call=2.0, saving=True, in_flight=True), *(StepTimes(1.0) for _ in range(3)))
    waiting = block(StepTimes(3.0, saving=True, in_flight=True), *(StepTimes(1.0) for _ in range(3)))
    pair = pair_of(quiet, [waiting, held], 1)
    assert pair.rows == pytest.approx({**dict.fromkeys(LEDGER_ROWS, 0.0), "call": 2.0})
    assert pair.stall == pytest.approx(2.0)


def test_slower_steps_are_inflation_only_while_a_save_is_in_flight() -> None:
    quiet = [block(StepTimes(1.0), StepTimes(1.0))]
    during = [block(StepTimes(1.5, in_flight=True), StepTimes(1.0))]
    after = [block(StepTimes(1.0, in_flight=True), StepTimes(1.5))]
    assert pair_of(quiet, during, 1).rows["inflation"] == pytest.approx(0.5)
    assert pair_of(quiet, after, 1).rows["unexplained"] == pytest.approx(0.5)
