"""The command group: its commands, and how their errors end the process."""

from __future__ import annotations

import _thread
import os
import signal
import sys
import threading
import traceback
from typing import Any, NoReturn

import click

from .. import __version__
from .bench import bench
from .compact import compact
from .completion import completion
from .diff import diff
from .doctor import doctor
from .du import du
from .exit_codes import ExitCode, code_of, message_of
from .info import info
from .ls import ls
from .output import printable
from .report import report
from .trace import trace
from .verify import verify
from .watch import watch

__all__ = ["cli", "main"]


class _Commands(click.Group):
    """A group whose commands fail with one line on stderr and a documented exit code, never with a traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except (Exception, KeyboardInterrupt) as error:
            _fail(error)


def _fail(error: BaseException) -> NoReturn:
    if os.environ.get("SNAPSTONE_DEBUG", "0") not in ("", "0"):
        traceback.print_exception(error, file=sys.stderr)
    print(_line(error), end="", file=sys.stderr)
    raise SystemExit(code_of(error))


def _line(error: BaseException) -> str:
    return f"snapstone: {printable(message_of(error))}\n"


@click.group(
    cls=_Commands,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Exit codes: 0 ok, 1 damaged, different or nothing found, 2 usage, 3 not found, 4 I/O error, "
    "130 interrupted.",
)
@click.version_option(__version__, prog_name="snapstone", message="%(prog)s %(version)s")
def cli() -> None:
    """Lists, inspects, verifies, compares and compacts snapstone checkpoints.

    \b
    Examples:
      snapstone ls runs/gpt                        # every committed checkpoint of a run
      snapstone info runs/gpt/step-00001000        # what one checkpoint holds
      snapstone verify runs/gpt                    # every byte of every checkpoint
      snapstone diff runs/gpt/step-1 runs/gpt/step-2
      snapstone du runs/gpt                        # what it takes on the disk
      snapstone compact runs/gpt/step-00001000     # independent of the files it shares
      snapstone watch runs/gpt                     # its saves, while it trains
      snapstone doctor /mnt/checkpoints            # what this machine can do there
    """


for _command in (ls, info, verify, diff, du, compact, watch, doctor, bench, report, trace, completion):
    cli.add_command(_command)


def _interrupt(signal_number: int, frame: object) -> NoReturn:
    """An exception inside the first import of torch, which takes a second, would end in its C++ code as an abort."""
    torch = sys.modules.get("torch")
    if torch is not None and getattr(torch.__spec__, "_initializing", False):
        os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, _line(KeyboardInterrupt()).encode())
        os._exit(code_of(KeyboardInterrupt()))
    raise KeyboardInterrupt


def _unraisable(unraisable: Any) -> None:
    """What is raised in a finalizer, or in a callback of a weak reference as imports have them, Python drops: Ctrl-C
    that came just then comes again.
    """
    if issubclass(unraisable.exc_type, KeyboardInterrupt):
        again = threading.Timer(0.02, _thread.interrupt_main)
        again.daemon = True
        again.start()
    else:
        sys.__unraisablehook__(unraisable)


def main() -> NoReturn:
    """The console entry point."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupt)
        sys.unraisablehook = _unraisable
    # An undecodable or unencodable character must not end a listing; names are escaped, so this concerns paths.
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        cli.main(prog_name="snapstone")
    except KeyboardInterrupt:
        _fail(KeyboardInterrupt())
    raise SystemExit(ExitCode.OK)
