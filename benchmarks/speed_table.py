"""Results of `make bench` as Markdown tables: all of them, or what fits a README."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from delta.goals import judge_deltas
from drop_in.comparisons import Comparison, compare
from results import scenario_of, spread_of
from targets import best_dcp, speedup

__all__ = ["full", "summary"]

# Label, engines whose faster blocking save counts, engine of the asynchronous save, engine of the load.
ROWS: tuple[tuple[str, tuple[str, ...], str | None, str], ...] = (
    ("limit (raw io_uring, O_DIRECT)", ("limit",), None, "limit"),
    ("**snapstone**", ("snapstone",), "snapstone-async", "snapstone"),
    ("torch.distributed.checkpoint", ("dcp", "dcp-2"), "dcp-async", "dcp"),
    ("torch.save, torch.load(mmap)", ("torch",), None, "torch"),
    ("safetensors", ("safetensors",), None, "safetensors"),
    ("torch_checkpointing", (), "torch-checkpointing", "torch-checkpointing"),
)
TITLES = {"2gb": "Large tensors", "small": "Small tensors"}


def _size(scenario: Mapping[str, Any]) -> str:
    nbytes = scenario["nbytes"]
    size = f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.1f} MB"
    return f"{size} in {scenario['tensors']:,} tensors"


def _seconds(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    return f"{seconds:.2f} s" if seconds >= 0.1 else f"{seconds * 1e3:.1f} ms"


def _rate(scenario: Mapping[str, Any], seconds: float | None) -> str:
    if seconds is None:
        return "-"
    return f"{_seconds(seconds)}, {scenario['nbytes'] / seconds / 1e9:.2f} GB/s"


def _median(scenario: Mapping[str, Any], engine: str | None, measure: str) -> float | None:
    spread = spread_of(scenario, engine, measure) if engine else None
    return spread.median if spread else None


def _table(scenario: Mapping[str, Any]) -> list[str]:
    lines = [
        f"{TITLES[scenario['state']]}: {_size(scenario)}, {scenario['file_system']}",
        "",
        "| engine | durable save | cold load | async save: stall | async save: durable | save vs DCP | load vs DCP |",
        "|---|---|---|---|---|---|---|",
    ]
    for label, savers, asynchronous, loader in ROWS:
        saves = [seconds for name in savers if (seconds := _median(scenario, name, "save_seconds")) is not None]
        save = min(saves) if saves else None
        load = _median(scenario, loader, "load_seconds")
        durable = _median(scenario, asynchronous, "save_seconds")
        if save is None and durable is None and load is None:
            continue
        gains = (
            speedup(save, best_dcp(scenario, "save_seconds")),
            speedup(load, best_dcp(scenario, "load_seconds")),
        )
        cells = [
            label,
            _rate(scenario, save),
            _rate(scenario, load),
            _seconds(_median(scenario, asynchronous, "stall_seconds")),
            _seconds(durable),
            *("-" if gain is None else f"{gain:.1f}x" for gain in gains),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _under_dcp(document: Mapping[str, Any]) -> list[str]:
    """Ratio first; a row that the run did not measure says so."""
    rows = document.get("dcp", [])
    if not rows:
        return []
    return [
        f"Under torch.distributed.checkpoint: {_size(rows[0])}, {rows[0]['file_system']}, "
        f"{' or '.join(str(count) for count in sorted({row['rounds'] for row in rows}))} rounds",
        "",
        "| call | ratio | wanted | | snapstone | against |",
        "|---|---|---|---|---|---|",
        *(f"| {' | '.join(_compared(one))} |" for one in compare(rows)),
        "",
    ]


def _deltas(document: Mapping[str, Any]) -> list[str]:
    rows = [row for row in document.get("delta", []) if row["cold_by"] is None]
    if not rows:
        return []
    names = [name for name in rows[0]["engines"] if any(_median(row, name, "save_seconds") for row in rows)]
    words = {True: "met", False: "missed", None: "-"}
    return [
        f"Delta saves: {_size(rows[0])}, {rows[0]['file_system']}, {rows[0]['rounds']} rounds; seconds to durable, and "
        "bytes written",
        "",
        f"| changed since the checkpoint before | {' | '.join(rows[0]['engines'][name]['label'] for name in names)} |",
        f"|---|{'---|' * len(names)}",
        *(f"| {_changed(row)} | {' | '.join(_seconds_and_bytes(row, name) for name in names)} |" for row in rows),
        "",
        "| ratio | wanted | got | |",
        "|---|---|---|---|",
        *(
            f"| {one.what} | {one.wanted} | {one.got} | {words[one.passed]} |"
            for one in judge_deltas(document["delta"])
        ),
        "",
    ]


def _changed(row: Mapping[str, Any]) -> str:
    count, nbytes = row["changed_tensors"], row["changed_bytes"]
    return f"{count} of {row['tensors']} tensors, {nbytes / 1e6:,.0f} MB" if count else "nothing"


def _seconds_and_bytes(row: Mapping[str, Any], name: str) -> str:
    nbytes = _median(row, name, "written_bytes")
    written = f", {nbytes / 1e6:,.1f} MB" if nbytes else ""
    return f"{_seconds(_median(row, name, 'save_seconds'))}{written}"


def _compared(one: Comparison) -> tuple[str, ...]:
    words = {True: "met", False: "missed", None: "-"}
    sides = ("-" if side is None else f"{_amount(one, side[1])}, {side[0]}" for side in (one.ours, one.theirs))
    return one.what, one.got_text, one.wanted_text, words[one.passed], *sides


def _amount(one: Comparison, value: float) -> str:
    return f"{value / 1e9:.2f} GB" if one.unit == "bytes" else _seconds(value)


def full(document: Mapping[str, Any]) -> str:
    """Every table of the result."""
    return _rendered(document, tuple(TITLES), [*_under_dcp(document), *_deltas(document)])


def summary(document: Mapping[str, Any]) -> str:
    """Large tensors alone."""
    return _rendered(document, ("2gb",), [])


def _rendered(document: Mapping[str, Any], states: Sequence[str], more: Sequence[str]) -> str:
    machine = document["machine"]
    lines: list[str] = []
    for state in states:
        scenario = scenario_of(document, state, "disk")
        if scenario is not None:
            lines += [*_table(scenario), ""]
    lines += more
    rounds = max((scenario["rounds"] for scenario in document["scenarios"]), default=0)
    lines.append(
        f"Medians of {rounds} interleaved rounds, `{document['command']}`, {document['date']}; {machine['cores']} x "
        f"{machine['cpu']}, {machine['memory_gib']} GiB, Linux {machine['kernel']}, torch {machine['torch']}. "
        "Engines that leave data to the kernel are synced in their time; every result was compared bit for bit."
    )
    return "\n".join(lines)
