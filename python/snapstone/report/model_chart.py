"""Goodput of the cluster model over the number of GPUs."""

from __future__ import annotations

import math
from collections.abc import Sequence

from .chart import WIDE, Chart
from .documents import Measurement
from .drawing import Drawing, fitted, text_width
from .fields import Fields
from .palette import SERIES_COUNT
from .quantity import format_count, format_named, format_number, format_seconds
from .scale import Scale
from .table import Table

__all__ = ["inputs_table", "model_chart"]

_HEIGHT = 300.0

Point = tuple[float, float]


def model_chart(identity: str, measurement: Measurement) -> Chart | None:
    """Lines of goodput, one per engine; None when the document has no row with one."""
    rows = measurement.fields.items("rows")
    series = _series(rows)
    if not series:
        return None

    def draw(name: str, width: float) -> Drawing:
        words = "; ".join(
            f"{engine}: {_percent(points[0][1])} at {format_count(points[0][0])} GPUs, {_percent(points[-1][1])} at "
            f"{format_count(points[-1][0])}"
            for engine, points in series
        )
        return _draw(Drawing(name, "Predicted goodput over the number of GPUs", words, width), series)

    return Chart(
        identity,
        "Predicted goodput",
        "A model, not a measurement: the share of time that training advances, saves and lost work taken off, at the "
        "best interval between saves. GPUs on a logarithmic axis; the goodput axis need not begin at zero.",
        draw,
        (_table(rows),),
    )


def inputs_table(measurement: Measurement) -> Table | None:
    """What the model was given, and where that is from. None when the document has no input."""
    inputs = measurement.fields.fields("inputs")
    sources = inputs.fields("sources")
    rows = []
    for name in inputs.names():
        number = inputs.number(name)
        value = inputs.text(name) if number is None else format_named(name, number)
        if value:
            rows.append([name.replace("_", " "), value, sources.text(name)])
    return Table("Inputs of the model", ("input", "value", "source"), rows, frozenset({1})) if rows else None


def _series(rows: Sequence[Fields]) -> list[tuple[str, list[Point]]]:
    """By engine, the best at its largest cluster first."""
    found: dict[str, list[Point]] = {}
    for row in rows:
        gpus, goodput = row.number("gpus"), row.number("goodput")
        if gpus is not None and gpus > 0 and goodput is not None:
            found.setdefault(" ".join(row.text("engine").split()) or "(no name)", []).append((gpus, goodput))
    ordered = [(engine, sorted(points)) for engine, points in found.items()]
    return sorted(ordered, key=lambda one: -one[1][-1][1])


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{format_number(100 * share)} %".replace(".0 %", " %")


def _table(rows: Sequence[Fields]) -> Table:
    cells = []
    for row in rows:
        simulated = row.fields("simulated_goodput")
        times = (
            "stall_seconds",
            "durable_seconds",
            "mtbf_seconds",
            "cadence_seconds_young_daly",
            "cadence_seconds_exact",
        )
        cells.append(
            [
                row.text("engine"),
                format_count(row.number("gpus")),
                *(format_seconds(row.number(name)) for name in times),
                _percent(row.number("goodput")),
                _percent(simulated.number("median")),
                format_seconds(row.number("lost_seconds_per_failure")),
            ]
        )
    headers = (
        "engine", "GPUs", "stall", "to durable", "between failures", "best interval, Young/Daly",
        "best interval, exact", "goodput", "goodput, simulated", "lost per failure",
    )  # fmt: skip
    return Table("Model of a cluster", headers, cells, frozenset(range(1, len(headers))))


def _draw(drawing: Drawing, series: Sequence[tuple[str, Sequence[Point]]]) -> Drawing:
    wide = drawing.width >= WIDE
    everything = [point for _, points in series for point in points]
    gpus = [math.log10(x) for x, _ in everything]
    low = min(y for _, y in everything)
    names = min(max(text_width(engine, 13) for engine, _ in series) + 64, 220.0 if wide else 130.0)
    x_scale = Scale(min(gpus), max(gpus) if max(gpus) > min(gpus) else min(gpus) + 1, 48, drawing.width - names - 8)
    bottom = max(0.0, math.floor(20 * low) / 20)
    y_scale = Scale(bottom, max(1.0, *(y for _, y in everything)), _HEIGHT, 12)
    _axes(drawing, x_scale, y_scale)
    labels: list[tuple[float, str, int]] = []
    for index, (engine, points) in enumerate(series):
        css = index % SERIES_COUNT
        places = [(x_scale(math.log10(x)), y_scale(y)) for x, y in points]
        drawing.polyline(places, f"series l{css}")
        for (x, y), (count, share) in zip(places, points, strict=True):
            drawing.circle(x, y, 3, f"s{css}", title=f"{engine}, {format_count(count)} GPUs: {_percent(share)}")
        labels.append((places[-1][1], f"{engine} {_percent(points[-1][1])}", css))
    last = -1e9
    for y, text, css in sorted(labels):  # names at the ends of their lines, pushed apart where these are close
        last = max(y, last + 16)
        drawing.text(x_scale.end + 10, last + 4, fitted(text, names - 4, 13), f"s{css}", title=text)
    drawing.height = max(_HEIGHT + 40, last + 12)
    return drawing


def _power(power: int) -> str:
    """1000 as 1k: on a phone the numbers of neighbours would touch."""
    return f"{10 ** (power % 3)}{('', 'k', 'M', 'G')[power // 3]}" if 0 <= power < 12 else f"1e{power}"


def _axes(drawing: Drawing, x_scale: Scale, y_scale: Scale) -> None:
    step = 0.05 if y_scale.high - y_scale.low <= 0.35 else 0.1 if y_scale.high - y_scale.low <= 0.6 else 0.2
    for index in range(round((y_scale.high - y_scale.low) / step) + 1):
        share = y_scale.low + index * step
        drawing.line(x_scale.begin, y_scale(share), x_scale.end, y_scale(share), "grid")
        drawing.text(x_scale.begin - 8, y_scale(share) + 4, _percent(share), "tick", anchor="end")
    for power in range(math.ceil(x_scale.low - 1e-9), math.floor(x_scale.high + 1e-9) + 1):
        drawing.line(x_scale(power), y_scale.end, x_scale(power), y_scale.begin, "grid")
        drawing.text(x_scale(power), _HEIGHT + 16, _power(power), "tick", anchor="middle")
    drawing.text(x_scale.end, _HEIGHT + 34, "GPUs", "tick", anchor="end")
