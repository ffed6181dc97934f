"""Leaves out one step of the engine after the other: `python -m cuda.without_a_step KIND/NAME...` on the fake driver.
Of each it prints what went wrong for the lack of it, or nothing; in a process of its own, which may die of what the
host touches then.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import sys
import tempfile
from pathlib import Path
from typing import NoReturn

import pytest
import torch

import snapstone as ss
from cuda import fake_torch
from cuda.device import FakeDevices
from cuda.fake_driver import FakeDriver
from cuda.left_out import step_left_out
from cuda.scenarios import FAILING, SCENARIOS, Scenario
from snapstone import reader

SECONDS_MAX = 60
SEEDS = 4
PROCESSES = 2  # most of what happens is late work


def _trouble(fake: FakeDriver, devices: FakeDevices, scenario: Scenario, step: str, seed: int) -> str:
    """What went wrong without the step; empty if nothing did."""
    fake.reset()
    fake.seed(seed)
    trouble = ""
    with tempfile.TemporaryDirectory() as directory:
        try:
            with step_left_out(step):
                scenario(devices, Path(directory) / "c")
        except BaseException as error:
            trouble = f"{type(error).__name__}: {error}"[:200]
        try:
            ss.wait()
        except Exception as error:
            trouble = trouble or repr(error)[:200]
    gc.collect()
    fake.drain()
    return trouble or "; ".join(fake.violations()[:1])


def _likely(step: str) -> list[Scenario]:
    """All scenarios, first those that have to do with the step."""
    which, name = step.split("/")[1:]
    candidates = [*FAILING, *SCENARIOS] if name.startswith("hung") else [*SCENARIOS, *FAILING]
    return sorted(candidates, key=lambda scenario: not scenario.__name__.startswith(which))


def _try_step(step: str, report: Path) -> NoReturn:
    """In a process that has had nothing to do with CUDA yet. It leaves behind what may be in use for ever."""
    signal.alarm(SECONDS_MAX)
    torch.set_num_threads(1)
    fake = FakeDriver()
    fake_torch.install()
    with pytest.MonkeyPatch.context() as monkeypatch:
        fake_torch.patch(monkeypatch)
        monkeypatch.setattr(reader, "PIPELINE_SLOTS", 8)  # fewer than there are requests
        devices = FakeDevices(fake)
        first = int(os.environ.get("FAKECUDA_SEED", "0"))
        found = next(
            (
                f"{scenario.__name__}, seed {seed}: {trouble}"
                for seed in range(first, first + SEEDS)
                for scenario in _likely(step)
                if (trouble := _trouble(fake, devices, scenario, step, seed))
            ),
            "",
        )
    report.write_text(found)
    os._exit(0)


def main(steps: list[str]) -> None:
    with tempfile.TemporaryDirectory() as directory:
        running: dict[int, tuple[str, Path]] = {}
        left = list(steps)
        while left or running:
            if left and len(running) < PROCESSES:
                step = left.pop(0)
                report = Path(directory, step.replace("/", "-"))
                pid = os.fork()
                if pid == 0:
                    _try_step(step, report)
                running[pid] = step, report
                continue
            pid, status = os.wait()
            step, report = running.pop(pid)
            code = os.waitstatus_to_exitcode(status)
            died = "" if code == -signal.SIGALRM else f"its process died: {code}"
            print(json.dumps({"step": step, "trouble": report.read_text() if report.exists() else died}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
