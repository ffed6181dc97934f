"""`snapstone watch`."""

from __future__ import annotations

import sys
import time
from contextlib import ExitStack
from typing import TYPE_CHECKING

import click

from .argument import directory_argument
from .exit_codes import ExitCode
from .output import bytes_option, emit, emit_json, json_option, printable, size_format

if TYPE_CHECKING:
    from ..watch import Observation, Watcher

__all__ = ["watch"]


@click.command(short_help="Follow the saves into a run while it trains.")
@directory_argument("run", default=".")
@click.option("--once", is_flag=True, help="Print what there is now and end.")
@click.option(
    "--interval",
    type=click.FloatRange(min=0.1),
    default=2.0,
    show_default=True,
    metavar="SECONDS",
    help="Between two looks.",
)
@click.option(
    "--metrics-port",
    type=click.IntRange(0, 65535),
    metavar="N",
    help="Serve the facts to Prometheus on this port; 0 takes a free one.",
)
@click.option(
    "--metrics-address", default="127.0.0.1", show_default=True, metavar="ADDRESS", help="Where that port listens."
)
@json_option
@bytes_option
@click.pass_context
def watch(
    ctx: click.Context,
    run: str,
    once: bool,
    interval: float,
    metrics_port: int | None,
    metrics_address: str,
    as_json: bool,
    exact: bool,
) -> None:
    """Shows how old the last durable checkpoint of a run is, and what the save in flight has written.

    Also how often the run saves, when the next checkpoint is due, which ranks are behind, how long the free space
    lasts, what dead saves left behind, and damaged checkpoints: all that is read from the directory. On the machine
    that trains also the stages and rates of each rank, its staging memory, and why its last save failed. Ends with
    Ctrl-C.

    \b
    Examples:
      snapstone watch runs/gpt
      snapstone watch runs/gpt --once
      snapstone watch runs/gpt --json | jq .last_durable.age_seconds
      snapstone watch runs/gpt --metrics-port 9464  # http://127.0.0.1:9464/metrics

    --json implies --once. With --once exits with 1 when nothing is durable, a checkpoint is damaged, or the last save
    of a rank failed.
    """
    from ..watch import Watcher
    from .watch_view import document, print_frame

    if (once or as_json) and metrics_port is not None:
        raise click.UsageError("--metrics-port goes on until Ctrl-C; leave out --once and --json")
    watcher = Watcher(run)
    seen = watcher.observe()
    if as_json:
        emit_json("watch", document(seen, run))
    elif once:
        print_frame(seen, run, size_format(exact))
    else:
        _follow(watcher, seen, run, interval, metrics_port, metrics_address, exact)
        return
    bad = seen.last is None or seen.problems or seen.processes.troubles
    ctx.exit(ExitCode.FINDING if bad else ExitCode.OK)


def _follow(
    watcher: Watcher, seen: Observation, run: str, interval: float, port: int | None, address: str, exact: bool
) -> None:
    with ExitStack() as stack:
        if port is not None:
            from ..watch.metrics import MetricsServer

            server = MetricsServer(watcher, port, address)
            stack.callback(server.close)
            print(f"metrics on {server.url}", file=sys.stderr, flush=True)
        try:
            if sys.stdout.isatty():
                _live(watcher, seen, run, interval, exact)
            else:
                _lines(watcher, seen, run, interval, exact)
        except KeyboardInterrupt:
            return  # the way to end it


def _live(watcher: Watcher, seen: Observation, run: str, interval: float, exact: bool) -> None:
    from rich.live import Live
    from rich.text import Text

    from .watch_view import renderable

    size = size_format(exact)
    with Live(renderable(seen, run, size), auto_refresh=False) as live:
        while True:
            time.sleep(interval)
            try:
                frame = renderable(watcher.observe(), run, size)
            except OSError as error:  # a mount that is away for a while: go on
                frame = Text(_unreadable(error), style="bold red")
            live.update(frame, refresh=True)


def _lines(watcher: Watcher, seen: Observation, run: str, interval: float, exact: bool) -> None:
    """For logs: frame after frame, an empty line between them."""
    from .watch_view import print_frame

    print_frame(seen, run, size_format(exact))
    while True:
        time.sleep(interval)
        emit("")
        try:
            seen = watcher.observe()
        except OSError as error:
            emit(_unreadable(error))
        else:
            print_frame(seen, run, size_format(exact))


def _unreadable(error: OSError) -> str:
    return printable(f"{error.filename or ''}: {error.strerror or error}")
