"""`snapstone trace`."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import click

from .argument import directory_argument
from .exit_codes import ExitCode
from .output import emit, emit_json, json_option, printable
from .output_file import write_whole

if TYPE_CHECKING:
    from ..report import MergedTrace

__all__ = ["trace"]


@click.command(short_help="Merge traces of all ranks into one file for Perfetto.")
@directory_argument("results", metavar="R")
@click.option("-o", "--output", metavar="FILE", default="trace.json", show_default=True, help="- is stdout.")
@json_option
@click.pass_context
def trace(ctx: click.Context, results: str, output: str, as_json: bool) -> None:
    """Merges the traces that SNAPSTONE_TRACE left in the directory R, and the time lines of results there, into one
    file that Perfetto (ui.perfetto.dev) and chrome://tracing open.

    Ranks are processes, lanes are threads. The clocks of different hosts are aligned by the ends of the ranks' votes;
    stdout says by how much each was moved and how far the votes of that rank disagree.

    \b
    Examples:
      snapstone trace R/ -o trace.json             # after SNAPSTONE_TRACE=R/run.json torchrun ... train.py
      snapstone trace R/ --json | jq .clocks

    Exits with 1 when R has no event.
    """
    from ..report import merged_trace

    if as_json and output == "-":
        raise click.UsageError("--json and -o - both want stdout")
    merged = merged_trace(results)
    for line in merged.skipped:
        click.echo(f"snapstone: skipped {printable(line)}", err=True)
    if not merged.event_count:
        click.echo(f"snapstone: {printable(results)}: no trace, and no result with a time line", err=True)
        ctx.exit(ExitCode.FINDING)
    text = json.dumps(merged.document, separators=(",", ":"), allow_nan=False)
    if output == "-":
        emit(text)
        ctx.exit(ExitCode.OK)
    write_whole(output, text + "\n")
    if as_json:
        emit_json("trace", _document(output, merged))
    else:
        _show(output, merged)
    ctx.exit(ExitCode.OK)


def _document(output: str, merged: MergedTrace) -> dict[str, object]:
    return {
        "output": output,
        "events": merged.event_count,
        "clocks": [
            {
                "trace": title,
                "rank": rank,
                "offset_seconds": one.offset * 1e-6,
                "votes": one.votes,
                "spread_seconds": one.spread * 1e-6,
            }
            for title, ranks in merged.clocks.items()
            for rank, one in sorted(ranks.items())
        ],
        "skipped": merged.skipped,
    }


def _show(output: str, merged: MergedTrace) -> None:
    emit(f"{merged.event_count} events in {printable(output)}")
    for title, ranks in merged.clocks.items():
        for rank, one in sorted(ranks.items()):
            if len(ranks) == 1:
                continue
            moved = f"moved by {one.offset * 1e-6:.6f} s" if one.offset else "not moved"
            votes = f"{one.votes} votes agree within {one.spread * 1e-3:.3f} ms" if one.votes else "it has no votes"
            emit(f"{printable(title)}, rank {rank}: clock {moved}, {votes}")
