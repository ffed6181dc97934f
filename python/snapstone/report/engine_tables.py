"""Everything that a stall document says of its engines, in tables."""

from __future__ import annotations

from collections.abc import Sequence

from .engines import Cadence, Engine
from .fields import Fields
from .quantity import Spread, compact_range, format_bytes, format_count, format_rate, format_seconds
from .table import Table

__all__ = ["SYNCFS_NOTE", "counters_table", "engine_table", "options_table", "summary_table", "truth_table"]

SYNCFS_NOTE = "syncfs"


def engine_table(engines: Sequence[Engine]) -> Table:
    """One row per engine: stalls, time to durable, special saves, status."""
    headers = (
        "engine", "version", "stall per save", "stall, tight cadence", "to durable", "first save: call",
        "first save: durable", "changed plan: call", "syncs", "status",
    )  # fmt: skip
    return Table(
        "Engines (those that do not sync their files are charged a syncfs)",
        headers,
        [_engine_cells(one) for one in engines],
        frozenset(range(2, 8)),
    )


def summary_table(engines: Sequence[Engine]) -> Table:
    """What of `engine_table` fits a README: a cadence that nobody was measured at has no column, absent engines no row.

    `note` has what a reader of the numbers must know: that an engine failed (reasons are too long for a cell), skipped
    saves, a sync that the harness added.
    """
    shown = [one for one in engines if one.status != "absent"]
    names = [name for name in ("relaxed", "tight") if any(_cadence(one, name) for one in shown)]
    titles = {"relaxed": "stall per save", "tight": "stall, tight cadence"}
    stalls = [header for name in names for header in (titles[name], "lowest–highest")]
    headers = ("engine", "version", *stalls, "to durable", "first save: call", "note")
    rows = [_summary_cells(one, names) for one in shown]
    return Table("Stall per save", headers, rows, frozenset(range(2, len(headers) - 1)))


def _cadence(engine: Engine, name: str) -> Cadence | None:
    """The tight cadence, or that which is none; a failed engine has neither."""
    return next((one for one in engine.cadences if engine.shown and (one.name == "tight") == (name == "tight")), None)


def _summary_cells(engine: Engine, names: Sequence[str]) -> list[str]:
    if not engine.shown:
        return [engine.title, engine.version, *(["–"] * (2 * len(names) + 2)), engine.status]
    durable = next((one.durable for one in engine.cadences if one.durable), None)
    skipped = sum(one.skipped for one in engine.cadences)
    notes = (
        engine.status if engine.status != "measured" else "",
        f"{skipped} saves skipped" if skipped else "",
        "" if engine.fields.flag("syncs") else SYNCFS_NOTE,
    )
    return [
        engine.title,
        engine.version,
        *(cell for name in names for cell in _median_and_range(_cadence(engine, name))),
        format_seconds(durable.median if durable else None),
        format_seconds(engine.fields.fields("first_save").number("call")),
        "; ".join(note for note in notes if note),
    ]


def _median_and_range(cadence: Cadence | None) -> tuple[str, str]:
    if cadence is None or cadence.stall is None:
        return "–", "–"
    return format_seconds(cadence.stall.median), compact_range(cadence.stall) or "–"


def _engine_cells(engine: Engine) -> list[str]:
    status = engine.status if engine.status == "measured" else f"{engine.status}: {engine.reason}"
    if not engine.shown:
        return [engine.title, engine.version, *(["–"] * 7), status]
    relaxed = next((one for one in engine.cadences if one.name != "tight"), None)
    tight = next((one for one in engine.cadences if one.name == "tight"), None)
    durable = next((one.durable for one in engine.cadences if one.durable), None)
    first, changed = engine.fields.fields("first_save"), engine.fields.fields("changed_plan_save")
    skipped = sum(one.skipped for one in engine.cadences)
    return [
        engine.title,
        engine.version,
        _stall(relaxed),
        _stall(tight),
        format_seconds(durable.median if durable else None),
        format_seconds(first.number("call")),
        format_seconds(first.number("durable")),
        format_seconds(changed.number("call")),
        "yes" if engine.fields.flag("syncs") else "no",
        f"{status}, {skipped} skipped" if skipped else status,
    ]


def _stall(cadence: Cadence | None) -> str:
    if cadence is None or cadence.stall is None:
        return "–"
    middle = format_seconds(cadence.stall.median)
    return middle if cadence.stall.count < 2 else f"{middle} ({compact_range(cadence.stall)})"


def counters_table(engines: Sequence[Engine]) -> Table | None:
    """What the engines cost beside time; None when nothing was counted."""
    counted = [(engine, engine.fields.fields("counters")) for engine in engines]
    rows = [_counter_cells(engine, counters) for engine, counters in counted if engine.shown and counters]
    headers = (
        "engine", "CPU seconds", "peak memory", "pinned memory", "page cache", "written", "read", "disk writes, median",
        "disk writes, peak", "network, peak",
    )  # fmt: skip
    return Table("Counters", headers, rows, frozenset(range(1, len(headers)))) if rows else None


def _counter_cells(engine: Engine, counters: Fields) -> list[str]:
    disk, network = (Spread.of(counters.numbers(name)) for name in ("disk_write_rate", "network_rate"))
    cpu = counters.number("cpu_seconds")
    sizes = ("peak_rss_bytes", "pinned_bytes", "page_cache_bytes", "bytes_written", "bytes_read")
    return [
        engine.title,
        "–" if cpu is None else f"{cpu:,.1f}",
        *(format_bytes(counters.number(name)) for name in sizes),
        format_rate(disk.median if disk else None),
        format_rate(disk.high if disk else None),
        format_rate(network.high if network else None),
    ]


def truth_table(engines: Sequence[Engine]) -> Table | None:
    """What was checked of the saved bytes. None when no engine was checked."""
    rows = []
    for engine in engines:
        truth = engine.fields.fields("truth")
        if truth and engine.status != "absent":
            counts = (truth.number("checks"), truth.number("kills"))
            rows.append([engine.title, *map(format_count, counts), "; ".join(engine.failures) or "none"])
    headers = ("engine", "saves compared bit by bit", "runs with a killed rank", "failures")
    return Table("Truth check", headers, rows, frozenset({1, 2})) if rows else None


def options_table(engines: Sequence[Engine]) -> Table | None:
    rows = [
        [engine.title, option.text("name"), option.text("value"), option.text("why")]
        for engine in engines
        for option in engine.fields.items("options")
    ]
    return Table("Options of the engines", ("engine", "option", "value", "why"), rows) if rows else None
