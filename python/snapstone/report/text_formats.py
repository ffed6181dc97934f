"""The report as Markdown, as CSV and as JSON."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterator
from typing import Any

from .disk_charts import disk_chart
from .documents import Measurement, Measurements
from .engine_tables import engine_table
from .engines import engines_of
from .fields import Fields
from .link_chart import link_chart
from .load_chart import load_chart
from .model_chart import model_chart
from .sections import command_of, headline, workload_line
from .stall_charts import stall_chart
from .table import Table

__all__ = ["csv_text", "json_document", "markdown", "standalone_chart"]

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


def standalone_chart(measurements: Measurements) -> str | None:
    """The stall chart of the first stall document as an SVG file; None when there is no such document."""
    stalls = measurements.of_kind("stall")
    return stall_chart("stall", engines_of(stalls[0])).svg_file() if stalls else None


def markdown(measurements: Measurements, chart_name: str | None = None) -> str:
    """The main table of every document, its facts and its command; `chart_name` is the SVG beside it."""
    parts = [f"> **Mixed machines**, not to be compared: {_plain(line)}" for line in measurements.mixtures()]
    parts += [f"> Skipped: {_plain(line)}" for line in measurements.skipped]
    parts += [f"> Problem: {_plain(line)}" for line in measurements.problems()]
    for one in sorted(measurements.all, key=lambda one: _ORDER.index(one.kind)):
        table, lines = _main_table(one)
        if table is None:
            continue
        if chart_name and one.kind == "stall":
            parts.append(f"![Stall per save, by engine]({chart_name})")
            chart_name = None
        environment = [one.environment(part) for part in ("hardware", "storage", "software")]
        machine = [environment[0].text("cpu"), environment[1].text("file_system"), environment[2].text("torch")]
        machine = [text for text in (machine[0], machine[1], f"torch {machine[2]}" if machine[2] else "") if text]
        source = "; ".join([one.name, one.fields.text("date"), *machine])
        parts += [_plain(line) for line in lines if line]
        parts += [table.markdown(), f"{_plain(source)}; command:\n\n{_code(command_of(one))}"]
    return "\n\n".join(parts) + "\n"


def _main_table(one: Measurement) -> tuple[Table | None, list[str]]:
    if one.kind == "stall":
        engines = engines_of(one)
        return engine_table(engines), [workload_line(one), headline(engines)]
    chart = _CHARTS[one.kind]("chart", one)
    return (chart.tables[0], [chart.title]) if chart else (None, [])


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
