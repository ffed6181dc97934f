"""`snapstone du`."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import click

from .argument import directory_argument
from .exit_codes import ExitCode
from .output import bytes_option, emit, emit_json, emit_table, json_option, printable, size_format

if TYPE_CHECKING:
    from ..run_directory import Leftover
    from .disk_use import DirectoryUse, RunUse

__all__ = ["du"]


@click.command(short_help="What the checkpoints of a run take on the disk.")
@directory_argument("run", default=".")
@json_option
@bytes_option
@click.pass_context
def du(ctx: click.Context, run: str, as_json: bool, exact: bool) -> None:
    """Reports what the checkpoints of a run directory take on the disk, files that several share counted once.

    Of each checkpoint: the blocks of its own files, of the files that it shares with earlier saves, and what removing
    it alone would free. No file is read.

    \b
    Examples:
      snapstone du runs/gpt
      snapstone du runs/gpt --json | jq '.checkpoints | max_by(.freed_bytes).name'

    Exits with 1 when there is no checkpoint.
    """
    from ..run_directory import find_checkpoints, find_leftovers, is_checkpoint
    from .disk_use import use_of

    found = find_checkpoints(run)
    leftovers = [] if is_checkpoint(run) else find_leftovers(run)
    use = use_of([*found, *(os.path.join(run, one.name) for one in leftovers)])
    if as_json:
        emit_json("du", _document(run, use, leftovers, len(found)))
    else:
        _show(run, use, leftovers, len(found), exact)
    ctx.exit(ExitCode.OK if found else ExitCode.FINDING)


def _name(path: str) -> str:
    return os.path.basename(os.path.abspath(path))


def _unshared_bytes(use: RunUse) -> int:
    return sum(one.own_bytes + one.shared_bytes for one in use.directories)


def _sizes(one: DirectoryUse) -> dict[str, int]:
    return {"own_bytes": one.own_bytes, "shared_bytes": one.shared_bytes, "freed_bytes": one.freed_bytes}


def _document(run: str, use: RunUse, leftovers: list[Leftover], count: int) -> dict[str, object]:
    return {
        "path": run,
        "total_bytes": use.total_bytes,
        "unshared_bytes": _unshared_bytes(use),
        "checkpoints": [{"name": _name(one.path), "path": one.path, **_sizes(one)} for one in use.directories[:count]],
        "leftovers": [
            {"name": left.name, "kind": left.kind, "state": left.state, **_sizes(one)}
            for left, one in zip(leftovers, use.directories[count:], strict=True)
        ],
    }


def _show(run: str, use: RunUse, leftovers: list[Leftover], count: int, exact: bool) -> None:
    size = size_format(exact)
    rows = [
        [_name(one.path), size(one.own_bytes), size(one.shared_bytes), size(one.freed_bytes)]
        for one in use.directories[:count]
    ]
    if rows:
        headers = ["name", "own", "shared", "frees"]
        emit_table(headers, rows, right=headers[1:])
    else:
        emit(f"no checkpoints in {printable(run)}")
    for left, one in zip(leftovers, use.directories[count:], strict=True):
        what = "unfinished save" if left.kind == "staging" else "replaced or discarded checkpoint"
        takes = f"{size(one.own_bytes + one.shared_bytes)}, frees {size(one.freed_bytes)}"
        emit(f"{left.name}: {what}, {left.state}, {takes}")
    emit(f"total {size(use.total_bytes)}; without shared files it would be {size(_unshared_bytes(use))}")
