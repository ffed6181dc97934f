"""`snapstone compact`."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import click

from .argument import directory_argument
from .exit_codes import ExitCode, code_of, message_of
from .output import bytes_option, emit, emit_json, json_option, painted, printable, size_format

if TYPE_CHECKING:
    from .. import Checkpoint

__all__ = ["compact"]


@click.command(short_help="Make checkpoints independent of the files they share.")
@directory_argument("ckpts", metavar="CKPT...", nargs=-1, required=True)
@json_option
@bytes_option
@click.pass_context
def compact(ctx: click.Context, ckpts: tuple[str, ...], as_json: bool, exact: bool) -> None:
    """Copies what each checkpoint shares with earlier ones into files of its own, verifies the copy, and puts it in its
    place.

    A checkpoint of delta saves can be deleted, moved and copied without this. It is for one that is to be kept for
    long: as long as it links a file of an earlier save, all of that file takes space, used or not.

    At any moment the old or the new checkpoint is there, whole. Other checkpoints do not change.

    \b
    Examples:
      snapstone compact runs/gpt/step-00001000
      snapstone compact runs/gpt/step-*/           # all; du says what that would free
      snapstone compact runs/gpt/final --json | jq '.checkpoints[].copied_bytes'

    Exits with 1 when a checkpoint is damaged; it stays as it was. The others are compacted.
    """
    rows = []
    worst = ExitCode.OK
    for path in ckpts:
        row, code = _compacted(path)
        worst = max(worst, code)
        rows.append(row)
        if not as_json:
            _show(row, exact)
    if as_json:
        emit_json("compact", {"checkpoints": rows})
    ctx.exit(worst)


def _compacted(path: str) -> tuple[dict[str, Any], ExitCode]:
    from .. import compact as compact_checkpoint

    begin = time.monotonic()
    checkpoint: Checkpoint | None = None
    problem: str | None = None
    code = ExitCode.OK
    try:
        checkpoint = compact_checkpoint(path, progress=True)
    except Exception as error:
        code, problem = code_of(error), message_of(error)
        if code in (ExitCode.INTERNAL, ExitCode.USAGE):
            raise
    copied = None if checkpoint is None else checkpoint.stats.get("copied_bytes", 0)
    row = {
        "path": path,
        "state": "failed" if checkpoint is None else "compacted" if checkpoint.stats else "unchanged",
        "step": None if checkpoint is None else checkpoint.step,
        "save_id": None if checkpoint is None else checkpoint.save_id,
        "copied_bytes": copied,
        "seconds": round(time.monotonic() - begin, 6),
        "problem": problem,
    }
    return row, code


def _show(row: dict[str, Any], exact: bool) -> None:
    path = printable(row["path"])
    if row["state"] == "failed":
        click.echo(f"snapstone: {path}: not compacted: {printable(row['problem'])}", err=True)
    elif row["state"] == "unchanged":
        emit(f"{path}: {painted('unchanged', 'green')}, it shares no files")
    else:
        size = size_format(exact)(row["copied_bytes"])
        emit(f"{path}: {painted('compacted', 'green')}, {size} in {row['seconds']:.2f} s")
