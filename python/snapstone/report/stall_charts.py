"""Stall per save of each engine, and what it consists of."""

from __future__ import annotations

from collections.abc import Sequence

from ..bench.results import LEDGER_ROWS
from .bars import Bar, Row, bars_drawing
from .chart import WIDE, Chart
from .drawing import Drawing, text_width
from .engines import Cadence, Engine
from .palette import LEDGER_CLASSES
from .quantity import compact_range, format_seconds, seconds_axis
from .table import Table

__all__ = ["PART_NAMES", "ledger_chart", "stall_chart"]

PART_NAMES = {
    "call": "in the call",
    "wait_previous": "waiting for the save before",
    "fence": "at the fence",
    "finalize": "finalizing",
    "inflation": "slower steps until durable",
    "unexplained": "unexplained",
}


def stall_chart(identity: str, engines: Sequence[Engine]) -> Chart:
    """Bars from zero, the fastest first; failed engines have a red mark, absent ones are listed."""
    shown = [engine for engine in engines if engine.status != "absent"]
    absent = [engine for engine in engines if engine.status == "absent"]
    rows = [_stall_row(engine) for engine in shown]
    table = Table(
        "Stall per save",
        ("engine", "cadence", "median", "lowest", "highest", "pairs", "skipped saves", "status"),
        [cells for engine in engines for cells in _stall_cells(engine)],
        frozenset({2, 3, 4, 5, 6}),
    )

    def draw(name: str, width: float) -> Drawing:
        description = "; ".join(_in_words(engine) for engine in shown) or "no engine was measured"
        return bars_drawing(Drawing(name, "Stall per save, by engine", description, width), rows, seconds_axis)

    notes = []
    if absent:
        notes.append("Not installed here: " + ", ".join(f"{one.title} ({one.reason})" for one in absent) + ".")
    notes += [f"{one.title}: only part of it was measured: {one.reason}" for one in shown if one.status == "partial"]
    return Chart(
        identity,
        "Stall per save",
        "Wall time that one save adds to training, the final drain included. Bar: median of the A/B pairs; whisker: "
        "lowest to highest pair; dots: pairs. Shorter is better.",
        draw,
        (table,),
        tuple(notes),
    )


def _stall_row(engine: Engine) -> Row:
    if not engine.shown:
        return Row(engine.title, failure=engine.reason)
    return Row(engine.title, tuple(_stall_bar(one, css) for one, css in zip(engine.cadences, _shades(), strict=False)))


def _shades() -> list[str]:
    return ["s0", "s4", "s0 faint", "s4 faint"]


def _stall_bar(cadence: Cadence, css: str) -> Bar:
    if cadence.stall is None:
        return Bar(cadence.label, value="not measured", warning=cadence.warning)
    return Bar(
        cadence.label,
        (("", cadence.stall.median, css),),
        format_seconds(cadence.stall.median),
        compact_range(cadence.stall),
        cadence.stall,
        cadence.pairs[:50],
        cadence.warning,
    )


def _stall_cells(engine: Engine) -> list[list[str]]:
    status = engine.status if engine.status == "measured" else f"{engine.status}: {engine.reason}"
    if not engine.shown:
        return [[engine.title, "–", "–", "–", "–", "–", "–", status]]
    rows = []
    for one in engine.cadences:
        spread = one.stall
        numbers = [format_seconds(value) for value in (spread.median, spread.low, spread.high)] if spread else ["–"] * 3
        label = f"{one.name}, {one.label}"
        rows.append([engine.title, label, *numbers, str(len(one.pairs)), str(one.skipped), status])
    return rows


def _in_words(engine: Engine) -> str:
    if not engine.shown or engine.stall is None:
        return f"{engine.title}: failed, {engine.reason}"
    return f"{engine.title}: {format_seconds(engine.stall.median)}, {compact_range(engine.stall) or 'one measurement'}"


def ledger_chart(identity: str, engines: Sequence[Engine]) -> Chart | None:
    """Stacked bars of the ledger's parts; None when no engine has a ledger."""
    shown = [engine for engine in engines if engine.shown and any(one.ledger for one in engine.cadences)]
    if not shown:
        return None
    rows = [Row(one.title, tuple(_ledger_bar(cadence) for cadence in one.cadences if cadence.ledger)) for one in shown]
    cells = [
        [one.title, cadence.label, *(_part(cadence, part) for part in LEDGER_ROWS), _total(cadence)]
        for one in shown
        for cadence in one.cadences
        if cadence.ledger
    ]
    headers = ("engine", "cadence", *(PART_NAMES[part] for part in LEDGER_ROWS), "stall (median)")
    table = Table("Parts of the stall, median over pairs", headers, cells, frozenset(range(2, len(headers))))

    def draw(name: str, width: float) -> Drawing:
        parts = ", ".join(PART_NAMES.values())
        drawing = Drawing(name, "What the stall consists of", f"Stacked bars of: {parts}. Values in the table.", width)
        return _with_key(drawing, rows)

    return Chart(
        identity,
        "What the stall consists of",
        "Medians over the pairs of each part, seconds per save; as medians they need not add up exactly to the median "
        "stall. Parts below zero, such as steps that happened to be faster, lie left of the line. Grey is what no part "
        "explains.",
        draw,
        (table,),
    )


def _ledger_bar(cadence: Cadence) -> Bar:
    parts = tuple(
        (f"{PART_NAMES[part]}: {_part(cadence, part)}", cadence.ledger[part].median, LEDGER_CLASSES[part])
        for part in LEDGER_ROWS
        if part in cadence.ledger
    )
    return Bar(cadence.label, parts, _total(cadence), warning=cadence.warning)


def _part(cadence: Cadence, part: str) -> str:
    return format_seconds(cadence.ledger[part].median) if part in cadence.ledger else "–"


def _total(cadence: Cadence) -> str:
    return format_seconds(cadence.stall.median if cadence.stall else None)


def _with_key(drawing: Drawing, rows: Sequence[Row]) -> Drawing:
    """The parts' names in the order in which they are stacked, above the bars."""
    size = 12.0 if drawing.width >= WIDE else 11.0
    x, y = 0.0, 12.0
    for part in LEDGER_ROWS:
        width = 16 + text_width(PART_NAMES[part], size) + 14
        if x + width > drawing.width:
            x, y = 0.0, y + 20
        drawing.rect(x, y - 9, 10, 10, LEDGER_CLASSES[part], r=2)
        drawing.text(x + 16, y, PART_NAMES[part], "ink small" if size < 12 else "ink")
        x += width
    return bars_drawing(drawing, rows, seconds_axis, top=y + 12)
