"""Horizontal bars from zero: of one value, or stacked; with whisker, single measurements, limits, and red marks.

On a wide screen names stand left of the bars, on a narrow one above them. A value is written beside its bar, so that
nothing has to be read off the axis.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .chart import WIDE
from .drawing import Drawing, fitted, text_width, wrapped
from .quantity import Spread
from .scale import Scale, ticks

__all__ = ["Bar", "Limit", "Row", "bars_drawing"]


@dataclass(frozen=True)
class Bar:
    """`parts` are (name, value, CSS class), stacked from zero: positive ones to the right, negative to the left."""

    label: str
    parts: tuple[tuple[str, float, str], ...] = ()
    value: str = ""
    range: str = ""
    spread: Spread | None = None
    points: tuple[float, ...] = ()
    warning: str = ""

    @property
    def low(self) -> float:
        return min(sum(min(value, 0.0) for _, value, _ in self.parts), self.spread.low if self.spread else 0.0)

    @property
    def high(self) -> float:
        return max(sum(max(value, 0.0) for _, value, _ in self.parts), self.spread.high if self.spread else 0.0)


@dataclass(frozen=True)
class Row:
    """What belongs to one name: its bars, or the reason why it failed."""

    name: str
    bars: tuple[Bar, ...] = ()
    failure: str = ""


@dataclass(frozen=True)
class Limit:
    """A dashed line across rows `first` to `last` (excluded), which are compared with it."""

    name: str
    value: float
    first: int
    last: int


@dataclass(frozen=True)
class _Frame:
    """Where things stand. Bars lie between the pixels of `scale`; their text is to the right, or above when narrow."""

    wide: bool
    scale: Scale
    label_end: float
    text_begin: float
    range_begin: float
    width: float


def bars_drawing(
    drawing: Drawing,
    rows: Sequence[Row],
    axis: Callable[[float], Callable[[float], str]],
    limits: Sequence[Limit] = (),
    *,
    top: float = 0.0,
) -> Drawing:
    """Draws `rows` in their order, below `top`; `axis` is of `quantity`."""
    frame = _frame(drawing.width, rows, limits)
    y = top = top + 6.0
    placed: list[tuple[Row, float]] = []
    names: dict[int, float] = {}
    for number, row in enumerate(rows):
        for index, limit in enumerate(limits):
            if limit.first == number:
                names[index] = y + 10
                y += 20.0
        placed.append((row, y))
        y += _height(row, frame)
    _axis(drawing, frame, axis(max(abs(frame.scale.low), frame.scale.high)), top, y)
    for index, begin in names.items():
        last = limits[index].last
        _limit(drawing, frame, limits[index], begin, placed[last][1] if last < len(placed) else y)
    for row, begin in placed:
        _row(drawing, frame, row, begin)
    drawing.height = y + 22
    return drawing


def _frame(width: float, rows: Sequence[Row], limits: Sequence[Limit]) -> _Frame:
    bars = [bar for row in rows for bar in row.bars]
    high = max([bar.high for bar in bars] + [limit.value for limit in limits], default=0.0)
    low = min([bar.low for bar in bars], default=0.0)
    if high <= low:
        high = low + 1.0
    wide = width >= WIDE
    if not wide:
        return _Frame(False, Scale(low, high, 4, width - 12), 0, 0, 0, width)
    names = min(max((text_width(row.name, 13, bold=True) for row in rows), default=0) + 14, 320)
    labels = min(max((text_width(bar.label, 11) for bar in bars), default=0) + 10, 130)
    values = max((text_width(bar.value, 13, bold=True) for bar in bars), default=60) + 8
    ranges = max((text_width(bar.range, 11) for bar in bars), default=0)
    begin = names + labels
    text_begin = max(width - values - ranges, begin + 200)
    return _Frame(True, Scale(low, high, begin, text_begin - 12), begin - 8, text_begin, text_begin + values, width)


def _height(row: Row, frame: _Frame) -> float:
    if row.failure:
        return 42.0 if frame.wide else 58.0
    each = (20.0 if frame.wide else 32.0) * len(row.bars) + 16.0 * sum(1 for bar in row.bars if bar.warning)
    return each + (14.0 if frame.wide else 30.0)


def _axis(drawing: Drawing, frame: _Frame, axis: Callable[[float], str], top: float, bottom: float) -> None:
    scale = frame.scale
    last_end = -1e9
    for value in ticks(scale.low, scale.high, 5 if frame.wide else 3):
        x = scale(value)
        drawing.line(x, top, x, bottom, "base" if value == 0 else "grid")
        text = axis(value)
        half = text_width(text, 11) / 2
        anchor, begin = ("middle", x - half)
        if begin < 0:
            anchor, begin = ("start", x)
        elif x + half > frame.width:
            anchor, begin = ("end", x - 2 * half)
        if begin > last_end + 8:
            drawing.text(x, bottom + 15, text, "tick", anchor=anchor)
            last_end = begin + 2 * half


def _row(drawing: Drawing, frame: _Frame, row: Row, y: float) -> None:
    name_width = frame.label_end if frame.wide else frame.width
    if frame.wide:
        widest = max((text_width(bar.label, 11) for bar in row.bars), default=0.0)
        name_width = frame.label_end - (widest + 8 if widest else 0)
    drawing.text(0, y + 14, fitted(row.name, name_width, 13, bold=True), "name", title=row.name)
    if not frame.wide:
        y += 20
    if row.failure:
        _failure(drawing, frame, row, y)
        return
    for bar in row.bars:
        y = _bar(drawing, frame, row, bar, y)


def _failure(drawing: Drawing, frame: _Frame, row: Row, y: float) -> None:
    """A red cross where the bar would begin, and the reason: no time is shown for an engine that failed."""
    x, middle = frame.scale(max(0.0, frame.scale.low)) + 9, y + 10
    with drawing.group("failure", row.failure):
        drawing.line(x - 5, middle - 5, x + 5, middle + 5, "cross")
        drawing.line(x - 5, middle + 5, x + 5, middle - 5, "cross")
        for number, line in enumerate(wrapped(row.failure, frame.width - x - 18, 13, 2)):
            drawing.text(x + 14, y + 15 + 16 * number, line, "bad")


def _bar(drawing: Drawing, frame: _Frame, row: Row, bar: Bar, y: float) -> float:
    if frame.wide:
        if bar.label:
            drawing.text(frame.label_end, y + 13, bar.label, "muted small", anchor="end")
        top, height = y + 2.0, 14.0
        drawing.text(frame.text_begin, y + 14, bar.value, "value")
        drawing.text(frame.range_begin, y + 13, bar.range, "muted small")
        after = y + 20
    else:
        drawing.text(0, y + 12, bar.label, "muted small")
        end = frame.width
        drawing.text(end, y + 12, bar.range, "muted small", anchor="end")
        drawing.text(end - text_width(bar.range, 11) - 8, y + 12, bar.value, "value", anchor="end")
        top, height = y + 17.0, 11.0
        after = y + 32
    with drawing.group("bar", f"{row.name} {bar.label}: {bar.value} {bar.range}".strip()):
        _parts(drawing, frame, bar, top, height)
    if bar.warning:
        x = frame.scale(max(0.0, frame.scale.low))
        drawing.text(x, after + 9, fitted("✕ " + bar.warning, frame.width - x, 11), "bad small", title=bar.warning)
        after += 16
    return after


def _parts(drawing: Drawing, frame: _Frame, bar: Bar, top: float, height: float) -> None:
    scale = frame.scale
    right = left = 0.0
    for name, value, css in bar.parts:
        begin = right if value >= 0 else left
        end = begin + value
        x, width = min(scale(begin), scale(end)), abs(scale(end) - scale(begin))
        gap = 1.0 if len(bar.parts) > 1 and width > 3 else 0.0  # stacked parts stay apart without their colours
        if value or len(bar.parts) == 1:
            drawing.rect(x, top, max(width - gap, 1.5 if len(bar.parts) == 1 else 0.0), height, css, title=name, r=1.5)
        right, left = (end, left) if value >= 0 else (right, end)
    middle = top + height / 2
    if bar.spread and bar.spread.count > 1:
        x1, x2 = scale(bar.spread.low), scale(bar.spread.high)
        drawing.line(x1, middle, x2, middle, "whisker")
        for x in (x1, x2):
            drawing.line(x, middle - 4, x, middle + 4, "whisker")
    for point in bar.points:
        drawing.circle(scale(point), middle, 2.4, "dot")


def _limit(drawing: Drawing, frame: _Frame, limit: Limit, y: float, bottom: float) -> None:
    x = frame.scale(limit.value)
    drawing.line(x, y + 4, x, bottom - 6, "limit")
    name = fitted(limit.name, frame.width, 11)
    x = min(max(x, text_width(name, 11)), frame.width)
    drawing.text(x, y, name, "limit-name small", anchor="end")
