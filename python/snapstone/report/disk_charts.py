"""What the disk can do, by way of doing I/O; and what the engines made of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .bars import Bar, Limit, Row, bars_drawing
from .chart import Chart
from .documents import Measurement
from .drawing import Drawing
from .engines import Engine
from .fields import Fields
from .quantity import Spread, format_bytes, format_number, format_rate, rate_axis
from .table import Table

__all__ = ["disk_chart", "limits_of", "roofline_chart"]

_OPERATIONS = {"write": "disk, writing", "read": "disk, reading"}


@dataclass(frozen=True)
class _Rate:
    """What an engine made of the hardware: bytes per second of whole saves or loads."""

    engine: str
    what: str
    operation: str
    spread: Spread


def _rate_range(spread: Spread) -> str:
    return f"{format_rate(spread.low)} – {format_rate(spread.high)}" if spread.count > 1 else ""


def _probe_name(probe: Fields) -> str:
    return " ".join(f"{probe.text('tool')} {probe.text('rung')}".split()) or "(no name)"


def _probe_in_words(probe: Fields) -> str:
    return f"{_probe_name(probe)}, {probe.text('operation') or 'no operation'}"


def disk_chart(identity: str, disk: Measurement) -> Chart | None:
    """Rates of all probes, the fastest first; None when there is none."""
    probes = [(probe, Spread.of(probe.numbers("bytes_per_second"))) for probe in disk.fields.items("probes")]
    if not probes:
        return None
    probes.sort(key=lambda one: (one[0].text("operation") != "write", -(one[1].median if one[1] else 0.0)))
    rows = [
        Row(
            _probe_name(probe),
            (_rate_bar(spread, "s0" if probe.text("operation") == "write" else "s2", probe.text("operation")),),
        )
        for probe, spread in probes
        if spread
    ]
    cells = [
        [
            _probe_in_words(probe),
            *([format_rate(spread.median), _rate_range(spread), str(spread.count)] if spread else ["–", "", "0"]),
            format_bytes(probe.number("nbytes")),
            probe.text("reason"),
        ]
        for probe, spread in probes
    ]
    headers = ("probe", "median", "range", "runs", "bytes", "absent because")
    absent = [
        f"{_probe_in_words(probe)} ({probe.text('reason') or 'no reason given'})"
        for probe, spread in probes
        if not spread
    ]

    def draw(name: str, width: float) -> Drawing:
        words = "; ".join(f"{row.name}, {row.bars[0].label}: {row.bars[0].value}" for row in rows) or "no probe ran"
        return bars_drawing(Drawing(name, "Rate of the disk, by way of doing I/O", words, width), rows, rate_axis)

    directory = disk.environment("storage").text("directory")
    return Chart(
        identity,
        f"The limit of the disk{f' at {directory}' if directory else ''}",
        "Sustained rate of large writes and reads, data synced. Bar: median; whisker: lowest to highest. Longer is "
        "better.",
        draw,
        (Table("Probes of the disk", headers, cells, frozenset({1, 2, 3, 4})),),
        (f"Not measured: {'; '.join(absent)}.",) if absent else (),
    )


def _rate_bar(spread: Spread, css: str, label: str = "", beside: str = "") -> Bar:
    return Bar(label, (("", spread.median, css),), format_rate(spread.median), beside or _rate_range(spread), spread)


def limits_of(disks: Sequence[Measurement]) -> dict[str, tuple[float, str]]:
    """The best median rate of each operation over all disk documents, and the probe that it is of."""
    best: dict[str, tuple[float, str]] = {}
    for probe in (probe for disk in disks for probe in disk.fields.items("probes")):
        spread, operation = Spread.of(probe.numbers("bytes_per_second")), probe.text("operation")
        if spread and spread.median > best.get(operation, (0.0, ""))[0]:
            best[operation] = (spread.median, _probe_name(probe))
    return best


def roofline_chart(
    identity: str,
    stalls: Sequence[tuple[Measurement, Sequence[Engine]]],
    loads: Sequence[Measurement],
    limits: dict[str, tuple[float, str]],
) -> Chart | None:
    """Bytes per second of whole saves and loads under the measured limits; None without a limit or without a rate."""
    rates = [*_save_rates(stalls), *_load_rates(loads)]
    if not limits or not rates:
        return None
    rates.sort(key=lambda one: (one.operation != "write", -one.spread.median))
    rows, cells = [], []
    for one in rates:
        limit = limits.get(one.operation)
        share = f"{format_number(100 * one.spread.median / limit[0])} % of the limit" if limit else "no limit known"
        css = "s0" if one.operation == "write" else "s2"
        rows.append(Row(one.engine, (_rate_bar(one.spread, css, one.what, share),)))
        cells.append([one.engine, one.what, format_rate(one.spread.median), _rate_range(one.spread), share])
    headers = ("engine", "operation", "median", "range", "share of the limit")
    lines = _lines([one.operation for one in rates], limits)

    def draw(name: str, width: float) -> Drawing:
        words = "; ".join(f"{row[0]}, {row[1]}: {row[2]}, {row[4]}" for row in cells)
        return bars_drawing(Drawing(name, "Rates under the measured limits", words, width), rows, rate_axis, lines)

    return Chart(
        identity,
        "Roofline: how close to the hardware",
        "Bytes of a checkpoint over its time to durable, or over the time of a load. Dashed lines: what the disk gave "
        "the best probe. A bar beyond its line was served from memory, or the disk was slower when it was probed.",
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
