"""`snapstone bench link`."""

from __future__ import annotations

import sys
from statistics import median
from typing import TYPE_CHECKING, Literal

import click

from .exit_codes import ExitCode
from .output import emit, emit_json, emit_table, json_option, printable
from .size import size_in_bytes

if TYPE_CHECKING:
    from ..bench.results import Document

__all__ = ["link"]


@click.command(short_help="How fast bytes get from rank to rank, and to a device.")
@click.option(
    "--size",
    type=size_in_bytes,
    default="256MiB",
    show_default=True,
    metavar="SIZE",
    help="That arrives at each rank: 64MiB, 4GiB, or bytes.",
)
@click.option("--samples", type=click.IntRange(1, 1000), default=5, show_default=True, metavar="N", help="Rounds.")
@click.option(
    "--device",
    type=click.Choice(["cpu", "cuda"]),
    default="cpu",
    show_default=True,
    help="cuda: also NCCL, and copies between each rank's device and its host.",
)
@click.option("--out", metavar="R", help="Directory for the result, link-LABEL.json.")
@click.option("--label", metavar="LABEL", help="Of the result. Default: the number of ranks.")
@json_option
@click.pass_context
def link(
    ctx: click.Context,
    size: int,
    samples: int,
    device: Literal["cpu", "cuda"],
    out: str | None,
    label: str | None,
    as_json: bool,
) -> None:
    """Measures what carries bytes between the ranks that torchrun starts: what loads that read once are bound by.

    Out of memory that the ranks of a node share, and by broadcast and all_gather of the process group; with --device
    cuda also NCCL, and the copies from and to each device. All ranks at once, each link in turn, several times.

    \b
    Examples:
      torchrun --nproc-per-node 8 -m snapstone.bench link --out R/
      torchrun --nproc-per-node 8 -m snapstone.bench link --device cuda --size 1GiB --out R/
      snapstone bench link --device cuda

    GB/s are bytes that arrive at one rank. Exits with 1 when a link failed or brought other bytes than were sent.
    """
    import torch

    from .. import CheckpointError
    from ..bench import results
    from ..bench.link import begin, measure
    from ..bench.ranks import Ranks

    if device == "cuda" and not torch.cuda.is_available():
        raise click.UsageError("--device cuda: torch finds no CUDA device")
    ranks = Ranks(device)
    document = begin(ranks, device, ["snapstone", *sys.argv[1:]])

    def report(text: str) -> None:
        if ranks.rank == 0 and sys.stderr.isatty():
            print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)

    stopped: BaseException | None = None
    try:
        measure(document, ranks, device, nbytes=size, samples=samples, report=report)
    except (KeyboardInterrupt, CheckpointError) as error:
        stopped = error
        document["problems"].append("interrupted" if isinstance(error, KeyboardInterrupt) else f"stopped: {error}")
    if ranks.rank == 0:
        if out is not None:
            results.write(document, out, label or f"{ranks.world}-ranks")
        _show(document, ranks.world, as_json)
    if stopped is not None:
        raise stopped
    ctx.exit(ExitCode.OK if document["complete"] else ExitCode.FINDING)


def _show(document: Document, world: int, as_json: bool) -> None:
    if sys.stderr.isatty():
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)
    if as_json:
        emit_json("bench-link", document)
        return
    emit(f"bytes that arrive at each of {world} ranks" if world > 1 else "one rank")
    headers = ["link", "operation", "GB/s", "low", "high", "samples"]
    rows = []
    for one in document["links"]:
        if rates := [rate / 1e9 for rate in one["bytes_per_second"]]:
            numbers = [f"{rate:.2f}" for rate in (median(rates), min(rates), max(rates))]
            rows.append([one["transport"], one["operation"], *numbers, str(len(rates))])
    if rows:
        emit_table(headers, rows, right=headers[2:])
    for one in document["links"]:
        if one["reason"]:
            emit(printable(f"{one['transport']} {one['operation']}: {one['reason']}"))
