"""What the disk can do, by way of doing I/O."""

from __future__ import annotations

from collections.abc import Sequence

from .bars import Bar, Row, bars_drawing
from .chart import Chart
from .documents import Measurement
from .drawing import Drawing
from .fields import Fields
from .quantity import Spread, format_bytes, format_rate, rate_axis
from .table import Table

__all__ = ["disk_chart", "limits_of", "rate_bar", "rate_range"]


def rate_range(spread: Spread) -> str:
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
            (rate_bar(spread, "s0" if probe.text("operation") == "write" else "s2", probe.text("operation")),),
        )
        for probe, spread in probes
        if spread
    ]
    cells = [
        [
            _probe_in_words(probe),
            *([format_rate(spread.median), rate_range(spread), str(spread.count)] if spread else ["–", "", "0"]),
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


def rate_bar(spread: Spread, css: str, label: str = "", beside: str = "") -> Bar:
    return Bar(label, (("", spread.median, css),), format_rate(spread.median), beside or rate_range(spread), spread)


def limits_of(disks: Sequence[Measurement]) -> dict[str, tuple[float, str]]:
    """The best median rate of each operation over all disk documents, and the probe that it is of."""
    best: dict[str, tuple[float, str]] = {}
    for probe in (probe for disk in disks for probe in disk.fields.items("probes")):
        spread, operation = Spread.of(probe.numbers("bytes_per_second")), probe.text("operation")
        if spread and spread.median > best.get(operation, (0.0, ""))[0]:
            best[operation] = (spread.median, _probe_name(probe))
    return best
