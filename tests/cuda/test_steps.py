"""Every wait, record, poll and keep-alive that the sources name is needed: a save or load goes wrong without it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import snapstone as ss
from cuda import fake_driver
from cuda.device import IS_REAL, Devices
from cuda.left_out import passed_steps, step_left_out
from cuda.scenarios import CHUNK_BYTES, FAILING, SCENARIOS, Scenario

ROOT = Path(__file__).resolve().parents[2]

# "save/producer" beside what it is a name of: `stream.wait(event, "save/producer")`, `skipped("keep", "load/slots")`.
NAMED = re.compile(
    r'(?:\b(done)\(|(?:\b|_)(wait|record|orphan|abandon)\([^;"]*|skipped\(\s*"(\w+)",\s*)"((?:save|load|buffer)/\w+)"'
)
KINDS = {"done": "poll", "orphan": "keep", "abandon": "keep"}

# Needed only where the device has no stream-ordered memory: tests/native/cuda/memory_test.cc and
# tests/native/pipeline/device_fault_test.cc leave these out.
WITHOUT_POOLS = {"wait/buffer/freed", "keep/save/hung_buffers"}


def sources() -> Iterator[tuple[str, str]]:
    """(path, text) of the engine's."""
    for folder, suffixes in (("csrc", (".h", ".cc")), ("python/snapstone", (".py",))):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in suffixes:
                yield str(path.relative_to(ROOT)), path.read_text()


def named_steps() -> set[str]:
    """KIND/NAME of all that the sources have."""
    found = set()
    for _, text in sources():
        for *calls, name in NAMED.findall(text):
            call = next(filter(None, calls))
            found.add(f"{KINDS.get(call, call)}/{name}")
    return found


ALL = named_steps()
STEPS = sorted(ALL - WITHOUT_POOLS)


def test_the_sources_are_searched_for_steps() -> None:
    assert {"wait/save/producer", "wait/save/fence", "wait/save/beside", "keep/save/sources"} <= set(STEPS)
    assert {"wait/load/targets", "wait/load/fence", "record/load/mark", "record/save/mark"} <= set(STEPS)
    assert {"wait/save/enqueued", "poll/save/batch", "poll/load/copied", "keep/load/hung_workspace"} <= set(STEPS)
    assert ALL >= WITHOUT_POOLS


def test_no_step_is_without_a_name() -> None:
    """Whatever orders streams, or tells the host about them, goes through the functions that take names."""
    ordering = re.compile(r"cuStreamWaitEvent|cuEventRecord|cuEventQuery|cuStreamSynchronize|cuEventSynchronize")
    synchronizing = re.compile(r"(?:\.|->)synchronize\(|cuCtxSynchronize|(?:wait|record)_(?:stream|event)\(")
    table = {"csrc/cuda/driver.h", "csrc/cuda/driver.cc", "csrc/cuda/driver_types.h"}
    users = {path for path, text in sources() if ordering.search(text)} - table
    assert users == {"csrc/cuda/stream.cc", "csrc/cuda/device_buffer.cc"}
    # Copies that torch makes: for processes that share memory, and for backends that take tensors of a device alone.
    of_torch = {"python/snapstone/dcp/snapshot.py", "python/snapstone/fabric.py"}
    users = {path for path, text in sources() if synchronizing.search(text)}
    assert {path for path in users if "/bench/" not in path} == of_torch


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_nothing_is_wrong_while_all_steps_are_there(
    device: Devices, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scenario: Scenario
) -> None:
    monkeypatch.setenv("SNAPSTONE_CHUNK_BYTES", str(CHUNK_BYTES))
    for turn in range(3):
        scenario(device, tmp_path / str(turn))


@pytest.mark.parametrize("scenario", [*SCENARIOS, *FAILING])
def test_the_scenarios_pass_every_step_with_kernels(
    device: Devices, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scenario: Scenario
) -> None:
    """Said of all scenarios together by the last of them."""
    monkeypatch.setenv("SNAPSTONE_CHUNK_BYTES", str(CHUNK_BYTES))
    with step_left_out(""):
        scenario(device, tmp_path / "c")
        ss.wait()
        _seen.update(passed_steps())
    if scenario is FAILING[-1]:
        assert {name for name in _seen if name in ALL} - WITHOUT_POOLS == set(STEPS)


_seen: set[str] = set()


if not IS_REAL:  # a device does not say what was wrong

    @pytest.mark.timeout(600)  # a minute on a machine that has nothing else to do
    def test_no_step_can_be_left_out() -> None:
        environment = {
            **os.environ,
            **fake_driver.environment(mode="chaos", late_us=1500, gbps=1),
            "SNAPSTONE_CHUNK_BYTES": str(CHUNK_BYTES),
            "PYTHONPATH": os.pathsep.join([str(ROOT / "python"), str(ROOT / "tests"), *sys.path]),
        }
        command = [sys.executable, "-m", "cuda.without_a_step", *STEPS]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
        trouble = {report["step"]: report["trouble"] for report in map(json.loads, done.stdout.splitlines())}
        assert trouble.keys() == set(STEPS), done.stderr
        assert [step for step in STEPS if not trouble[step]] == []
