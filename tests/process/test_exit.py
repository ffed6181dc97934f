"""A process that has saved ends like any other.

Invariants:
  1. Whatever the store's thread is doing when the interpreter leaves, the exit status is the program's own.
  2. A save in flight at the end of the interpreter, however it comes, is committed or fails by its deadline; only what
     ends the process at once leaves a directory, and the next save removes that.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn, optim

import snapstone as ss
from durability import small

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


# ---- ways to leave while a save is in flight

LEAVING = """
import os
import signal
import sys
import threading
import time
from pathlib import Path

import snapstone as ss
from durability import small
from snapstone import _native

run, how = Path(sys.argv[1]), sys.argv[2]


def in_flight():
    _native.fault_arm("pwrite:1+:delay=30;uring_write:1+:delay=30;fsync:1+:delay=30")
    return ss.async_save(small.state(1), checkpoint_id=run / "c", timeout=0.2 if how == "deadline" else None)


def leave():
    if how == "exception in a thread":
        raise RuntimeError("training ends here")
    if how == "sys.exit in a thread":
        sys.exit(7)


if how == "save at exit":
    import atexit

    atexit.register(lambda: ss.save(small.state(1), checkpoint_id=run / "c"))
    ss.save(small.state(2), checkpoint_id=run / "other")
    sys.exit(5)
handle = in_flight()
assert not handle.done()
if "in a thread" in how:
    thread = threading.Thread(target=leave)
    thread.start()
    thread.join()
    sys.exit(5)
if how == "os._exit":
    os._exit(6)
if how == "exception":
    raise RuntimeError("training ends here")
if how == "deadline":
    _native.fault_arm("fsync:1+:delay=800")
    sys.exit(5)
"""


@pytest.mark.parametrize(
    ("how", "status", "committed"),
    [
        ("exception", 1, True),
        ("exception in a thread", 5, True),
        ("sys.exit in a thread", 5, True),
        ("save at exit", 5, True),
        ("deadline", 5, False),
        ("os._exit", 6, False),
    ],
)
def test_however_a_process_leaves_its_save_ends(directory: Path, how: str, status: int, committed: bool) -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])}
    done = subprocess.run(
        [sys.executable, "-c", LEAVING, str(directory), how],
        env=environment,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == status, done.stderr
    assert ("training ends here" in done.stderr) == how.startswith("exception"), done.stderr
    assert (directory / "c").exists() == committed, done.stderr
    if committed:
        small.assert_holds(directory / "c", 1)
    if how != "os._exit":
        assert small.leftovers(directory) == []
    ss.save(small.state(3), checkpoint_id=directory / "next")
    assert small.leftovers(directory) == []
    small.assert_holds(directory / "next", 3)


def test_an_exception_between_the_save_and_the_step_is_the_trainers_alone(directory: Path) -> None:
    parameter = nn.Parameter(torch.zeros(1 << 20))
    optimizer = optim.SGD([parameter], lr=1.0)
    parameter.grad = torch.ones_like(parameter)
    handles = []
    for number in range(4):
        try:
            handles.append(ss.async_save({"w": parameter}, checkpoint_id=directory / str(number), fence=optimizer))
            raise ZeroDivisionError("a batch that cannot be read")
        except ZeroDivisionError:
            pass
        optimizer.step()  # the trainer goes on
    for number, handle in enumerate(handles):
        handle.result(60)
        assert (ss.Checkpoint.open(directory / str(number)).get_tensor("w") == -float(number)).all()
