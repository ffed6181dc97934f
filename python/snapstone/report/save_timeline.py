"""The time line of one save: a group for each rank, a lane for each stage."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .chart import WIDE, Chart
from .drawing import Drawing, fitted
from .engines import Engine
from .fields import Fields
from .palette import stage_class
from .quantity import format_bytes, format_seconds, seconds_axis
from .scale import Scale, ticks
from .table import Table

__all__ = ["Span", "spans_of", "timeline_chart"]

_RANKS_MAX = 8
_STAGES_MAX = 16


@dataclass(frozen=True)
class Span:
    """One event of one rank; times are seconds from the begin of the save."""

    rank: int
    lane: str
    stage: str
    begin: float
    end: float
    nbytes: float


def spans_of(fields: Fields) -> list[Span]:
    """The time line of an engine, by begin; events without a time or a rank are left out."""
    spans = []
    for one in fields.items("timeline"):
        rank, begin, end = (one.number(name) for name in ("rank", "begin", "end"))
        if rank is None or begin is None or end is None or end < begin:
            continue
        stage = " ".join(one.text("stage").split()) or "(no name)"
        lane = " ".join(one.text("lane").split()) or "lane"
        spans.append(Span(int(rank), lane, stage, begin, end, one.number("nbytes") or 0.0))
    return sorted(spans, key=lambda span: (span.begin, span.end))


@dataclass(frozen=True)
class _Lane:
    """One stage of one rank: its spans, and the busy stretches that they cover together."""

    rank: int
    stage: str
    spans: tuple[Span, ...]

    @property
    def begin(self) -> float:
        return self.spans[0].begin

    @property
    def end(self) -> float:
        return max(span.end for span in self.spans)

    def stretches(self, gap: float) -> list[tuple[float, float]]:
        """Spans that overlap, or lie closer together than `gap` seconds, as one."""
        found: list[tuple[float, float]] = []
        for span in self.spans:
            if found and span.begin <= found[-1][1] + gap:
                found[-1] = (found[-1][0], max(found[-1][1], span.end))
            else:
                found.append((span.begin, span.end))
        return found


def timeline_chart(identity: str, engine: Engine) -> Chart | None:
    """None when the document has no time line of this engine."""
    spans = spans_of(engine.fields)
    if not spans:
        return None
    ranks = _ranks(spans)
    shown = _chosen(ranks)
    lanes = {rank: _lanes(rank, ranks[rank]) for rank in ranks}
    rows = [_cells(lane) for rank in sorted(ranks) for lane in lanes[rank]]
    headers = ("rank", "stage", "begins", "ends", "busy", "events", "bytes")
    table = Table(f"Stages of one save with {engine.title}", headers, rows, frozenset({2, 3, 4, 5, 6}))

    def draw(name: str, width: float) -> Drawing:
        words = "; ".join(f"rank {rank} ends at {format_seconds(_end(ranks[rank]))}" for rank in shown)
        drawing = Drawing(name, f"One save with {engine.title}, by rank and stage", words, width)
        return _draw(
            drawing, [(rank, lanes[rank][:_STAGES_MAX]) for rank in shown], max(_end(ranks[rank]) for rank in shown)
        )

    notes = []
    if len(shown) < len(ranks):
        notes.append(
            f"{len(shown)} of {len(ranks)} ranks are drawn: the slowest half of them, the others evenly chosen."
        )
    return Chart(
        identity,
        f"One save, rank by rank: {engine.title}",
        "Time from the begin of the save. A lane is busy where at least one thread of the rank is in that stage.",
        draw,
        (table,),
        tuple(notes),
    )


def _ranks(spans: Sequence[Span]) -> dict[int, list[Span]]:
    ranks: dict[int, list[Span]] = {}
    for span in spans:
        ranks.setdefault(span.rank, []).append(span)
    return ranks


def _end(spans: Sequence[Span]) -> float:
    return max(span.end for span in spans)


def _chosen(ranks: dict[int, list[Span]]) -> list[int]:
    """All ranks, or of many the slowest and some of the others."""
    everyone = sorted(ranks)
    if len(everyone) <= _RANKS_MAX:
        return everyone
    half = _RANKS_MAX // 2
    slowest = sorted(everyone, key=lambda rank: -_end(ranks[rank]))[:half]
    others = [rank for rank in everyone if rank not in slowest]
    return sorted([*slowest, *(others[index * len(others) // half] for index in range(half))])


def _lanes(rank: int, spans: Sequence[Span]) -> list[_Lane]:
    """By first begin, so that a save reads from top left to bottom right."""
    stages: dict[str, list[Span]] = {}
    for span in spans:
        stages.setdefault(span.stage, []).append(span)
    return [_Lane(rank, stage, tuple(found)) for stage, found in stages.items()]


def _cells(lane: _Lane) -> list[str]:
    busy = sum(end - begin for begin, end in lane.stretches(0.0))
    times = [format_seconds(value) for value in (lane.begin, lane.end, busy)]
    return [str(lane.rank), lane.stage, *times, str(len(lane.spans)), format_bytes(sum(s.nbytes for s in lane.spans))]


def _draw(drawing: Drawing, groups: Sequence[tuple[int, Sequence[_Lane]]], end: float) -> Drawing:
    wide = drawing.width >= WIDE
    left = 150.0 if wide else 76.0
    begin = min((lane.begin for _, lanes in groups for lane in lanes), default=0.0)
    scale = Scale(min(begin, 0.0), max(end, 1e-9), left, drawing.width - 14)
    heights = [15.0 * len(lanes) + (12.0 if wide else 28.0) for _, lanes in groups]
    bottom = 4 + sum(heights)
    axis = seconds_axis(scale.high)
    for value in ticks(scale.low, scale.high, 6 if wide else 3):
        drawing.line(scale(value), 4, scale(value), bottom, "base" if value == 0 else "grid")
        anchor = "middle" if scale(value) + 20 < drawing.width else "end"
        drawing.text(scale(value), bottom + 15, axis(value), "tick", anchor=anchor)
    y = 4.0
    for (rank, lanes), height in zip(groups, heights, strict=True):
        _group(drawing, rank, lanes, scale, y, wide)
        y += height
        drawing.line(0, y - 5, drawing.width, y - 5, "rule")
    drawing.height = bottom + 22
    return drawing


def _group(drawing: Drawing, rank: int, lanes: Sequence[_Lane], scale: Scale, y: float, wide: bool) -> None:
    drawing.text(0, y + 12, f"rank {rank}", "name")
    if not wide:
        y += 16
    gap = (scale.high - scale.low) / (scale.end - scale.begin)  # of a pixel
    for lane in lanes:
        drawing.text(scale.begin - 8, y + 11, fitted(lane.stage, 76, 11), "muted small", anchor="end", title=lane.stage)
        drawing.rect(scale.begin, y + 2, scale.end - scale.begin, 11, "lane")
        what = f"rank {lane.rank}, {lane.stage}: {format_seconds(lane.begin)} to {format_seconds(lane.end)}"
        with drawing.group("stage", what):
            for begin, end in lane.stretches(gap):
                drawing.rect(scale(begin), y + 2, max(scale(end) - scale(begin), 1.2), 11, stage_class(lane.stage))
        y += 15
