"""How long loads take, by engine and strategy."""

from __future__ import annotations

from .bars import Bar, Row, bars_drawing
from .chart import Chart
from .documents import Measurement
from .drawing import Drawing
from .fields import Fields
from .quantity import Spread, compact_range, format_bytes, format_rate, format_seconds, seconds_axis
from .table import Table

__all__ = ["load_chart"]


def load_chart(identity: str, measurement: Measurement) -> Chart | None:
    """Seconds from zero, the fastest first; None when the document has no load."""
    loads = [(load, Spread.of(load.numbers("seconds"))) for load in measurement.fields.items("loads")]
    if not loads:
        return None
    loads.sort(key=lambda one: (not _shown(*one), one[1].median if one[1] else 0.0, _name(one[0])))
    absent = [load for load, _ in loads if load.text("status") == "absent"]
    rows = [_row(load, spread) for load, spread in loads if load.text("status") != "absent"]

    def draw(name: str, width: float) -> Drawing:
        words = "; ".join(f"{row.name}: {row.failure or row.bars[0].value}" for row in rows)
        return bars_drawing(Drawing(name, "Time to load", words, width), rows, seconds_axis)

    return Chart(
        identity,
        "Time to load",
        "From the call until every tensor is filled, the slowest rank. Bar: median; whisker: fastest to slowest; dots: "
        "loads. Shorter is better.",
        draw,
        (_table(loads),),
        (f"Not installed here: {', '.join(f'{_name(one)} ({_reason(one)})' for one in absent)}.",) if absent else (),
    )


def _shown(load: Fields, spread: Spread | None) -> bool:
    return spread is not None and load.text("status") in ("measured", "partial")


def _name(load: Fields) -> str:
    return " ".join(f"{load.text('engine')} {load.text('strategy')}".split()) or "(no name)"


def _reason(load: Fields) -> str:
    return load.text("reason") or "no reason given"


def _rate(load: Fields, spread: Spread | None) -> str:
    nbytes = load.number("nbytes")
    return format_rate(nbytes / spread.median) if nbytes and spread and spread.median > 0 else ""


def _row(load: Fields, spread: Spread | None) -> Row:
    if spread is None or not _shown(load, spread):
        return Row(_name(load), failure=_reason(load))
    bar = Bar(
        _rate(load, spread),
        (("", spread.median, "s2"),),
        format_seconds(spread.median),
        compact_range(spread),
        spread,
        tuple(load.numbers("seconds")[:50]),
    )
    return Row(_name(load), (bar,))


def _table(loads: list[tuple[Fields, Spread | None]]) -> Table:
    cells = []
    for load, spread in loads:
        times = spread if _shown(load, spread) else None
        status = load.text("status")
        cells.append(
            [
                _name(load),
                format_seconds(times.median if times else None),
                compact_range(times) if times else "",
                str(times.count) if times else "0",
                _rate(load, times) or "–",
                format_bytes(load.number("nbytes")),
                format_bytes(load.number("bytes_read")),
                load.text("cold_by"),
                status if status == "measured" else f"{status}: {_reason(load)}",
            ]
        )
    headers = ("load", "median", "range", "runs", "rate", "bytes loaded", "bytes read", "cold by", "status")
    return Table("Time to load", headers, cells, frozenset({1, 2, 3, 4, 5, 6}))
