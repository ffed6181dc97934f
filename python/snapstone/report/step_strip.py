"""The time of every training step in a row, with the saves marked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from .chart import WIDE, Chart
from .drawing import Drawing, fitted, wrapped
from .engines import Engine
from .quantity import Spread, compact_range, format_seconds, seconds_axis
from .scale import Scale, ticks
from .table import Table

__all__ = ["step_chart"]

_CLIPPED_AT_MEDIANS = 5.0  # one step of 20 s must not flatten all others; it is cut off, with its time written on it
_HEIGHT = 74.0


@dataclass(frozen=True)
class _Step:
    """One step, or the slowest of several that share a pixel."""

    number: int
    seconds: float
    saving: bool
    in_flight: bool


def step_chart(identity: str, engines: Sequence[Engine]) -> Chart | None:
    """One strip per engine, all on one scale; None when no document has steps."""
    strips = [(engine, steps) for engine in engines if engine.shown and (steps := _steps(engine))]
    if not strips:
        return None
    rows = [row for engine, steps in strips for row in _cells(engine, steps)]
    table = Table(
        "Step time by what was going on", ("engine", "steps", "count", "median", "range"), rows, frozenset({2, 3, 4})
    )
    top = _top([step.seconds for _, steps in strips for step in steps])

    def draw(name: str, width: float) -> Drawing:
        words = "; ".join(f"{row[0]}, {row[1]}: median {row[3]} of {row[2]} steps" for row in rows)
        return _draw(Drawing(name, "Step times with saves marked", words, width), strips, top)

    return Chart(
        identity,
        "Step times",
        "Each bar is one training step of one A/B pair, the slowest rank's time. Triangles mark steps that began a "
        "save. Bars cut off at the top carry their time.",
        draw,
        (table,),
    )


def _steps(engine: Engine) -> list[_Step]:
    found = []
    for number, one in enumerate(engine.fields.items("steps")):
        seconds = one.number("seconds")
        if seconds is not None and seconds >= 0:
            found.append(_Step(number, seconds, one.flag("saving"), one.flag("in_flight")))
    return found


def _top(seconds: Sequence[float]) -> float:
    return min(max(seconds), _CLIPPED_AT_MEDIANS * median(seconds)) or 1.0


def _cells(engine: Engine, steps: Sequence[_Step]) -> list[list[str]]:
    kinds = {
        "that begin a save": [step.seconds for step in steps if step.saving],
        "with a save in flight": [step.seconds for step in steps if step.in_flight and not step.saving],
        "without a save": [step.seconds for step in steps if not step.in_flight and not step.saving],
    }
    return [
        [engine.title, kind, str(spread.count), format_seconds(spread.median), compact_range(spread)]
        for kind, seconds in kinds.items()
        if (spread := Spread.of(seconds))
    ]


def _binned(steps: Sequence[_Step], count: int) -> list[_Step]:
    """At most `count` bars: neighbours become one as slow as the slowest, marked if one of them is."""
    if len(steps) <= count:
        return list(steps)
    found = []
    for index in range(count):
        some = steps[index * len(steps) // count : (index + 1) * len(steps) // count]
        slowest = max(some, key=lambda step: step.seconds)
        found.append(
            _Step(slowest.number, slowest.seconds, any(s.saving for s in some), any(s.in_flight for s in some))
        )
    return found


def _draw(drawing: Drawing, strips: Sequence[tuple[Engine, Sequence[_Step]]], top: float) -> Drawing:
    wide = drawing.width >= WIDE
    left = 150.0 if wide else 52.0
    y = _key(drawing)
    for engine, steps in strips:
        if wide:
            for number, line in enumerate(wrapped(engine.title, left - 56, 13, 3, bold=True)):
                drawing.text(0, y + 27 + 17 * number, line, "name", title=engine.title)
        else:
            drawing.text(0, y + 12, fitted(engine.title, drawing.width, 13, bold=True), "name", title=engine.title)
            y += 18
        _strip(drawing, _binned(steps, int((drawing.width - left) / 3)), Scale(0, top, y + _HEIGHT, y + 16), left)
        y += _HEIGHT + 20
    drawing.height = y
    return drawing


def _key(drawing: Drawing) -> float:
    drawing.polyline([(0, 3), (10, 3), (5, 11)], "s1", closed=True)
    drawing.text(15, 12, "begins a save", "small ink")
    drawing.rect(106, 2, 10, 10, "s1", r=2)
    drawing.text(121, 12, "save in flight", "small ink")
    drawing.rect(208, 2, 10, 10, "idle", r=2)
    drawing.text(223, 12, "no save", "small ink")
    return 24.0


def _strip(drawing: Drawing, steps: Sequence[_Step], scale: Scale, left: float) -> None:
    right = drawing.width - 6
    axis = seconds_axis(scale.high)
    for value in ticks(0, scale.high, 2):
        drawing.line(left, scale(value), right, scale(value), "base" if value == 0 else "grid")
        drawing.text(left - 6, scale(value) + 4, axis(value), "tick", anchor="end")
    pitch = min((right - left) / len(steps), 24.0)
    gap = 1.0 if pitch >= 3 else 0.3
    written_until = left
    for index, step in enumerate(steps):
        x = left + index * pitch
        clipped = step.seconds > scale.high * 1.001
        y = scale(min(step.seconds, scale.high))
        what = "begins a save" if step.saving else "save in flight" if step.in_flight else "no save"
        css = "s1" if step.saving or step.in_flight else "idle"
        title = f"step {step.number + 1}: {format_seconds(step.seconds)}, {what}"
        drawing.rect(x, y, max(pitch - gap, 0.8), scale.begin - y, css, title=title)
        if step.saving:
            middle = x + (pitch - gap) / 2
            drawing.polyline([(middle - 4, y - 8), (middle + 4, y - 8), (middle, y - 2)], "s1", closed=True)
        if clipped:
            drawing.rect(x - 1, y + 6, pitch - gap + 2, 2.5, "gap")  # a break in the bar
            if x >= written_until and x + 50 < drawing.width:
                drawing.text(x + pitch + 4, y + 4, format_seconds(step.seconds), "small ink")
                written_until = x + pitch + 54
