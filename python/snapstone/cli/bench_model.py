"""`snapstone bench model`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import fields
from typing import TYPE_CHECKING, Any, TypeVar

import click

from ..bench.cluster import SIZES, Cluster, Findings, engines_of, figures_of, findings, model_document
from .output import emit, emit_json, emit_table, json_option, painted, printable

if TYPE_CHECKING:
    from ..bench.cluster import Row
    from ..bench.results import Environment

__all__ = ["model"]

_Command = TypeVar("_Command", bound=Callable[..., Any])
_NUMBERS_AT_RIGHT = (
    "gpus",
    "failure every",
    "stall",
    "durable",
    "steps",
    "cadence",
    "young",
    "daly",
    "goodput",
    "lost",
)


def _figure_options(command: _Command) -> _Command:
    """An option for every figure of the cluster, named like it."""
    for figure in reversed(fields(Cluster)):
        is_text = isinstance(figure.default, str)
        kind: Any = str if is_text else int if figure.metadata["whole"] else float
        default = "none" if figure.default is None else figure.default if is_text else f"{figure.default:g}"
        text = figure.metadata["text"]
        command = click.option(
            f"--{figure.name.replace('_', '-')}",
            figure.name,
            type=kind,
            metavar="NAME" if is_text else "N",
            help=f"{text[0].upper()}{text[1:]}. Default: {default}.",
        )(command)
    return command


@click.command(short_help="Best cadence and goodput on clusters of 8 to 100,000 GPUs.")
@click.option("--from", "results", metavar="R", help="Directory of results: disk, step and engines as measured.")
@click.option("--engine", "engines", metavar="NAME,...", multiple=True, help="Measured ones, blocking, staged, hidden.")
@click.option("--gpus", metavar="N,...", default=",".join(map(str, SIZES)), help="Sizes of the cluster.")
@click.option("--interval-steps", type=int, metavar="N", help="Save after so many steps, not at the best cadence.")
@click.option(
    "--fixed-seconds", type=float, default=0.0, metavar="N", help="Stall of each save of any size. Default: 0."
)
@_figure_options
@click.option("--simulate", "runs", type=int, default=0, metavar="RUNS", help="Simulate each row so many times.")
@click.option("--seed", type=int, default=0, metavar="N", help="Of the first simulation. Default: 0.")
@click.option("--out", metavar="R", help="Directory for the result, model-LABEL.json.")
@click.option("--label", default="plan", metavar="LABEL", help="Default: plan.")
@json_option
def model(
    results: str | None,
    engines: tuple[str, ...],
    gpus: str,
    interval_steps: int | None,
    fixed_seconds: float,
    runs: int,
    seed: int,
    out: str | None,
    label: str,
    as_json: bool,
    **figures: Any,
) -> None:
    """Computes from the figures of one node what saves cost a cluster: stall, time to durable, the best cadence by
    Young, by Daly and exactly, goodput, and what a failure loses. docs/cluster-model.md has the formulae.

    An engine is one that `bench stall` measured, with --from; a kind of engine (blocking: training waits for the disk;
    staged: for the copy to host memory; hidden: for neither); or NAME=STALL/DURABLE, in seconds.

    \b
    Examples:
      snapstone bench model --gpus 1024,16384
      snapstone bench model --from R/ --mtbf-gpu-hours 45565 --out R/
      snapstone bench model --engine staged,mine=2.5/40 --state-bytes 5.7e12 --shared-bytes-per-second 2e12
      snapstone bench model --gpus 16384 --interval-steps 50 --simulate 5 --json

    Exits with 2 when a figure is out of range or an engine unknown, with 3 when R does not exist,
    with 4 when a simulation is wanted and simpy is not installed.
    """
    sizes = _sizes(gpus)
    found = findings(results) if results is not None else Findings()
    cluster, sources = figures_of(figures, found)
    chosen = engines_of([name for names in engines for name in names.split(",") if name], found, fixed_seconds)
    document, rows = model_document(
        cluster,
        sources,
        chosen,
        sizes,
        command=sys.argv,
        environment=_environment(out),
        problems=found.problems,
        interval_steps=interval_steps,
        runs=runs,
        seed=seed,
    )
    for problem in document["problems"]:
        click.echo(f"snapstone: {printable(problem)}", err=True)
    path = None
    if out is not None:
        from ..bench.results import write

        path = write(document, out, label)
    if as_json:
        emit_json("bench-model", document)
    else:
        _show(rows)
        if path is not None:
            emit(f"{painted('written', 'green')} {printable(path)}")


def _sizes(text: str) -> list[int]:
    try:
        sizes = [int(part.replace("_", "")) for part in text.split(",") if part.strip()]
    except ValueError:
        raise ValueError(f"--gpus {text!r}: numbers with commas between them, such as 1024,16384") from None
    if not sizes:
        raise ValueError("--gpus: no sizes")
    return sorted(set(sizes))


def _environment(out: str | None) -> Environment:
    from ..bench.environment import environment

    if out is None:
        return environment(".")
    import os

    os.makedirs(out, exist_ok=True)
    return environment(out)


def _show(rows: list[Row]) -> None:
    headers = [
        "engine",
        "gpus",
        "failure every",
        "stall",
        "durable",
        "steps",
        "cadence",
        "young",
        "daly",
        "goodput",
        "lost",
    ]
    simulated = any(row["simulated_goodput"] for row in rows)
    cells = [
        [
            row["engine"],
            str(row["gpus"]),
            _time(row["mtbf_seconds"]),
            _time(row["stall_seconds"]),
            _time(row["durable_seconds"]),
            str(row["interval_steps"]),
            _time(row["cadence_seconds"]),
            _time(row["cadence_seconds_young"]),
            _time(row["cadence_seconds_young_daly"]),
            _percent(row["goodput"]),
            _time(row["lost_seconds_per_failure"]),
            *([_spread(row)] if simulated else []),
        ]
        for row in rows
    ]
    emit_table([*headers, *(["simulated"] if simulated else [])], cells, right=_NUMBERS_AT_RIGHT)


def _time(seconds: float) -> str:
    """Three digits: "0.145 s", "12.3 min", "781 h"."""
    for unit, length in (("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{_digits(seconds / length)} {unit}"
    return f"{_digits(seconds)} s"


def _digits(number: float) -> str:
    return f"{number:.0f}" if number >= 100 else f"{number:.1f}" if number >= 10 else f"{number:.3g}"


def _percent(share: float) -> str:
    return f"{share:.2%}"


def _spread(row: Row) -> str:
    spread = row["simulated_goodput"]
    return "-" if spread is None else f"{_percent(spread['low'])} to {_percent(spread['high'])}"
