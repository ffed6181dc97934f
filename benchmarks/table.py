"""A run on the terminal: tables per scenario, fenced calls, a table per row under DCP, micro benchmarks, targets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from drop_in.comparisons import counted_bytes
from results import Spread, spread_of
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from targets import Verdict, best_dcp, speedup

__all__ = ["print_delta", "print_micro", "print_scenario", "print_targets", "print_under_dcp"]

MIB = 1 << 20


def seconds_text(spread: Spread | None) -> str:
    return "" if spread is None else f"{spread.median:.3f} ({spread.low:.3f}-{spread.high:.3f})"


def size_text(nbytes: int) -> str:
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.1f} MB"


def ratio_text(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.2f}x"


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number == 0 else "right", no_wrap=True)
    return table


def print_scenario(console: Console, scenario: Mapping[str, Any]) -> None:
    size = size_text(scenario["nbytes"])
    cold = f"cold by {scenario['cold_by']}" if scenario["cold_by"] else "files in memory"
    console.print(
        f"\n[bold]{scenario['state']}[/bold]: {size} in {scenario['tensors']} tensors on {scenario['file_system']}, "
        f"median (min-max) of {scenario['rounds']} rounds, {cold}"
    )
    console.print(_saves(scenario))
    console.print(_loads(scenario))
    for name, entry in scenario["engines"].items():
        if entry["skipped"] is not None:
            console.print(f"  {name}: left out: {entry['skipped']}", markup=False)
        elif entry["rounds"] != scenario["rounds"]:
            console.print(f"  {name}: {entry['rounds']} rounds only, to keep the run short", markup=False)
    if "call_seconds" in scenario.get("fence", {}):
        _print_fence(console, scenario["fence"])


def _saves(scenario: Mapping[str, Any]) -> Table:
    columns = ("durable, s", "GB/s", "of the limit", "vs DCP*", "stall, s", "CPU, s", "extra memory, MiB")
    table = _table("save", "engine", *columns)
    limit = spread_of(scenario, "limit", "save_seconds")
    dcp_async = spread_of(scenario, "dcp-async", "save_seconds")
    for name, entry in scenario["engines"].items():
        spread = spread_of(scenario, name, "save_seconds")
        if spread is None:
            continue
        stall = spread_of(scenario, name, "stall_seconds")
        dcp = best_dcp(scenario, "save_seconds") if stall is None else dcp_async.median if dcp_async else None
        table.add_row(
            entry["label"],
            seconds_text(spread),
            f"{scenario['nbytes'] / spread.median / 1e9:.2f}",
            ratio_text(speedup(spread.median, limit.median if limit else None)),
            ratio_text(speedup(spread.median, dcp)),
            seconds_text(stall),
            *_cost(scenario, name, "save"),
        )
    table.caption = "* blocking saves against the faster DCP save, asynchronous ones against DCP's async_save"
    return table


def _loads(scenario: Mapping[str, Any]) -> Table:
    table = _table("load", "engine", "seconds", "GB/s", "of the limit", "vs DCP", "CPU, s", "extra memory, MiB")
    limit = spread_of(scenario, "limit", "load_seconds")
    for name, entry in scenario["engines"].items():
        spread = spread_of(scenario, name, "load_seconds")
        if spread is None:
            continue
        table.add_row(
            entry["label"],
            seconds_text(spread),
            f"{scenario['nbytes'] / spread.median / 1e9:.2f}",
            ratio_text(speedup(spread.median, limit.median if limit else None)),
            ratio_text(speedup(spread.median, best_dcp(scenario, "load_seconds"))),
            *_cost(scenario, name, "load"),
        )
    return table


def _cost(scenario: Mapping[str, Any], name: str, verb: str) -> tuple[str, str]:
    """CPU seconds and extra memory; a probe's own process is not the point."""
    if name in ("limit", "fio"):
        return "", ""
    cpu = spread_of(scenario, name, f"{verb}_cpu_seconds")
    extra = scenario["engines"][name][f"{verb}_peak_extra_bytes"]
    return "" if cpu is None else f"{cpu.median:.2f}", "" if extra is None else f"{extra / MIB:.0f}"


def _print_fence(console: Console, fence: Mapping[str, Any]) -> None:
    calls, steps = Spread.of(fence["call_seconds"]), Spread.of(fence["step_after_call_seconds"])
    assert calls is not None
    assert steps is not None
    first = fence["first_call_seconds"]
    console.print(
        f"  async_save(fence=optimizer), {fence['tensors']} tensors: first call {first * 1e3:.2f} ms, "
        f"later ones {calls.median * 1e3:.2f} ms ({calls.low * 1e3:.2f}-{calls.high * 1e3:.2f}); "
        f"the step after a call {steps.median * 1e3:.1f} ms, without one {fence['step_alone_seconds'] * 1e3:.1f} ms"
    )


def print_under_dcp(console: Console, rows: Sequence[Mapping[str, Any]]) -> None:
    for row in rows:
        console.print(
            f"\n[bold]{row['title']}[/bold]: {row['nbytes'] / 1e9:.2f} GB in {row['tensors']} tensors on "
            f"{row['file_system']}, median (min-max) of {row['rounds']} rounds"
            + (f", cold by {row['cold_by']}" if row["cold_by"] else "")
        )
        console.print(_loads_under_dcp(row) if row["cold_by"] else _saves_under_dcp(row))
        for entry in row["engines"].values():
            if entry["skipped"] is not None:
                console.print(f"  {entry['label']}: left out: {entry['skipped']}", markup=False)


def _saves_under_dcp(row: Mapping[str, Any]) -> Table:
    table = _table("", "contender", "durable, s", "GB/s", "call, s", "stall, s")
    for name, entry in row["engines"].items():
        spread = spread_of(row, name, "save_seconds")
        if spread is not None:
            rate = f"{row['nbytes'] / spread.median / 1e9:.2f}"
            waits = (seconds_text(spread_of(row, name, f"{what}_seconds")) for what in ("call", "stall"))
            table.add_row(entry["label"], seconds_text(spread), rate, *waits)
    return table


def _loads_under_dcp(row: Mapping[str, Any]) -> Table:
    table = _table("", "contender", "slowest rank, s", "all ranks read, MB", "of the state")
    for name, entry in row["engines"].items():
        spread, nbytes = spread_of(row, name, "load_seconds"), counted_bytes(row, name)
        if spread is not None:
            counted = ("", "") if nbytes is None else (f"{nbytes / 1e6:.1f}", ratio_text(nbytes / row["nbytes"]))
            table.add_row(entry["label"], seconds_text(spread), *counted)
    return table


def print_delta(console: Console, rows: Sequence[Mapping[str, Any]]) -> None:
    for row in rows:
        changed = f"{row['changed_bytes'] / 1e6:.1f} MB in {row['changed_tensors']} tensors changed, "
        console.print(
            f"\n[bold]{row['title']}[/bold]: {size_text(row['nbytes'])} in {row['tensors']} tensors on "
            f"{row['file_system']}, "
            + (f"cold by {row['cold_by']}, " if row["cold_by"] else changed)
            + f"median (min-max) of {row['rounds']} rounds"
        )
        columns = ("seconds", "GB/s") if row["cold_by"] else ("durable, s", "GB/s", "written, MB")
        table = _table("", "contender", *columns)
        for name, entry in row["engines"].items():
            spread = spread_of(row, name, "load_seconds" if row["cold_by"] else "save_seconds")
            written = spread_of(row, name, "written_bytes")
            if spread is not None:
                cells = [seconds_text(spread), f"{row['nbytes'] / spread.median / 1e9:.2f}"]
                table.add_row(entry["label"], *cells, *([f"{written.median / 1e6:.2f}"] if written else []))
        console.print(table)
        for entry in row["engines"].values():
            if entry["skipped"] is not None:
                console.print(f"  {entry['label']}: left out: {entry['skipped']}", markup=False)


def print_micro(console: Console, micro: Sequence[Mapping[str, Any]]) -> None:
    table = _table("micro benchmarks", "what", "median, ms", "min-max, ms", "rounds", "GB/s")
    for one in micro:
        rate = one["nbytes"] / one["median_seconds"] / 1e9 if one["nbytes"] else None
        table.add_row(
            escape(one["name"]),
            f"{one['median_seconds'] * 1e3:.3f}",
            f"{one['min_seconds'] * 1e3:.3f}-{one['max_seconds'] * 1e3:.3f}",
            str(one["rounds"]),
            "" if rate is None else f"{rate:.2f}",
        )
    console.print()
    console.print(table)


def print_targets(console: Console, verdicts: list[Verdict], *, quick: bool) -> None:
    table = _table("targets (a quick run's sizes prove nothing)" if quick else "targets", "what", "wanted", "got", "")
    words = {True: "[green]PASS[/green]", False: "[red]MISSED[/red]", None: "-"}
    for verdict in verdicts:
        table.add_row(verdict.what, verdict.wanted, verdict.got, words[verdict.passed])
    console.print()
    console.print(table)
