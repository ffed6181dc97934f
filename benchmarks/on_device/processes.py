"""A command that gets so much time and no more, with everything that it starts."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Ended", "end_all", "run", "tail"]

_LEAVE_SECONDS = 3.0
_LOOK_SECONDS = 1.0
_TAIL_CHARACTERS = 3000
_running: list[subprocess.Popen[bytes]] = []


@dataclass(frozen=True, slots=True)
class Ended:
    seconds: float
    returncode: int | None  # None: it had to be ended, or would not even end then

    @property
    def problem(self) -> str | None:
        if self.returncode is None:
            return f"no end after {self.seconds:.0f} s"
        if self.returncode < 0:
            return f"ended by {signal.Signals(-self.returncode).name}"
        return f"ended with status {self.returncode}" if self.returncode else None


def run(
    command: Sequence[str],
    *,
    seconds: float,
    log: Path,
    environment: Mapping[str, str],
    cwd: Path,
    alive: Callable[[], bool] = lambda: True,
) -> Ended:
    """Its output goes to the end of `log`. At the limit, and once it is no longer `alive`, first SIGTERM, then SIGKILL,
    to its process group; one that does not end even then, as with a driver that hangs, is left behind.
    """
    begin = time.monotonic()
    with log.open("ab") as output:
        process = subprocess.Popen(
            list(command),
            env=dict(environment),
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    _running.append(process)
    returncode: int | None = None
    try:
        while returncode is None and alive() and time.monotonic() - begin < seconds:
            with suppress(subprocess.TimeoutExpired):
                returncode = process.wait(min(_LOOK_SECONDS, max(seconds, 0.01)))
    finally:
        _end(process)
        _running.remove(process)
    return Ended(time.monotonic() - begin, returncode)


def _end(process: subprocess.Popen[bytes]) -> None:
    """With its group, which may have outlived it."""
    if process.poll() is None:
        _signal(process, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(_LEAVE_SECONDS)
    _signal(process, signal.SIGKILL)
    with suppress(subprocess.TimeoutExpired):
        process.wait(_LEAVE_SECONDS)


def _signal(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, number)


def end_all() -> None:
    """Whatever runs now; for the end of the whole run."""
    for process in _running:
        _signal(process, signal.SIGKILL)


def tail(log: Path) -> str:
    """The end of what was said."""
    try:
        return log.read_bytes()[-_TAIL_CHARACTERS:].decode(errors="replace")
    except OSError as error:
        return str(error)
