"""`snapstone bench disk`."""

from __future__ import annotations

import sys
from statistics import median
from typing import TYPE_CHECKING, Any

import click

from .argument import directory_argument
from .exit_codes import ExitCode
from .output import emit, emit_json, emit_table, json_option, printable
from .size import size_in_bytes

if TYPE_CHECKING:
    from ..bench.results import Document, Probe

__all__ = ["disk"]


@click.command(short_help="What a directory takes and gives, and each I/O rung in it.")
@directory_argument("directory", metavar="[DIR]", default=".")
@click.option(
    "--size",
    type=size_in_bytes,
    default="1GiB",
    show_default=True,
    metavar="SIZE",
    help="Of the file: 512MiB, 4GiB, or bytes.",
)
@click.option("--samples", type=click.IntRange(1, 1000), default=5, show_default=True, metavar="N", help="Rounds.")
@click.option("--out", metavar="R", help="Directory for the result, disk-LABEL.json.")
@click.option("--label", default="limit", show_default=True, metavar="LABEL", help="Of the result.")
@json_option
@click.pass_context
def disk(
    ctx: click.Context, directory: str, size: int, samples: int, out: str | None, label: str, as_json: bool
) -> None:
    """Measures the limit of DIR (default: the current directory) and compares every I/O rung of the engine with it.

    The limit is what fio gets with io_uring and O_DIRECT; where fio is not installed or these do not work, what a
    probe of our own gets. Each rung saves and loads a checkpoint of the same size, durable and verified. One file at a
    time is written, into a directory that is removed again.

    \b
    Examples:
      snapstone bench disk /mnt/checkpoints
      snapstone bench disk --size 8GiB --samples 9 --out R/
      snapstone bench disk --json | jq '.probes[] | select(.tool == "fio")'

    After Ctrl-C what was measured is shown and written. Exits with 1 when a probe failed on the way.
    """
    from ..bench import results
    from ..bench.disk import begin, measure

    document = begin(directory, ["snapstone", *sys.argv[1:]])
    interrupted = False
    try:
        measure(document, directory, nbytes=size, samples=samples, report=_report)
    except KeyboardInterrupt:
        interrupted = True
        document["problems"].append("interrupted")
    if out is not None:
        path = results.write(document, out, label)
        print(f"wrote {printable(path)}", file=sys.stderr)
    if as_json:
        emit_json("bench-disk", document)
    else:
        _show(document)
    if interrupted:
        raise KeyboardInterrupt
    ctx.exit(ExitCode.OK if document["complete"] else ExitCode.FINDING)


def _report(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="" if text else "\n", file=sys.stderr, flush=True)


def _show(document: Document) -> None:
    if sys.stderr.isatty():
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)
    storage: Any = document["environment"]["storage"]
    kind = f"{storage['file_system']} on {storage['device']}" if storage["device"] else storage["file_system"]
    emit(printable(f"{storage['directory']}: {kind}"))
    headers = ["tool", "rung", "operation", "GB/s", "low", "high", "samples"]
    rows = [_row(probe) for probe in document["probes"] if probe["bytes_per_second"]]
    if rows:
        emit_table(headers, rows, right=headers[3:])
    for probe in document["probes"]:
        if probe["reason"] and probe["operation"] == "write":
            emit(printable(f"{probe['tool']} {probe['rung']}: {probe['reason']}"))
    for problem in document["problems"]:
        emit(printable(f"problem: {problem}"))


def _row(probe: Probe) -> list[str]:
    rates = [rate / 1e9 for rate in probe["bytes_per_second"]]
    numbers = [f"{rate:.2f}" for rate in (median(rates), min(rates), max(rates))]
    return [probe["tool"], probe["rung"], probe["operation"], *numbers, str(len(rates))]
