"""Leaves out one step of the engine after the other: `python -m cuda.without_a_step KIND/NAME...` on the fake driver. Of
each it prints what went wrong for the lack of it, or nothing. It may die of what the host touches then.
"""

from __future__ import annotations

import faulthandler
import gc
import json
import os
import sys
import tempfile
from pathlib import Path

import pytest

import snapstone as ss
from cuda import fake_torch
from cuda.device import FakeDevices
from cuda.fake_driver import FakeDriver
from cuda.left_out import step_left_out
from cuda.scenarios import FAILING, SCENARIOS, Scenario

SECONDS_MAX = 60
SEEDS = 4


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
    kind, which = step.split("/")[1:]
    candidates = [*FAILING, *SCENARIOS] if "hung" in which else [*SCENARIOS, *FAILING]
    return sorted(candidates, key=lambda scenario: not scenario.__name__.startswith(kind))


def main(steps: list[str]) -> None:
    fake = FakeDriver()
    fake_torch.install()
    with pytest.MonkeyPatch.context() as monkeypatch:
        fake_torch.patch(monkeypatch)
        devices = FakeDevices(fake)
        first = int(os.environ.get("FAKECUDA_SEED", "0"))
        for step in steps:
            print(json.dumps({"step": step}), flush=True)
            faulthandler.dump_traceback_later(SECONDS_MAX, exit=True)
            found = next(
                (
                    f"{scenario.__name__}, seed {seed}: {trouble}"
                    for seed in range(first, first + SEEDS)
                    for scenario in _likely(step)
                    if (trouble := _trouble(fake, devices, scenario, step, seed))
                ),
                "",
            )
            print(json.dumps({"step": step, "trouble": found}), flush=True)
    os._exit(0)  # what a step kept alive for ever must not be taken down now


if __name__ == "__main__":
    main(sys.argv[1:])
