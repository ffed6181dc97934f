"""The stages inside a save of snapstone, from the trace that it writes when SNAPSTONE_TRACE is set."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

__all__ = ["STRETCHES_MAX", "InnerSpan", "condensed", "traced_saves"]

STRETCHES_MAX = 256  # of one stage in one lane: a large state has millions of requests, and a chart a thousand pixels


class InnerSpan(NamedTuple):
    """`begin`, `end`: seconds of `time.perf_counter`."""

    lane: str
    stage: str
    begin: float
    end: float
    nbytes: int


@contextmanager
def traced_saves() -> Iterator[list[InnerSpan]]:
    """The list has, when the block has ended, the stages of the saves that began and ended in it, on this rank."""
    spans: list[InnerSpan] = []
    before = os.environ.get("SNAPSTONE_TRACE")
    with tempfile.TemporaryDirectory(prefix="snapstone-bench-trace-") as directory:
        os.environ["SNAPSTONE_TRACE"] = os.path.join(directory, "trace.json")
        try:
            yield spans
        finally:
            if before is None:
                del os.environ["SNAPSTONE_TRACE"]
            else:
                os.environ["SNAPSTONE_TRACE"] = before
        found = [span for path in sorted(Path(directory).iterdir()) for span in _spans(json.loads(path.read_bytes()))]
    spans += condensed(found)


def _spans(events: list[dict[str, Any]]) -> Iterator[InnerSpan]:
    """The trace has microseconds of the monotonic clock, which on Linux is that of `time.perf_counter`."""
    for event in events:
        if event["cat"] == "save" and event["tid"] != "operation":
            begin = event["ts"] * 1e-6
            nbytes = int(event["args"]["bytes"])
            yield InnerSpan(event["tid"], event["name"], begin, begin + event["dur"] * 1e-6, nbytes)


def condensed(spans: Sequence[InnerSpan], stretches_max: int = STRETCHES_MAX) -> list[InnerSpan]:
    """By begin. What overlaps in one stage of one lane is one stretch; of too many those closest together are, too."""
    rows: dict[tuple[str, str], list[InnerSpan]] = {}
    for span in sorted(spans, key=lambda one: one.begin):
        row = rows.setdefault((span.lane, span.stage), [])
        if row and span.begin <= row[-1].end:
            row[-1] = _joined(row[-1], span)
        else:
            row.append(span)
    found = [span for row in rows.values() for span in _fewer(row, stretches_max)]
    return sorted(found, key=lambda one: one.begin)


def _fewer(row: list[InnerSpan], stretches_max: int) -> list[InnerSpan]:
    if len(row) <= stretches_max:
        return row
    gaps = sorted(range(1, len(row)), key=lambda place: row[place - 1].end - row[place].begin)  # the widest first
    cuts = [0, *sorted(gaps[: stretches_max - 1]), len(row)]
    fewer = []
    for begin, end in pairwise(cuts):
        stretch = row[begin]
        for span in row[begin + 1 : end]:
            stretch = _joined(stretch, span)
        fewer.append(stretch)
    return fewer


def _joined(first: InnerSpan, second: InnerSpan) -> InnerSpan:
    return first._replace(end=max(first.end, second.end), nbytes=first.nbytes + second.nbytes)
