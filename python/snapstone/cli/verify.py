"""`snapstone verify`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import click

from .argument import directory_argument
from .exit_codes import ExitCode
from .ls import exit_code
from .output import bytes_option, emit, emit_json, json_option, painted, printable, size_format

if TYPE_CHECKING:
    from ..run_directory import Entry

__all__ = ["verify"]


@click.command(short_help="Check every byte of a checkpoint or of a whole run.")
@directory_argument("path", metavar="CKPT|RUN")
@click.option("--quick", is_flag=True, help="Manifest, indexes, presence and size of files; no payload is read.")
@json_option
@bytes_option
@click.pass_context
def verify(ctx: click.Context, path: str, quick: bool, as_json: bool, exact: bool) -> None:
    """Checks every byte of a checkpoint, or of every checkpoint in a run directory, against its digest.

    \b
    Examples:
      snapstone verify runs/gpt/step-00001000
      snapstone verify runs/gpt --quick            # the structure of all, in no time
      snapstone verify runs/gpt --json | jq '.checkpoints[].problems[]'

    Exits with 1 when anything is wrong or nothing is there to check.
    """
    from ..run_directory import verified

    level: Literal["quick", "full"] = "quick" if quick else "full"
    entries = []
    for entry in verified(path, level, progress=True):
        entries.append(entry)
        if not as_json:
            _show(entry, level, exact)
    if not as_json and not entries:
        emit(f"no checkpoints in {printable(path)}")
    if as_json:
        emit_json("verify", _document(path, level, entries))
    ctx.exit(exit_code(entries))


def _show(entry: Entry, level: str, exact: bool) -> None:
    size = size_format(exact)(entry.checked_bytes)
    if entry.state == "ok":
        what = f"{level} check of {size} in {entry.seconds:.2f} s"
        if level == "full" and entry.seconds > 0:
            what += f" ({entry.checked_bytes / entry.seconds / 1e9:.2f} GB/s)"
        emit(f"{printable(entry.path)}: {painted('ok', 'green')}, {what}")
        return
    emit(f"{printable(entry.path)}: {painted(entry.state, 'bold red')}, {level} check")
    for problem in entry.problems:
        emit(f"  {printable(problem)}")


def _document(path: str, level: str, entries: list[Entry]) -> dict[str, object]:
    return {
        "path": path,
        "level": level,
        "ok": exit_code(entries) is ExitCode.OK,
        "checkpoints": [
            {
                "name": entry.name,
                "path": entry.path,
                "step": entry.step,
                "state": entry.state,
                "checked_bytes": entry.checked_bytes,
                "seconds": round(entry.seconds, 6),
                "problems": entry.problems,
            }
            for entry in entries
        ],
    }
