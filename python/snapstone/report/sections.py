"""The parts of a report in their order: each a heading, facts in a line, charts, and tables."""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from dataclasses import dataclass, field

from .chart import Chart
from .disk_charts import disk_chart, limits_of
from .documents import Measurement, Measurements
from .engine_tables import counters_table, engine_table, options_table, truth_table
from .engines import Engine, engines_of
from .fields import Fields
from .link_chart import link_chart, link_limits_of
from .load_chart import load_chart
from .model_chart import inputs_table, model_chart
from .quantity import compact_range, format_bytes, format_count, format_named, format_number, format_seconds
from .roofline import roofline_chart
from .save_timeline import timeline_chart
from .stall_charts import ledger_chart, stall_chart
from .step_strip import step_chart
from .table import Table

__all__ = ["Section", "command_of", "environment_table", "headline", "sections_of", "workload_line"]


@dataclass
class Section:
    """`folded` charts and tables start closed."""

    identity: str
    title: str
    lines: list[str] = field(default_factory=list)
    charts: list[Chart] = field(default_factory=list)
    folded: list[Chart] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)


def sections_of(measurements: Measurements) -> list[Section]:
    """Stalls first, then loads, the hardware's limits, the model of a cluster."""
    stalls = [(one, engines_of(one)) for one in measurements.of_kind("stall")]
    loads, disks, links = (measurements.of_kind(kind) for kind in ("load", "disk", "link"))
    found = [_stall_section(number, *stall) for number, stall in enumerate(stalls, start=1)]
    found += [_load_section(number, one) for number, one in enumerate(loads, start=1)]
    hardware = Section("limits", "The hardware's limits")
    limits = limits_of(disks) | link_limits_of(links)
    if roofline := roofline_chart("chart-roofline", stalls, loads, limits):
        if measurements.mixtures():
            hardware.lines.append("Careful: limits and rates below were measured on machines that differ.")
        hardware.charts.append(roofline)
    elif stalls or loads:
        hardware.lines.append("No roofline: snapstone bench disk DIRECTORY --out measures the limit it needs.")
    hardware.charts += _present(disk_chart(f"chart-disk-{number}", one) for number, one in enumerate(disks, start=1))
    hardware.charts += _present(link_chart(f"chart-link-{number}", one) for number, one in enumerate(links, start=1))
    if hardware.charts or hardware.lines:
        found.append(hardware)
    for number, one in enumerate(measurements.of_kind("model"), start=1):
        section = Section(f"model-{number}", f"Model of a cluster: {_label(one)}")
        section.charts += _present([model_chart(f"chart-model-{number}", one)])
        section.tables += [table for table in (inputs_table(one),) if table is not None]
        found.append(section)
    return found


def _present(charts: Iterable[Chart | None]) -> list[Chart]:
    return [chart for chart in charts if chart is not None]


def _stall_section(number: int, measurement: Measurement, engines: list[Engine]) -> Section:
    model = measurement.fields.fields("workload").text("model")
    section = Section(f"stall-{number}", f"Stall: {model or _label(measurement)}", [workload_line(measurement)])
    if said := headline(engines):
        section.lines.append(said)
    section.charts.append(stall_chart(f"chart-stall-{number}", engines))
    section.charts += _present([ledger_chart(f"chart-ledger-{number}", engines)])
    section.charts += _present([step_chart(f"chart-steps-{number}", engines)])
    timelines = _present(
        timeline_chart(f"chart-timeline-{number}-{place}", one)
        for place, one in enumerate([one for one in engines if one.shown], start=1)
    )
    section.charts += timelines[:1]
    section.folded += timelines[1:]
    tables = (engine_table(engines), counters_table(engines), truth_table(engines), options_table(engines))
    section.tables += [table for table in tables if table is not None]
    return section


def _load_section(number: int, measurement: Measurement) -> Section:
    checkpoint = measurement.fields.fields("checkpoint")
    facts = [
        f"{name.replace('_', ' ')} {fact}" for name in checkpoint.names()[:8] if (fact := _fact_of(checkpoint, name))
    ]
    section = Section(f"load-{number}", f"Load: {_label(measurement)}", ["; ".join([*facts, _machine(measurement)])])
    section.charts += _present([load_chart(f"chart-load-{number}", measurement)])
    return section


def _fact_of(fields: Fields, name: str) -> str:
    number = fields.number(name)
    return fields.text(name) if number is None else format_named(name, number)


def _label(measurement: Measurement) -> str:
    """What the one who measured called it."""
    return measurement.name.removesuffix(".json").removeprefix(f"{measurement.kind}-")


def _machine(measurement: Measurement) -> str:
    world, hardware = measurement.environment("world"), measurement.environment("hardware")
    ranks, nodes = world.number("ranks"), world.number("nodes")
    return ", ".join(
        part
        for part in (
            f"{format_count(ranks)} rank{'s' if ranks != 1 else ''}" if ranks is not None else "",
            f"{format_count(nodes)} nodes" if nodes is not None and nodes > 1 else "",
            hardware.text("accelerator") or hardware.text("cpu"),
        )
        if part
    )


def workload_line(measurement: Measurement) -> str:
    """The workload, the machine and the protocol in one line."""
    workload, protocol = measurement.fields.fields("workload"), measurement.fields.fields("protocol")
    nbytes, tensors = workload.number("nbytes"), workload.number("tensors")
    step = workload.fields("step_seconds").number("median")
    pairs, saves = protocol.number("pairs"), protocol.number("saves_per_block")
    parts = [
        workload.text("parallelism"),
        "state only, no compute" if workload.flag("state_only") else "",
        f"{format_bytes(nbytes)} of state" if nbytes is not None else "",
        f"{format_count(tensors)} tensors" if tensors is not None else "",
        _machine(measurement),
        f"a step takes {format_seconds(step)}" if step is not None else "",
        f"{format_count(pairs)} A/B pairs" if pairs is not None else "",
        f"{format_count(saves)} save{'s' if saves != 1 else ''} per block" if saves is not None else "",
    ]
    return ", ".join(part for part in parts if part)


def headline(engines: list[Engine]) -> str:
    """The two smallest stalls in words, "" when nothing was measured; only what spreads apart is called smaller."""
    measured = [(one.title, one.stall) for one in engines if one.shown and one.stall]
    if not measured:
        return ""
    (title, best), *others = measured
    said = f"Smallest stall{_cadence(engines[0])}: {title}, {format_seconds(best.median)} per save"
    said += f" ({compact_range(best)} over {best.count} pairs)." if best.count > 1 else "."
    if not others:
        return said
    name, second = others[0]
    said += f" Next: {name}, {format_seconds(second.median)}"
    if best.high >= second.low:
        return f"{said}; their spreads overlap, so these pairs do not tell the two apart."
    return f"{said}, {format_number(second.median / best.median, 2)} times that." if best.median > 0 else f"{said}."


def _cadence(engine: Engine) -> str:
    label = next((one.label for one in engine.cadences if one.stall and one.interval_steps), "")
    return f" with a save {label}" if label else ""


def command_of(measurement: Measurement) -> str:
    """The command line, quoted as a shell wants it."""
    return shlex.join(measurement.fields.texts("command"))


_ENVIRONMENT = (
    ("hardware", "cpu", "processor"), ("hardware", "cores", "cores"), ("hardware", "memory_bytes", "memory"),
    ("hardware", "accelerator", "accelerator"), ("hardware", "device", "state on"),
    ("storage", "file_system", "file system"), ("storage", "device", "disk"), ("storage", "directory", "directory"),
    ("software", "python", "Python"), ("software", "torch", "torch"), ("software", "snapstone", "snapstone"),
    ("software", "kernel", "kernel"), ("world", "ranks", "ranks"), ("world", "nodes", "nodes"),
    ("world", "backend", "backend"),
)  # fmt: skip


def environment_table(measurements: Measurements) -> Table:
    """Columns are groups of documents with the same environment."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for one in measurements.all:
        values = tuple(_fact(one, part, name) for part, name, _ in _ENVIRONMENT)
        groups.setdefault(values, []).append(one.name)
    rows = [
        [title, *(values[index] for values in groups)]
        for index, (_, _, title) in enumerate(_ENVIRONMENT)
        if any(values[index] != "–" for values in groups)
    ]
    return Table("Environment", ("", *(", ".join(names) for names in groups.values())), rows)


def _fact(measurement: Measurement, part: str, name: str) -> str:
    fields = measurement.environment(part)
    if name == "memory_bytes":
        return format_bytes(fields.number(name))
    return fields.text(name) or "–"
