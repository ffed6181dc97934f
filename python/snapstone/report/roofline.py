"""How close whole saves and loads come to what was measured of the hardware: the disk, and the links between ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .bars import Limit, Row, bars_drawing
from .chart import Chart
from .disk_charts import rate_bar, rate_range
from .documents import Measurement
from .drawing import Drawing
from .engines import Engine
from .quantity import Spread, format_number, format_rate, rate_axis
from .table import Table

__all__ = ["roofline_chart"]

# In the order of their rows, with the names of their limits.
_OPERATIONS = {
    "write": "disk, writing",
    "read": "disk, reading",
    "memory": "memory between ranks",
    "network": "between nodes",
}
_COLOURS = {"write": "s0", "read": "s2", "memory": "s3", "network": "s3"}
_ORDER = tuple(_OPERATIONS)
_READ_ONCE = ("scatter", "broadcast")  # strategies whose bytes come to a rank by a link


@dataclass(frozen=True)
class _Rate:
    """What an engine made of the hardware: bytes per second of whole saves or loads."""

    engine: str
    what: str
    operation: str
    spread: Spread


def roofline_chart(
    identity: str,
    stalls: Sequence[tuple[Measurement, Sequence[Engine]]],
    loads: Sequence[Measurement],
    limits: dict[str, tuple[float, str]],
) -> Chart | None:
    """Bytes per second of whole saves and loads under the measured limits; None without a limit or without a rate."""
    rates = [*_save_rates(stalls), *_load_rates(loads)]
    rates += [one for one in _arrival_rates(loads) if one.operation in limits]
    if not limits or not rates:
        return None
    rates.sort(key=lambda one: (_ORDER.index(one.operation), -one.spread.median))
    rows, cells = [], []
    for one in rates:
        limit = limits.get(one.operation)
        share = f"{format_number(100 * one.spread.median / limit[0])} % of the limit" if limit else "no limit known"
        css = _COLOURS[one.operation]
        rows.append(Row(one.engine, (rate_bar(one.spread, css, one.what, share),)))
        cells.append([one.engine, one.what, format_rate(one.spread.median), rate_range(one.spread), share])
    headers = ("engine", "operation", "median", "range", "share of the limit")
    lines = _lines([one.operation for one in rates], limits)
    if "d2h" in limits and all(
        measurement.environment("hardware").text("device") == "cuda" for measurement, _ in stalls
    ):
        lines += _device_line([one.operation for one in rates], limits["d2h"])

    def draw(name: str, width: float) -> Drawing:
        words = "; ".join(f"{row[0]}, {row[1]}: {row[2]}, {row[4]}" for row in cells)
        return bars_drawing(Drawing(name, "Rates under the measured limits", words, width), rows, rate_axis, lines)

    return Chart(
        identity,
        "Roofline: how close to the hardware",
        "Bytes of a checkpoint over its time to durable, or over the time of a load; of loads that read once, also the "
        "bytes that came to each rank. Dashed lines: what the disk and the links gave the best probe. A bar beyond its "
        "line was served from memory, or the hardware was slower when it was probed.",
        draw,
        (Table("Rates and limits", headers, cells, frozenset({2, 3, 4})),),
    )


def _lines(operations: Sequence[str], limits: dict[str, tuple[float, str]]) -> list[Limit]:
    """A limit across the rows of its operation, which stand together."""
    found = []
    for operation in dict.fromkeys(operations):
        if operation in limits:
            rate, probe = limits[operation]
            first = operations.index(operation)
            name = f"{_OPERATIONS.get(operation, operation)}: {format_rate(rate)} ({probe})"
            found.append(Limit(name, rate, first, first + operations.count(operation)))
    return found


def _device_line(operations: Sequence[str], limit: tuple[float, str]) -> list[Limit]:
    """Saves of a state on devices can be no faster than it leaves them."""
    saves = operations.count("write")
    return [Limit(f"device to host: {format_rate(limit[0])} ({limit[1]})", limit[0], 0, saves)] if saves else []


def _save_rates(stalls: Sequence[tuple[Measurement, Sequence[Engine]]]) -> list[_Rate]:
    found = []
    for measurement, engines in stalls:
        nbytes = measurement.fields.fields("workload").number("nbytes")
        for engine in engines if nbytes else ():
            times = next((one.durable for one in engine.cadences if one.durable and one.durable.low > 0), None)
            if nbytes and times and engine.shown:
                rates = Spread(nbytes / times.median, nbytes / times.high, nbytes / times.low, times.count)
                found.append(_Rate(engine.title, "save", "write", rates))
    return found


def _load_rates(loads: Sequence[Measurement]) -> list[_Rate]:
    found = []
    for one in (one for load in loads for one in load.fields.items("loads")):
        nbytes = one.number("bytes_read") or one.number("nbytes")
        rates = Spread.of([nbytes / seconds for seconds in one.numbers("seconds") if nbytes and seconds > 0])
        if rates and one.text("status") in ("measured", "partial"):
            engine = " ".join(one.text("engine").split()) or "(no name)"
            found.append(_Rate(engine, " ".join(f"load {one.text('strategy')}".split()), "read", rates))
    return found


def _arrival_rates(loads: Sequence[Measurement]) -> list[_Rate]:
    """Of loads in which ranks read for each other: bytes that each rank wanted over the time of the load."""
    found = []
    for load in loads:
        world = load.environment("world")
        ranks, nodes = world.number("ranks") or 1.0, world.number("nodes") or 1.0
        share = 1 / ranks if load.fields.fields("checkpoint").text("layout") == "sharded" else 1.0
        for one in load.fields.items("loads") if ranks > 1 else ():
            nbytes = (one.number("nbytes") or 0.0) * share
            rates = Spread.of([nbytes / seconds for seconds in one.numbers("seconds") if nbytes and seconds > 0])
            strategy = one.text("strategy")
            if rates and strategy in _READ_ONCE and one.text("status") in ("measured", "partial"):
                engine = " ".join(one.text("engine").split()) or "(no name)"
                operation = "network" if nodes > 1 else "memory"
                found.append(_Rate(engine, f"load {strategy}, to each rank", operation, rates))
    return found
