"""What carries bytes between ranks, and to their devices."""

from __future__ import annotations

from collections.abc import Sequence

from .bars import Row, bars_drawing
from .chart import Chart
from .disk_charts import rate_bar, rate_range
from .documents import Measurement
from .drawing import Drawing
from .fields import Fields
from .quantity import Spread, format_bytes, format_count, format_rate, rate_axis
from .table import Table

__all__ = ["link_chart", "link_limits_of"]

_NETWORK = ("gloo", "nccl")


def _name(link: Fields) -> str:
    return " ".join(f"{link.text('transport')} {link.text('operation')}".split()) or "(no name)"


def link_chart(identity: str, measurement: Measurement) -> Chart | None:
    """Rates of all links, the fastest first; None when there is none."""
    links = [(link, Spread.of(link.numbers("bytes_per_second"))) for link in measurement.fields.items("links")]
    if not links:
        return None
    links.sort(key=lambda one: -(one[1].median if one[1] else 0.0))
    rows = [Row(_name(link), (rate_bar(spread, "s3"),)) for link, spread in links if spread]
    cells = [
        [
            _name(link),
            *([format_rate(spread.median), rate_range(spread), str(spread.count)] if spread else ["–", "", "0"]),
            format_bytes(link.number("nbytes")),
            link.text("reason"),
        ]
        for link, spread in links
    ]
    headers = ("link", "median", "range", "runs", "bytes", "absent because")
    absent = [f"{_name(link)} ({link.text('reason') or 'no reason given'})" for link, spread in links if not spread]

    def draw(name: str, width: float) -> Drawing:
        words = "; ".join(f"{row.name}: {row.bars[0].value}" for row in rows) or "no link was measured"
        return bars_drawing(Drawing(name, "Rate of the links", words, width), rows, rate_axis)

    ranks = measurement.environment("world").number("ranks")
    return Chart(
        identity,
        f"The limit of the links{f' of {format_count(ranks)} ranks' if ranks and ranks > 1 else ''}",
        "Bytes that arrive at one rank, all ranks at once: over the seconds of the slowest. Bar: median; whisker: "
        "lowest to highest. Longer is better.",
        draw,
        (Table("Links", headers, cells, frozenset({1, 2, 3, 4})),),
        (f"Not measured: {'; '.join(absent)}.",) if absent else (),
    )


def link_limits_of(links: Sequence[Measurement]) -> dict[str, tuple[float, str]]:
    """The best median rate over all link documents, and the link that it is of: "memory" between the ranks of a node,
    "network" between nodes (measured with several), "d2h" from a device to its host.
    """
    best: dict[str, tuple[float, str]] = {}
    for measurement in links:
        nodes = measurement.environment("world").number("nodes") or 1.0
        for link in measurement.fields.items("links"):
            transport, operation = link.text("transport"), link.text("operation")
            spread = Spread.of(link.numbers("bytes_per_second"))
            kind = "network" if transport in _NETWORK and nodes > 1 else transport if transport == "memory" else ""
            kind = "d2h" if (transport, operation) == ("cuda", "d2h") else kind
            if kind and spread and spread.median > best.get(kind, (0.0, ""))[0]:
                best[kind] = (spread.median, _name(link))
    return best
