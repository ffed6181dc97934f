"""The report as Markdown, as CSV and as JSON."""

from __future__ import annotations

import csv
import io
import math
import os
from collections.abc import Iterator, Sequence
from typing import Any
from urllib.parse import quote

from .chart import NARROW
from .disk_charts import disk_chart
from .documents import Measurement, Measurements
from .engine_tables import SYNCFS_NOTE, summary_table
from .engines import engines_of
from .fields import Fields
from .link_chart import link_chart
from .load_chart import load_chart
from .model_chart import model_chart
from .quantity import format_bytes, format_count
from .sections import command_of, headline, workload_line
from .stall_charts import stall_chart
from .table import Table

__all__ = ["chart_files", "csv_text", "json_document", "markdown"]

NARROW_SCREEN = 600  # pixels; the wide drawing cannot be read when it is scaled down to less

_ORDER = ("stall", "load", "disk", "link", "model")
_CHARTS = {"load": load_chart, "disk": disk_chart, "link": link_chart, "model": model_chart}
_CSV_HEADER = ("file", "kind", "name", "status", "cadence", "quantity", "unit", "index", "value")


def json_document(measurements: Measurements) -> dict[str, Any]:
    """All documents as they are, but for numbers that JSON does not have: these become texts, "nan" or "inf"."""
    return {
        "directory": measurements.directory,
        "documents": [{"file": one.name, "document": _finite(one.document)} for one in measurements.all],
        "mixed": measurements.mixtures(),
        "problems": measurements.problems(),
        "skipped": list(measurements.skipped),
    }


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {name: _finite(member) for name, member in value.items()}
    return [_finite(member) for member in value] if isinstance(value, list) else value


def chart_files(measurements: Measurements, path: str) -> dict[str, str]:
    """The stall chart of the first stall document as SVG files: `path`, and beside it one for narrow screens.

    Empty when there is no such document.
    """
    stalls = measurements.of_kind("stall")
    if not stalls:
        return {}
    chart = stall_chart("stall", engines_of(stalls[0]))
    return {path: chart.svg_file(), _narrow(path): chart.svg_file(NARROW)}


def _narrow(path: str) -> str:
    stem, suffix = os.path.splitext(path)
    return f"{stem}-narrow{suffix}"


def markdown(measurements: Measurements, chart_name: str | None = None) -> str:
    """The main table of every document, its facts and its command; `chart_name` is the SVG of `chart_files`."""
    parts = [f"> **Mixed machines**, not to be compared: {_plain(line)}" for line in measurements.mixtures()]
    parts += [f"> Skipped: {_plain(line)}" for line in measurements.skipped]
    parts += [f"> Problem: {_plain(line)}" for line in measurements.problems()]
    for one in sorted(measurements.all, key=lambda one: _ORDER.index(one.kind)):
        table, lines, notes = _main_table(one)
        if table is None:
            continue
        if chart_name and one.kind == "stall":
            parts.append(_picture(chart_name))
            chart_name = None
        parts += [_plain(line) for line in lines if line]
        parts += [table.markdown(), *(_plain(note) for note in notes)]
        parts += [f"{_plain('; '.join(_source(one)))}; command:\n\n{_code(command_of(one))}"]
    return "\n\n".join(parts) + "\n"


def _main_table(one: Measurement) -> tuple[Table | None, list[str], Sequence[str]]:
    """The table, what stands above it and what below."""
    if one.kind == "stall":
        engines = engines_of(one)
        said = [f"{one.fields.fields('workload').text('model')}, {workload_line(one)}.", headline(engines)]
        notes = [f"{one.title} failed: {one.reason}" for one in engines if one.status == "failed"]
        notes += stall_chart("stall", engines).notes
        if any(one.shown and not one.fields.flag("syncs") for one in engines):
            notes.insert(
                0, f"{SYNCFS_NOTE}: the engine does not sync its files; the harness does, and the time counts."
            )
        return summary_table(engines), said, notes
    chart = _CHARTS[one.kind]("chart", one)
    return (chart.tables[0], [chart.title], chart.notes) if chart else (None, [], ())


def _picture(name: str) -> str:
    """Both files of `chart_files`; each follows the light or dark setting of the reader by itself."""
    wide, narrow = (quote(path) for path in (name, _narrow(name)))
    return (
        f'<picture>\n<source media="(max-width: {NARROW_SCREEN}px)" srcset="{narrow}">\n'
        f'<img alt="Stall per save, by engine; the numbers are in the table below" src="{wide}">\n</picture>'
    )


def _source(one: Measurement) -> list[str]:
    """File, date, machine and versions."""
    hardware, storage, software = (one.environment(part) for part in ("hardware", "storage", "software"))
    cores, memory = hardware.number("cores"), hardware.number("memory_bytes")
    where = storage.text("file_system"), storage.text("device")
    kernel, torch = software.text("kernel"), software.text("torch")
    facts = (
        one.name,
        one.fields.text("date"),
        (f"{format_count(cores)} x " if cores else "") + hardware.text("cpu"),
        f"{format_bytes(memory)} of memory" if memory else "",
        hardware.text("accelerator"),
        " on ".join(text for text in where if text),
        f"Linux {kernel}" if kernel else "",
        f"torch {torch}" if torch else "",
    )
    return [fact for fact in facts if fact]


def _plain(text: str) -> str:
    """Text that Markdown shows as it is."""
    return Table("", (text,), ()).markdown().splitlines()[0].removeprefix("| ").removesuffix(" |")


def _code(text: str) -> str:
    return "\n".join(f"    {line}" for line in (text or "(not known)").splitlines())


def csv_text(measurements: Measurements) -> str:
    """One line per measured number. Cells that a spreadsheet would take for a formula get an apostrophe in front."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(_CSV_HEADER)
    for one in measurements.all:
        rows = _CSV_ROWS[one.kind](one)
        writer.writerows([_cell(one.name), one.kind, *map(_cell, row)] for row in rows)
    return buffer.getvalue()


def _cell(text: str) -> str:
    text = " ".join(text.split())
    return f"'{text}" if text[:1] in ("=", "+", "-", "@") and not _is_number(text) else text


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


_CsvRow = tuple[str, str, str, str, str, str, str]  # from "name" to "value"


def _numbers(name: str, status: str, cadence: str, quantity: str, unit: str, values: list[float]) -> Iterator[_CsvRow]:
    for index, value in enumerate(values):
        yield name, status, cadence, quantity, unit, str(index), f"{value:.9g}"


def _stall_rows(measurement: Measurement) -> Iterator[_CsvRow]:
    """An engine that failed has a reason and no number."""
    for engine in engines_of(measurement):
        who = engine.name, engine.status
        if not engine.shown:
            yield *who, "", "reason", "", "", engine.reason
            continue
        yield from _cadence_rows(who, engine.fields)
        for save in ("first_save", "changed_plan_save"):
            for part in ("call", "durable"):
                yield from _numbers(*who, "", f"{save} {part}", "s", engine.fields.fields(save).numbers(part))
        counters = engine.fields.fields("counters")
        for name in counters.names():
            unit = "B" if "bytes" in name else "B/s" if name.endswith("rate") else "s"
            yield from _numbers(*who, "", name, unit, counters.numbers(name))
        steps = engine.fields.items("steps")
        yield from _numbers(*who, "", "step", "s", [number for step in steps for number in step.numbers("seconds")])


def _cadence_rows(who: tuple[str, str], engine: Fields) -> Iterator[_CsvRow]:
    for cadence in engine.items("cadences"):
        when = cadence.text("name")
        yield from _numbers(*who, when, "stall", "s", cadence.numbers("stall_seconds"))
        ledger = cadence.fields("ledger")
        for part in ledger.names():
            yield from _numbers(*who, when, f"ledger {part}", "s", ledger.numbers(part))
        yield from _numbers(*who, when, "durable", "s", cadence.numbers("durable_seconds"))
        yield from _numbers(*who, when, "skipped", "saves", cadence.numbers("skipped"))


def _load_rows(measurement: Measurement) -> Iterator[_CsvRow]:
    for load in measurement.fields.items("loads"):
        who = f"{load.text('engine')} {load.text('strategy')}".strip(), load.text("status")
        yield from _numbers(*who, "", "load", "s", load.numbers("seconds"))
        for name in ("nbytes", "bytes_read"):
            yield from _numbers(*who, "", name, "B", load.numbers(name))


def _disk_rows(measurement: Measurement) -> Iterator[_CsvRow]:
    for probe in measurement.fields.items("probes"):
        who = f"{probe.text('tool')} {probe.text('rung')}".strip(), "absent" if probe.text("reason") else "measured"
        yield from _numbers(*who, "", probe.text("operation"), "B/s", probe.numbers("bytes_per_second"))


def _link_rows(measurement: Measurement) -> Iterator[_CsvRow]:
    for link in measurement.fields.items("links"):
        status = "absent" if link.text("reason") else "measured"
        rates = link.numbers("bytes_per_second")
        yield from _numbers(link.text("transport"), status, "", link.text("operation"), "B/s", rates)


def _model_rows(measurement: Measurement) -> Iterator[_CsvRow]:
    for row in measurement.fields.items("rows"):
        who = row.text("engine"), f"{row.text('gpus')} GPUs"
        for name in row.names():
            if name not in ("engine", "gpus"):
                unit = "s" if "seconds" in name else ""
                yield from _numbers(who[0], "modelled", who[1], name, unit, row.numbers(name))
        yield from _numbers(
            who[0], "modelled", who[1], "simulated_goodput", "", row.fields("simulated_goodput").numbers("median")
        )


_CSV_ROWS = {
    "stall": _stall_rows,
    "load": _load_rows,
    "disk": _disk_rows,
    "link": _link_rows,
    "model": _model_rows,
}
