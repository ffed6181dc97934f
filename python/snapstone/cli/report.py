"""`snapstone report`."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import click

from .argument import directory_argument
from .exit_codes import ExitCode
from .output import emit, emit_json, json_option, json_text, printable
from .output_file import write_whole

if TYPE_CHECKING:
    from ..report import Measurements

__all__ = ["report"]


@click.command(short_help="Show benchmark results as one page, or as text.")
@directory_argument("results", metavar="R")
@click.option(
    "-o", "--output", metavar="FILE", help="Default: report.html, or stdout for the other formats; - is stdout."
)
@json_option
@click.option("--markdown", "as_markdown", is_flag=True, help="Tables for a README.")
@click.option("--csv", "as_csv", is_flag=True, help="One line per measured number.")
@click.option("--chart", metavar="FILE", help="Also the stall chart as SVG: FILE, FILE-narrow.")
@click.pass_context
def report(
    ctx: click.Context,
    results: str,
    output: str | None,
    as_json: bool,
    as_markdown: bool,
    as_csv: bool,
    chart: str | None,
) -> None:
    """Shows what snapstone bench left in the directory R: one HTML file with charts and their data, without network.

    Files of another version of the format, or damaged ones, are named and left out. Results of machines that differ are
    shown with a warning.

    \b
    Examples:
      snapstone report R/ -o report.html
      snapstone report R/ --markdown --chart stall.svg
      snapstone report R/ --json | jq '.documents[].document.kind'

    Exits with 1 when there is no result in R.
    """
    from ..report import Measurements, chart_files, csv_text, markdown, page

    if as_json + as_markdown + as_csv > 1:
        raise click.UsageError("--json, --markdown and --csv exclude each other")
    found = Measurements.read(results)
    for line in found.skipped:
        click.echo(f"snapstone: skipped {printable(line)}", err=True)
    if as_json:
        _write_json(found, output)
        ctx.exit(_code(found))
    if not found.all:
        click.echo(f"snapstone: {printable(results)}: no results of snapstone bench", err=True)
        ctx.exit(ExitCode.FINDING)
    if chart is not None:
        files = chart_files(found, chart)
        if not files:
            raise ValueError(f"{results}: no result of snapstone bench stall, so there is no chart to write")
        for path, drawing in files.items():
            write_whole(path, drawing)
    if as_markdown:
        _write(markdown(found, _link(chart, output)), output or "-")
    elif as_csv:
        _write(csv_text(found), output or "-")
    else:
        _write(page(found), output or "report.html")
    ctx.exit(ExitCode.OK)


def _code(found: Measurements) -> ExitCode:
    return ExitCode.OK if found.all else ExitCode.FINDING


def _write_json(found: Measurements, output: str | None) -> None:
    from ..report import json_document

    if output in (None, "-"):
        emit_json("report", json_document(found))
    else:
        write_whole(str(output), json_text("report", json_document(found)) + "\n")


def _link(chart: str | None, output: str | None) -> str | None:
    """The chart as the Markdown file names it: relative to the directory of that file."""
    if chart is None:
        return None
    return os.path.relpath(chart, os.path.dirname(output) or "." if output and output != "-" else ".")


def _write(text: str, output: str) -> None:
    if output == "-":
        emit(text.removesuffix("\n"))
    else:
        write_whole(output, text)
        click.echo(f"wrote {printable(output)}", err=True)
