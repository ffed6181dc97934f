"""Numbers as people read them."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from snapstone.report.quantity import Spread, compact_range, format_bytes, format_number, format_rate, format_seconds
from snapstone.report.scale import Scale, ticks

FINITE = st.floats(-1e15, 1e15, allow_nan=False)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0 s"), (0.0000123, "12.3 µs"), (0.04567, "45.7 ms"), (0.9996, "1.00 s"), (1.234, "1.23 s"),
        (61.23, "61.2 s"), (320, "5 min 20 s"), (9000, "2.50 h"), (-0.012, "−12.0 ms"), (None, "–"),
    ],
)  # fmt: skip
def test_seconds_have_three_digits_and_a_unit(value: float | None, text: str) -> None:
    assert format_seconds(value) == text


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0 B"), (999, "999 B"), (2e9, "2.00 GB"), (999.9e6, "1.00 GB"), (1.5e13, "15.0 TB")]
)
def test_sizes_are_decimal(value: float, text: str) -> None:
    assert format_bytes(value) == text
    assert format_rate(value) == f"{text}/s"


@given(FINITE)
def test_three_digits_are_within_half_of_the_third(value: float) -> None:
    text = format_number(value)
    if "e" not in text:
        number = float(text.replace(",", "").replace("−", "-"))
        assert math.isclose(number, value, rel_tol=0.0051, abs_tol=1e-12)


def test_a_range_has_one_unit() -> None:
    assert compact_range(Spread(0.5, 0.25, 1.5, 5)) == "0.250–1.50 s"
    assert compact_range(Spread(0.005, -0.001, 0.01, 5)) == "−1.00 to 10.0 ms"
    assert compact_range(Spread(1, 1, 1, 1)) == ""


@given(FINITE, st.floats(1e-6, 1e12), st.integers(1, 12))
def test_ticks_lie_on_the_axis_in_even_steps(low: float, span: float, count: int) -> None:
    high = low + span
    found = ticks(low, high, count)
    assert len(found) <= 2.6 * count + 2
    slack = 1e-6 * max(abs(low), abs(high), span)
    assert all(low - slack <= tick <= high + slack for tick in found)
    if low <= 0 <= high and high > low:
        assert 0 in found


def test_a_scale_of_no_width_divides_by_nothing() -> None:
    assert Scale(1, 1, 10, 20)(1) == 10
