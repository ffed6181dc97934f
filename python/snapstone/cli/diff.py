"""`snapstone diff`."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import click

from .argument import directory_argument
from .exit_codes import ExitCode
from .output import bytes_option, emit, emit_json, emit_table, json_option, printable, size_format

if TYPE_CHECKING:
    from ..difference import Difference

__all__ = ["diff"]


@click.command(short_help="Compare two checkpoints.")
@directory_argument("a")
@directory_argument("b")
@click.option("--values", is_flag=True, help="Also the largest absolute difference of each changed tensor; reads them.")
@json_option
@bytes_option
@click.pass_context
def diff(ctx: click.Context, a: str, b: str, values: bool, as_json: bool, exact: bool) -> None:
    """Compares two checkpoints: tensors by digest, Python values by content.

    Payload is read only with --values, and for tensors that the two store in different pieces (other shards, packed
    with others).

    \b
    Examples:
      snapstone diff runs/gpt/step-00001000 runs/gpt/step-00002000
      snapstone diff before after --values         # how far apart?
      snapstone diff before after --json | jq '.changed[].name'

    Exits with 0 when nothing differs, with 1 when something does.
    """
    from .. import Checkpoint

    difference = Checkpoint.open(a).diff(b, values=values)
    if as_json:
        emit_json("diff", _document(a, b, difference))
    else:
        _show(difference, values, exact)
    ctx.exit(ExitCode.FINDING if difference else ExitCode.OK)


def _document(a: str, b: str, difference: Difference) -> dict[str, Any]:
    return {
        "a": a,
        "b": b,
        "same": not difference,
        "same_tensors": difference.same_tensors,
        "changed_bytes": difference.changed_bytes,
        "nbytes": difference.nbytes,
        "added": difference.added,
        "removed": difference.removed,
        "changed": [
            {
                "name": change.name,
                "before": change.before,
                "after": change.after,
                "nbytes": change.nbytes,
                "changed_bytes": change.changed_bytes,
                "max_abs_difference": _finite(change.max_abs_difference),
            }
            for change in difference.changed
        ],
        "changed_objects": difference.changed_objects,
    }


def _finite(number: float | None) -> float | str | None:
    """JSON has no NaN and no infinity: "nan", "inf"."""
    return number if number is None or math.isfinite(number) else str(number)


def _show(difference: Difference, values: bool, exact: bool) -> None:
    size = size_format(exact)
    for name in difference.removed:
        emit(f"- {printable(name)}")
    for name in difference.added:
        emit(f"+ {printable(name)}")
    for name in difference.changed_objects:
        emit(f"~ {printable(name)} (Python value)")
    if difference.changed:
        headers = ["changed tensor", "type", "changed", "of"] + (["max |a-b|"] if values else [])
        rows = [
            [
                change.name,
                change.before if change.before == change.after else f"{change.before} -> {change.after}",
                size(change.changed_bytes),
                size(change.nbytes),
                *(["-" if change.max_abs_difference is None else f"{change.max_abs_difference:g}"] if values else []),
            ]
            for change in difference.changed
        ]
        emit_table(headers, rows, right=("changed", "of", "max |a-b|"))
    emit(
        f"tensors: {difference.same_tensors} same, {len(difference.changed)} changed, {len(difference.added)} added, "
        f"{len(difference.removed)} removed; {size(difference.changed_bytes)} of {size(difference.nbytes)} differ "
        f"({difference.changed_share:.1%}); Python values: {len(difference.changed_objects)} differ"
    )
