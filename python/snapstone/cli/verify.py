"""`snapstone verify`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import click

from .argument import directory_argument
from .exit_codes import ExitCode
from .ls import exit_code
from .output import bytes_option, emit, emit_json, json_option, painted, printable, size_format

if TYPE_CHECKING:
    from .. import RepairReport
    from ..run_directory import Entry

__all__ = ["verify"]


@click.command(short_help="Check every byte of a checkpoint or of a whole run; repair what is damaged.")
@directory_argument("path", metavar="CKPT|RUN")
@click.option("--quick", is_flag=True, help="Manifest, indexes, presence and size of files; no payload is read.")
@click.option("--repair", "repairs", is_flag=True, help="Put damaged files right, as far as their bytes are found.")
@click.option(
    "--from",
    "sources",
    metavar="DIR",
    multiple=True,
    type=click.Path(exists=True, file_okay=False),
    help="With --repair: a checkpoint or run that may hold the same bytes, such as a replica. May be given often.",
)
@json_option
@bytes_option
@click.pass_context
def verify(
    ctx: click.Context, path: str, quick: bool, repairs: bool, sources: tuple[str, ...], as_json: bool, exact: bool
) -> None:
    """Checks every byte of a checkpoint, or of every checkpoint in a run directory, against its digest, and says what
    damage looks like.

    With --repair, damaged files are replaced by repaired ones: chunks with the same digest are copied from other
    checkpoints of the run and from those of --from, and single flipped bits are turned back.

    \b
    Examples:
      snapstone verify runs/gpt/step-00001000
      snapstone verify runs/gpt --quick            # the structure of all, in no time
      snapstone verify runs/gpt --json | jq '.checkpoints[].problems[]'
      snapstone verify runs/gpt --repair --from /mnt/replica/gpt

    Exits with 1 when anything is wrong, still is after --repair, or nothing is there to check.
    """
    from ..run_directory import verified

    if quick and repairs:
        raise click.UsageError("--repair needs to read every byte: not with --quick")
    if sources and not repairs:
        raise click.UsageError("--from is for --repair")
    level: Literal["quick", "full"] = "quick" if quick else "full"
    entries: list[Entry] = []
    reports: dict[str, RepairReport] = {}
    for found in verified(path, level, progress=True):
        entry = found
        if not as_json:
            _show(entry, level, exact)
        if repairs and entry.state in ("corrupt", "incomplete", "unreadable"):
            entry, reports[entry.path] = _repaired(entry, sources)
            if not as_json:
                _show_repair(entry, reports[entry.path])
        entries.append(entry)
    if not as_json and not entries:
        emit(f"no checkpoints in {printable(path)}")
    if as_json:
        emit_json("verify", _document(path, level, entries, reports))
    ctx.exit(max(exit_code(entries), *(_code(report) for report in reports.values()), ExitCode.OK))


def _repaired(entry: Entry, sources: tuple[str, ...]) -> tuple[Entry, RepairReport]:
    from .. import repair
    from ..run_directory import verified

    report = repair(entry.path, sources=sources, progress=True)
    return next(verified(entry.path, "full")), report


def _code(report: RepairReport) -> ExitCode:
    return ExitCode.OK if report else ExitCode.FINDING


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
    for one in entry.diagnoses:
        where = printable(one.path) + (f", chunk {one.chunk}" if one.chunk is not None else "")
        emit(f"    {where}: {printable(str(one))}")


def _show_repair(entry: Entry, report: RepairReport) -> None:
    for one in report.repaired:
        emit(f"  repaired: {printable(one)}")
    for other in report.checkpoints:
        if other != report.path:
            emit(f"  also repaired, as it has the same file: {printable(other)}")
    for problem in report.problems:
        emit(f"  not repaired: {printable(problem)}")
    state = painted("repaired", "green") if report else painted(entry.state, "bold red")
    emit(f"{printable(entry.path)}: {state}")


def _document(path: str, level: str, entries: list[Entry], reports: dict[str, RepairReport]) -> dict[str, object]:
    ok = exit_code(entries) is ExitCode.OK and all(reports.values())
    return {
        "path": path,
        "level": level,
        "ok": ok,
        "checkpoints": [_row(entry, reports.get(entry.path)) for entry in entries],
    }


def _row(entry: Entry, report: RepairReport | None) -> dict[str, Any]:
    row: dict[str, Any] = {
        "name": entry.name,
        "path": entry.path,
        "step": entry.step,
        "state": entry.state,
        "checked_bytes": entry.checked_bytes,
        "seconds": round(entry.seconds, 6),
        "problems": entry.problems,
        "diagnoses": [
            {
                "path": one.path,
                "tensor": one.tensor,
                "chunk": one.chunk,
                "rank": one.rank,
                "kind": one.kind,
                "detail": one.detail,
                "advice": one.advice,
                "offset": one.offset,
                "nbytes": one.nbytes,
            }
            for one in entry.diagnoses
        ],
    }
    if report is not None:
        row["repaired"] = report.repaired
        row["not_repaired"] = report.problems
        row["also_repaired"] = [other for other in report.checkpoints if other != report.path]
    return row
