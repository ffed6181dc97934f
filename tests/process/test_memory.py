"""A save that gets no memory: refused by the kernel, or killed for it.

Invariants:
  1. What is refused is an error with ENOMEM or MemoryError, and the process goes on: training, and the next save.
  2. What is killed leaves what any kill leaves: every checkpoint whole, and a directory that the next save removes.
"""

from __future__ import annotations

import errno
import os
import resource
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest
import torch
from torch import nn, optim

import snapstone as ss
from distributed import ranks
from durability import small
from lacking import skip_without
from snapstone import _native

MIB = 1 << 20
STATE_BYTES = 256 * MIB
LIMIT_BYTES = 96 * MIB
CGROUPS_1 = Path("/sys/fs/cgroup/memory")
CGROUPS_2 = [Path("/sys/fs/cgroup"), Path("/sys/fs/cgroup/unified")]


def address_space_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def save_without_memory(rank: int, directory: str, how: str) -> str:
    run = Path(directory)
    ss.save(small.state(1), checkpoint_id=run / "before")
    parameter = nn.Parameter(torch.zeros(STATE_BYTES // 4))
    optimizer = optim.SGD([parameter], lr=1.0)
    parameter.grad = torch.ones_like(parameter)
    fence = optimizer if how == "optimizer" else "now"
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (address_space_bytes() + 96 * MIB, most))
    said = ""
    try:
        handle = ss.async_save({"w": parameter}, checkpoint_id=run / "c", fence=fence, host_memory_budget=1 << 30)
        optimizer.step()
        handle.result(60)
    except MemoryError:
        said = "MemoryError"
    except OSError as error:
        said = errno.errorcode[error.errno]
    optimizer.step()  # training goes on, and nothing holds it up
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    assert os.listdir(run) == ["before"]
    assert small.open_files(run) == []
    steps = int(-parameter[0].item())
    ss.async_save({"w": parameter}, checkpoint_id=run / "c", fence=fence, host_memory_budget=1 << 30).result(60)
    assert (ss.Checkpoint.open(run / "c").get_tensor("w") == -steps).all()
    assert small.leftovers(run) == []
    small.assert_slots_free()
    small.assert_holds(run / "before", 1)
    return said


@pytest.mark.parametrize("how", ["now", "optimizer"])
def test_refused_staging_memory_is_an_error_and_training_goes_on(directory: Path, how: str) -> None:
    (said,) = ranks.values(ranks.run_ranks(1, save_without_memory, str(directory), how, store="none", timeout=100))
    assert said in ("ENOMEM", "MemoryError")


# ---- killed for it


def limit_1(made: ExitStack) -> Path:
    path = make(made, CGROUPS_1)
    (path / "memory.limit_in_bytes").write_text(str(LIMIT_BYTES))
    with suppress(OSError):  # where swap is accounted for, it is no way out
        (path / "memory.memsw.limit_in_bytes").write_text(str(LIMIT_BYTES))
    return path


def limit_2(made: ExitStack, root: Path) -> Path:
    """Cgroups below `root` have a limit of memory if its `cgroup.subtree_control` says so."""
    control = root / "cgroup.subtree_control"
    if "memory" not in control.read_text().split():
        control.write_text("+memory")
        made.callback(write_quietly, control, "-memory")
    path = make(made, root)
    (path / "memory.max").write_text(str(LIMIT_BYTES))
    with suppress(OSError):
        (path / "memory.swap.max").write_text("0")
    return path


def write_quietly(file: Path, text: str) -> None:
    with suppress(OSError):  # somebody else may need it by now
        file.write_text(text)


def make(made: ExitStack, parent: Path) -> Path:
    path = parent / f"snapstone-test-{os.getpid()}"
    path.mkdir()
    made.callback(remove, path)
    return path


def remove(path: Path) -> None:
    """A cgroup can be removed a moment after its last process has ended."""
    for _ in range(100):
        with suppress(OSError):
            path.rmdir()
        if not path.exists():
            return
        time.sleep(0.05)


@pytest.fixture
def cgroup() -> Iterator[Path]:
    """A memory cgroup with a limit of 96 MiB, of version 1 or 2, whichever has the memory controller here."""
    with ExitStack() as made:
        try:
            if CGROUPS_1.is_dir():
                path = limit_1(made)
            else:
                root = next(one for one in CGROUPS_2 if (one / "cgroup.controllers").exists())
                path = limit_2(made, root)
        except (OSError, StopIteration) as error:
            skip_without("cgroup", f"no memory cgroup can be made: {error!r}")
        yield path


def save_in_cgroup(rank: int, directory: str, cgroup: str) -> None:
    run = Path(directory)
    ss.save(small.state(1), checkpoint_id=run / "before")
    state = {"t": torch.ones(STATE_BYTES // 4)}  # not the cgroup's: it pays for what is touched inside
    Path(cgroup, "cgroup.procs").write_text(str(os.getpid()))
    _native.fault_arm("uring_write:1+:delay=20;pwrite:1+:delay=20")
    ss.async_save(state, checkpoint_id=run / "c", host_memory_budget=1 << 30).result(60)


def test_killed_for_memory_while_staging(tmp_path: Path, cgroup: Path) -> None:
    (end,) = ranks.run_ranks(1, save_in_cgroup, str(tmp_path), str(cgroup), store="none", timeout=100)
    assert (end.outcome, end.exitcode) == ("died", -signal.SIGKILL), end
    assert not (tmp_path / "c").exists()
    small.assert_holds(tmp_path / "before", 1)
    ss.save(small.state(2), checkpoint_id=tmp_path / "next")
    assert small.leftovers(tmp_path) == []
    small.assert_holds(tmp_path / "next", 2)
