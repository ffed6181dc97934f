"""Children of fork(), as data loaders and trainers make them."""

from __future__ import annotations

import os
import signal
import time
import traceback
from collections.abc import Callable

WITHIN_S = 40.0


def fork(function: Callable[[], object]) -> int:
    """Calls the function in a child, which exits 0 when it returns, and 1 with a traceback when it raises."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            function()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return pid


def assert_ends_well(pid: int, within_s: float = WITHIN_S) -> None:
    """The child exits with 0. One that hangs is killed."""
    end = time.monotonic() + within_s
    while time.monotonic() < end:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            assert os.waitstatus_to_exitcode(status) == 0
            return
        time.sleep(0.005)
    os.kill(pid, signal.SIGUSR1)  # faulthandler's, where a rank has registered it
    time.sleep(0.3)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    raise AssertionError(f"the child {pid} hangs")


def assert_in_child(function: Callable[[], object], within_s: float = WITHIN_S) -> None:
    assert_ends_well(fork(function), within_s)
