"""Everything that a command prints on stdout: tables, facts, JSON; sizes and ages; and the escaping of foreign text."""

from __future__ import annotations

import errno
import json
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import click

from .exit_codes import ExitCode

__all__ = [
    "bytes_option",
    "emit",
    "emit_facts",
    "emit_json",
    "emit_table",
    "human_age",
    "human_bytes",
    "json_option",
    "json_text",
    "json_value",
    "painted",
    "printable",
    "shortened",
    "size_format",
    "utc",
]

json_option = click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout; sizes are bytes.")
bytes_option = click.option("--bytes", "exact", is_flag=True, help="Exact sizes in bytes instead of KiB, MiB, GiB.")

# A longer cell pushes its own line aside: one hostile name must not pad every other line.
_COLUMN_CELLS_MAX = 100

_STYLES = {
    "ok": "green",
    "yes": "green",
    "corrupt": "bold red",
    "incomplete": "bold red",
    "incompatible": "bold red",
    "unreadable": "bold red",
    "missing": "bold red",
    "wrong size": "bold red",
    "not a file": "bold red",
    "live": "cyan",
    "dead": "yellow",
    "unknown": "yellow",
}


def printable(text: object) -> str:
    """Text from elsewhere: control characters, terminal escapes, bidirectional marks, lone surrogates are escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in str(text))


def shortened(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 3] + "..."


def human_bytes(nbytes: int) -> str:
    amount = float(nbytes)
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if amount < 1024 or unit == "TiB":
            return f"{nbytes} B" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1024
    raise AssertionError


def size_format(exact: bool) -> Callable[[int], str]:
    return str if exact else human_bytes


def human_age(seconds: float) -> str:
    """The two largest units: "3 d 4 h". A time to come is "0 s": clocks differ between machines."""
    left = max(0, int(seconds))
    parts: list[str] = []
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60), ("s", 1)):
        if left >= length or (unit == "s" and not parts):
            parts.append(f"{left // length} {unit}")
            left %= length
    return " ".join(parts[:2])


def utc(timestamp: float | None) -> str | None:
    return None if timestamp is None else datetime.fromtimestamp(timestamp, UTC).isoformat(timespec="seconds")


def emit(text: str) -> None:
    """Writes lines at once, so that a failure shows here and not when the interpreter ends."""
    try:
        sys.stdout.write(text + "\n")
        sys.stdout.flush()
    except OSError as error:
        _close_stdout()
        if error.errno == errno.EPIPE:
            raise SystemExit(ExitCode.BROKEN_PIPE) from None
        raise OSError(error.errno, error.strerror, "stdout") from None


def _close_stdout() -> None:
    """What is still buffered goes to /dev/null: the interpreter flushes once more when it ends."""
    descriptor = os.open(os.devnull, os.O_WRONLY)
    os.dup2(descriptor, sys.stdout.fileno())
    os.close(descriptor)


def emit_json(command: str, document: Mapping[str, Any]) -> None:
    emit(json_text(command, document))


def json_text(command: str, document: Mapping[str, Any]) -> str:
    return json.dumps({"schema": f"snapstone.{command}/1", **document}, indent=2, ensure_ascii=True, allow_nan=False)


def json_value(value: Any) -> Any:
    """A value of somebody else's JSON, or a description of one that JSON cannot hold (1e999, a thousand levels)."""
    try:
        json.dumps(value, allow_nan=False)
    except (ValueError, TypeError, RecursionError) as error:
        return {"$invalid": f"{type(error).__name__}: {error}"}
    return value


def painted(text: str, style: str) -> str:
    """`text` in a rich style where stdout is a terminal and NO_COLOR does not say otherwise."""
    if not style or not sys.stdout.isatty():
        return text
    from rich.color import ColorSystem
    from rich.console import Console
    from rich.style import Style

    console = Console(file=sys.stdout)
    if console.no_color or console.is_dumb_terminal or not console.is_terminal:
        return text
    return Style.parse(style).render(text, color_system=ColorSystem.STANDARD)


def emit_facts(facts: Iterable[tuple[str, str]]) -> None:
    """Two columns: what, and its value."""
    rows = [(printable(what), printable(value)) for what, value in facts]
    width = min(max(len(what) for what, _ in rows), _COLUMN_CELLS_MAX)
    emit("\n".join(f"{painted(what.ljust(width), 'bold')}  {_state(value)}" for what, value in rows))


def emit_table(headers: Sequence[str], rows: Sequence[Sequence[str]], *, right: Sequence[str] = ()) -> None:
    """Columns as wide as their cells: however long names are, a line is one row for `grep` and `awk`."""
    from rich.cells import cell_len

    cells = [[printable(cell) for cell in row] for row in rows]
    widths = [min(max(map(cell_len, column)), _COLUMN_CELLS_MAX) for column in zip(headers, *cells, strict=True)]

    def line(row: Sequence[str], style: Callable[[str], str]) -> str:
        parts: list[str] = []
        for position, (header, cell, width) in enumerate(zip(headers, row, widths, strict=True)):
            padding = " " * (width - cell_len(cell))
            last = position == len(widths) - 1
            parts.append(padding + style(cell) if header in right else style(cell) + ("" if last else padding))
        return "  ".join(parts)

    emit("\n".join([line(headers, lambda cell: painted(cell, "bold")), *(line(row, _state) for row in cells)]))


def _state(cell: str) -> str:
    return painted(cell, _STYLES.get(cell, ""))
