"""A process that has saved ends like any other.

Invariant: whatever the store's thread is doing when the interpreter leaves, the exit status is the program's own.
"""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import sys
import time
from contextlib import suppress

import torch.distributed as dist
from snapstone.collective import Deadline, Group
from snapstone.errors import RankFailedError


def ask_for_a_second(store):
    end = time.monotonic() + 1.0
    while time.monotonic() < end:
        store.check(["never"])


store = dist.TCPStore("127.0.0.1", 0, 1, True, wait_for_workers=False)
group = Group(0, [0, 1], store, "exit")
with suppress(RankFailedError):
    group.call(ask_for_a_second, Deadline(0.1))  # leaves a thread behind that is in and out of the store
sys.exit(int(sys.argv[1]))
"""


@pytest.mark.parametrize("status", [0, 3])
def test_a_store_call_under_way_does_not_abort_the_interpreter(status: int) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(status)], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == status, done.stderr
    assert "terminate called" not in done.stderr
