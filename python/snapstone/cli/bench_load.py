"""`snapstone bench load`."""

from __future__ import annotations

import sys
from statistics import median
from typing import TYPE_CHECKING, Literal

import click

from .exit_codes import ExitCode
from .output import emit, emit_json, emit_table, human_bytes, json_option, printable

if TYPE_CHECKING:
    from ..bench.ranks import Ranks
    from ..bench.results import Document

__all__ = ["load"]


@click.command(short_help="Cold loads of a checkpoint, by strategy.")
@click.option("--from", "checkpoint", required=True, metavar="CKPT", help="The checkpoint, or a .safetensors file.")
@click.option(
    "--strategy",
    "strategies",
    default="direct,scatter,broadcast",
    show_default=True,
    metavar="NAME,...",
    help="Who reads what: direct, scatter, broadcast, auto.",
)
@click.option(
    "--layout",
    type=click.Choice(["replicated", "sharded"]),
    default="replicated",
    show_default=True,
    help="What each rank wants: all of it, or its part along dimension 0.",
)
@click.option("--samples", type=click.IntRange(1, 1000), default=5, show_default=True, metavar="N", help="Rounds.")
@click.option(
    "--timeout",
    type=click.FloatRange(min=0, min_open=True),
    default=600.0,
    show_default=True,
    metavar="SECONDS",
    help="Of one load.",
)
@click.option("--out", metavar="R", help="Directory for the result, load-LABEL.json.")
@click.option("--label", metavar="LABEL", help="Of the result. Default: number of ranks and layout.")
@json_option
@click.pass_context
def load(
    ctx: click.Context,
    checkpoint: str,
    strategies: str,
    layout: Literal["replicated", "sharded"],
    samples: int,
    timeout: float,
    out: str | None,
    label: str | None,
    as_json: bool,
) -> None:
    """Measures cold loads of a checkpoint, alone or by the ranks that torchrun starts.

    Each strategy in turn, several times; the page cache of the checkpoint's files is dropped before each load. Every
    load verifies digests as always, and what it left in memory is compared with an independent read. A safetensors file
    is loaded by the packages that are made for it, as far as they are installed.

    \b
    Examples:
      snapstone bench load --from runs/gpt/step-1000 --out R/
      torchrun --nproc-per-node 8 -m snapstone.bench load --from runs/gpt/step-1000 --out R/
      snapstone bench load --from runs/gpt/step-1000 --layout sharded --strategy direct,auto
      snapstone bench load --from model.safetensors --out R/

    Alone, all strategies are one. Exits with 1 when a load failed, left a wrong byte, or was not cold.
    """
    from .. import CheckpointError
    from ..bench import results
    from ..bench.load import begin, measure
    from ..bench.ranks import Ranks

    ranks = Ranks("cpu")
    names = [name.strip() for name in strategies.split(",") if name.strip()]
    document = begin(checkpoint, names, ranks, ["snapstone", *sys.argv[1:]], layout)

    def keep() -> None:
        if out is not None and ranks.rank == 0:
            results.write(document, out, label or f"{ranks.world}-ranks-{layout}")

    def report(text: str) -> None:
        if ranks.rank == 0 and sys.stderr.isatty():
            print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)

    stopped: BaseException | None = None
    try:
        keep()
        measure(document, ranks, samples=samples, timeout=timeout, keep=keep, report=report)
    except (KeyboardInterrupt, CheckpointError) as error:
        stopped = error
        document["problems"].append("interrupted" if isinstance(error, KeyboardInterrupt) else f"stopped: {error}")
        keep()
    _finish(document, ranks, as_json)
    if stopped is not None:
        raise stopped
    ctx.exit(ExitCode.OK if document["complete"] else ExitCode.FINDING)


def _finish(document: Document, ranks: Ranks, as_json: bool) -> None:
    if ranks.rank != 0:
        return
    if sys.stderr.isatty():
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)
    if as_json:
        emit_json("bench-load", document)
    else:
        _show(document, ranks.world)


def _show(document: Document, world: int) -> None:
    saved = document["checkpoint"]
    who = "one rank" if world == 1 else f"{world} ranks"
    emit(printable(f"{saved['path']}: {human_bytes(saved['nbytes'])}, {saved['layout']}, loaded by {who}"))
    headers = ["engine", "strategy", "seconds", "low", "high", "GB/s", "read", "loads"]
    rows = []
    for one in document["loads"]:
        if times := one["seconds"]:
            middle = median(times)
            numbers = [f"{seconds:.3f}" for seconds in (middle, min(times), max(times))]
            rate = f"{one['nbytes'] / middle / 1e9:.2f}"
            read = "-" if one["bytes_read"] is None else human_bytes(one["bytes_read"])
            rows.append([one["engine"], one["strategy"], *numbers, rate, read, str(len(times))])
    if rows:
        emit_table(headers, rows, right=headers[2:])
        emit(f"cold by {document['loads'][0]['cold_by']}; seconds of the slowest rank")
    for one in document["loads"]:
        if one["status"] == "absent":
            emit(printable(f"{one['engine']} {one['strategy']}: {one['reason']}"))
    for problem in document["problems"]:
        emit(printable(f"problem: {problem}"))
