"""Every wait, record and keep-alive that the sources name is needed: a save or load goes wrong without it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import snapstone as ss
from cuda import fake_driver
from cuda.device import IS_REAL, Devices
from cuda.scenarios import CHUNK_BYTES, SCENARIOS, Scenario
from snapstone import _native

ROOT = Path(__file__).resolve().parents[2]

# "save/producer" beside what it is a name of: `stream.wait(event, "save/producer")`, `skipped("keep", "save/buffers")`.
NAMED = re.compile(r'(?:\b(wait|record)\([^;"]*|skipped\("(\w+)",\s*)"((?:save|load)/\w+)"')


def named_steps() -> set[str]:
    """KIND/NAME of all that the sources have."""
    found = set()
    for folder, suffixes in (("csrc", (".h", ".cc")), ("python/snapstone", (".py",))):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in suffixes:
                for kind, other, name in NAMED.findall(path.read_text()):
                    found.add(f"{kind or other}/{name}")
    return found


STEPS = sorted(named_steps())


def test_the_sources_are_searched_for_steps() -> None:
    assert {"wait/save/producer", "wait/save/fence", "wait/save/beside", "keep/save/sources"} <= set(STEPS)
    assert {"wait/load/targets", "wait/load/fence", "record/load/mark", "record/save/mark"} <= set(STEPS)


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_nothing_is_wrong_while_all_steps_are_there(
    device: Devices, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scenario: Scenario
) -> None:
    monkeypatch.setenv("SNAPSTONE_CHUNK_BYTES", str(CHUNK_BYTES))
    for turn in range(3):
        scenario(device, tmp_path / str(turn))


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_the_scenarios_pass_every_step_with_kernels(
    device: Devices, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scenario: Scenario
) -> None:
    """Said of all scenarios together by the last of them."""
    monkeypatch.setenv("SNAPSTONE_CHUNK_BYTES", str(CHUNK_BYTES))
    _native.fault_arm("")
    scenario(device, tmp_path / "c")
    ss.wait()
    _seen.update(name for name in _native.fault_seen_names() if name.split("/")[0] in ("wait", "record", "keep"))
    if scenario is SCENARIOS[-1]:
        assert _seen == set(STEPS)


_seen: set[str] = set()


if not IS_REAL:  # a device does not say what was wrong

    @pytest.mark.parametrize("half", [0, 1])
    def test_no_step_can_be_left_out(half: int) -> None:
        left = STEPS[half::2]
        unnoticed = []
        while left:
            reports, output = _without(left)
            done = {report["step"] for report in reports}
            unnoticed += [report["step"] for report in reports if report.get("trouble") == ""]
            assert done, f"nothing was tried: {output}"
            left = [step for step in left if step not in done]
        assert unnoticed == []


def _without(steps: list[str]) -> tuple[list[dict[str, str]], str]:
    """What a process said that left out these steps; of one in which it died, no trouble but its name."""
    environment = {
        **os.environ,
        **fake_driver.environment(mode="chaos"),
        "SNAPSTONE_CHUNK_BYTES": str(CHUNK_BYTES),
        "PYTHONPATH": os.pathsep.join([str(ROOT / "python"), str(ROOT / "tests"), *sys.path]),
    }
    command = [sys.executable, "-m", "cuda.scenarios", *steps]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    reports = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    told = {report["step"]: report for report in reports}  # the later one of each
    return list(told.values()), done.stderr
