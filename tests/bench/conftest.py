"""Runs `snapstone bench` as a user does: a process, or several under torchrun."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest

import snapstone

Bench = Callable[..., "subprocess.CompletedProcess[str]"]
LIMIT_SECONDS = 240  # for machines that are busy with other things; alone the longest takes 40 s


def measure(
    scratch: Path, *arguments: object, ranks: int = 1, interrupt_when: Callable[[], bool] | None = None
) -> subprocess.CompletedProcess[str]:
    """Output goes to files: an engine's process that outlives it would keep a pipe open."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    command = [sys.executable, *torchrun, "-m", "snapstone.bench", *map(str, arguments)]
    paths = [str(Path(snapstone.__file__).parents[1]), str(Path(__file__).parent)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    out, err = scratch / "stdout", scratch / "stderr"
    with out.open("w") as stdout, err.open("w") as stderr:
        process = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr, process_group=0
        )
        try:
            end = time.monotonic() + LIMIT_SECONDS
            while process.poll() is None and time.monotonic() < end:
                if interrupt_when is not None and interrupt_when():
                    process.send_signal(signal.SIGINT)
                    interrupt_when = None
                time.sleep(0.05)
        finally:
            ended = process.poll() is not None
            if not ended:
                process.terminate()  # torchrun then ends its ranks, which are in sessions of their own
                with suppress(subprocess.TimeoutExpired):
                    process.wait(10)
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    assert ended, f"no end after {LIMIT_SECONDS} s: {err.read_text()[-2000:]}"
    return subprocess.CompletedProcess(command, process.returncode, out.read_text(), err.read_text())


def memory_directory() -> tempfile.TemporaryDirectory[str]:
    """For checkpoints of runs that look at times: syncing a disk would wait for what others write there."""
    return tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None)


def pinned_packages() -> set[str]:
    """What `make setup` installs: a test that finds one of these absent fails."""
    lines = (Path(__file__).parents[2] / "constraints.txt").read_text().splitlines()
    return {line.partition("==")[0] for line in lines if "==" in line}


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return partial(measure, tmp_path)
