"""`snapstone ls`."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from .argument import directory_argument
from .exit_codes import ExitCode
from .output import (
    bytes_option,
    emit,
    emit_json,
    emit_table,
    human_age,
    json_option,
    printable,
    size_format,
    utc,
)

if TYPE_CHECKING:
    from ..run_directory import Entry, Leftover

__all__ = ["ls"]


@click.command(short_help="List the committed checkpoints of a run.")
@directory_argument("run", default=".")
@json_option
@bytes_option
@click.pass_context
def ls(ctx: click.Context, run: str, as_json: bool, exact: bool) -> None:
    """Lists the committed checkpoints of a run directory.

    Manifests and indexes are checked, and the presence and size of every file, as `verify --quick` does. Directories of
    unfinished or replaced saves (.staging-*, .trash-*) are mentioned: a dead one goes with the next save.

    \b
    Examples:
      snapstone ls runs/gpt
      snapstone ls                                 # the current directory
      snapstone ls runs/gpt --json | jq -r '.checkpoints[] | select(.state == "ok") | .path'

    Exits with 1 when there is no checkpoint or one is damaged.
    """
    from ..run_directory import find_leftovers, is_checkpoint, verified

    entries = list(verified(run, "quick"))
    entries.sort(key=lambda entry: entry.step if entry.step is not None else float("inf"))
    leftovers = [] if is_checkpoint(run) or not os.path.isdir(run) else find_leftovers(run)
    if as_json:
        emit_json("ls", _document(run, entries, leftovers))
    else:
        _show(run, entries, leftovers, exact)
    ctx.exit(exit_code(entries))


def exit_code(entries: Sequence[Entry]) -> ExitCode:
    """Of what was found, unreadable before damaged."""
    if any(entry.state == "unreadable" for entry in entries):
        return ExitCode.IO_ERROR
    return ExitCode.OK if entries and all(entry.state == "ok" for entry in entries) else ExitCode.FINDING


def _document(run: str, entries: Sequence[Entry], leftovers: Sequence[Leftover]) -> dict[str, object]:
    from ..run_directory import committed_at

    rows = []
    for entry in entries:
        checkpoint = entry.checkpoint
        rows.append(
            {
                "name": entry.name,
                "path": entry.path,
                "step": entry.step,
                "nbytes": checkpoint.nbytes if checkpoint else None,
                "stored_bytes": checkpoint.own_nbytes if checkpoint else None,
                "world_size": checkpoint.world_size if checkpoint else None,
                "committed_at": utc(committed_at(entry.path)),
                "state": entry.state,
                "problems": entry.problems,
            }
        )
    return {
        "path": run,
        "checkpoints": rows,
        "leftovers": [
            {"name": one.name, "kind": one.kind, "state": one.state, "age_seconds": round(max(0.0, one.age_seconds), 3)}
            for one in leftovers
        ],
    }


def _show(run: str, entries: Sequence[Entry], leftovers: Sequence[Leftover], exact: bool) -> None:
    from ..run_directory import committed_at

    size = size_format(exact)
    now = time.time()
    rows = []
    for entry in entries:
        checkpoint, written = entry.checkpoint, committed_at(entry.path)
        rows.append(
            [
                entry.name,
                "-" if entry.step is None else str(entry.step),
                size(checkpoint.nbytes) if checkpoint else "-",
                "-" if written is None else human_age(now - written),
                str(checkpoint.world_size) if checkpoint else "-",
                entry.state,
            ]
        )
    if rows:
        emit_table(["name", "step", "size", "age", "ranks", "state"], rows, right=("step", "size", "age", "ranks"))
    else:
        emit(f"no checkpoints in {printable(run)}")
    for entry in entries:
        for problem in entry.problems:
            emit(printable(f"{entry.name}: {problem}"))
    for one in leftovers:
        what = "unfinished save" if one.kind == "staging" else "replaced or discarded checkpoint"
        emit(f"{one.name}: {what}, {one.state}, {human_age(one.age_seconds)} old")
