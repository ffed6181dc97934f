"""Numbers for people: three significant digits, a unit, and the spread of repeated measurements."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

__all__ = [
    "Spread",
    "compact_range",
    "format_bytes",
    "format_count",
    "format_named",
    "format_number",
    "format_rate",
    "format_seconds",
    "rate_axis",
    "seconds_axis",
]


@dataclass(frozen=True)
class Spread:
    """Median, smallest and largest of `count` measurements of the same quantity."""

    median: float
    low: float
    high: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread | None:
        return cls(median(values), min(values), max(values), len(values)) if values else None


def format_number(value: float, digits: int = 3) -> str:
    """1234567 as 1,230,000; 0.012345 as 0.0123; a minus sign that is one."""
    if value == 0 or not math.isfinite(value):
        return "0" if value == 0 else "–"
    rounded = round(value, digits - 1 - math.floor(math.log10(abs(value))))
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(rounded))))  # 0.9996 has become 1.00
    if decimals > 9:
        return f"{value:.2e}".replace("-", "−")
    return f"{rounded:,.{decimals}f}".replace("-", "−")


def _seconds_unit(value: float) -> tuple[float, str]:
    size = abs(value)
    if size == 0 or size >= 0.9995:
        return (1.0, "s")
    return (1e-3, "ms") if size >= 0.9995e-3 else (1e-6, "µs")


def _bytes_unit(value: float) -> tuple[float, str]:
    for factor, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if abs(value) >= 0.9995 * factor:
            return (factor, unit)
    return (1.0, "B")


def format_seconds(value: float | None) -> str:
    """ "12.3 ms", "1.23 s", "5 min 20 s", "3.5 h"."""
    if value is None:
        return "–"
    if abs(value) >= 3600:
        return f"{format_number(value / 3600)} h"
    if abs(value) >= 300:
        minutes, seconds = divmod(round(abs(value)), 60)
        return f"{'−' if value < 0 else ''}{minutes} min {seconds} s"
    factor, unit = _seconds_unit(value)
    return f"{format_number(value / factor)} {unit}"


def format_bytes(value: float | None) -> str:
    """Decimal units: a GB is 10⁹ bytes."""
    if value is None:
        return "–"
    factor, unit = _bytes_unit(value)
    return f"{format_number(value / factor)} {unit}"


def format_rate(value: float | None) -> str:
    return "–" if value is None else f"{format_bytes(value)}/s"


def format_count(value: float | None) -> str:
    return "–" if value is None else f"{value:,.0f}"


def format_named(name: str, value: float) -> str:
    """A number whose name says its unit, as all names in documents do."""
    if name.endswith("per_second"):
        return format_rate(value)
    if name.endswith("bytes") or "_bytes_" in name:
        return format_bytes(value)
    if name.endswith("seconds"):
        return format_seconds(value)
    return f"{value:,.6g}"


def compact_range(spread: Spread) -> str:
    """The spread of seconds, with one unit: "110–150 ms"; "" of a single measurement."""
    if spread.count < 2 or spread.high >= 300:
        return "" if spread.count < 2 else f"{format_seconds(spread.low)} – {format_seconds(spread.high)}"
    factor, unit = _seconds_unit(max(abs(spread.low), abs(spread.high)))
    low, high = (format_number(value / factor) for value in (spread.low, spread.high))
    return f"{low} to {high} {unit}" if spread.low < 0 else f"{low}–{high} {unit}"


def seconds_axis(high: float) -> Callable[[float], str]:
    """Writes values of an axis that ends at `high` seconds, all in one unit."""
    factor, unit = _seconds_unit(high)
    return lambda value: f"{_tick(value / factor)} {unit}"


def _tick(value: float) -> str:
    return f"{value:,.6g}".replace("-", "−")


def rate_axis(high: float) -> Callable[[float], str]:
    factor, unit = _bytes_unit(high)
    return lambda value: f"{_tick(value / factor)} {unit}/s"
