"""The README's stall table and chart: what `snapstone report DIRECTORY --markdown --chart FILE` writes."""

from __future__ import annotations

from pathlib import Path

from results import DIRECTORY

from snapstone.report import Measurements, chart_files, markdown

__all__ = ["CHART", "charts", "newest_stall", "table"]

CHART = "docs/images/stall.svg"  # as the README names it
THEME = "stall"
_INTRODUCTION = """\
What one save costs a training run, engine by engine: the wall time that it adds, until it is durable. Each engine saves
the same state, on the same machine, in processes of its own; what it saved was loaded and compared bit for bit.
[How it is measured](docs/bench.md)"""


def newest_stall(directory: Path = DIRECTORY) -> Path | None:
    """The directory of the latest full run, None where none is stored; the date ends its name."""
    found = sorted(directory.glob(f"{THEME}_*/"), key=lambda path: path.name.rpartition("_")[2])
    return found[-1] if found else None


def table(directory: Path | None) -> str:
    """Markdown; "" without a run: a README without a table is better than one with a gap.

    Raises:
        OSError, ValueError: the directory cannot be read, or holds no result.
    """
    if directory is None:
        return ""
    return f"{_INTRODUCTION}\n\n{markdown(_read(directory), CHART).rstrip()}"


def charts(directory: Path | None) -> dict[str, str]:
    """The SVG files that the table shows, by path."""
    return chart_files(_read(directory), CHART) if directory else {}


def _read(directory: Path) -> Measurements:
    found = Measurements.read(directory)
    if not found.of_kind("stall") or found.skipped:
        raise ValueError(f"{directory.name}: {'; '.join(found.skipped) or 'no result of snapstone bench stall'}")
    return found
