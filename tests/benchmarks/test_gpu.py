"""`benchmarks/gpu.py` gets through on the fake driver: every part delivers what it is asked for, and one that goes
wrong says so and loses nothing of the others.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

import snapstone

ROOT = Path(__file__).resolve().parents[2]
PARTS = ["copies", "tensors", "unchanged", "loads", "training_8gb"]

pytestmark = pytest.mark.timeout(300)


def environment(**variables: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(Path(snapstone.__file__).parents[1]), **variables}


def command(out: Path, *arguments: str) -> list[str]:
    """Measures the package that this test has, and not one that it would have to build first."""
    return [sys.executable, "benchmarks/gpu.py", "--fake", "--installed", "--out", str(out), *arguments]


def document(out: Path) -> dict[str, Any]:
    (path,) = out.glob("partial-gpu_fake_*.json")
    return dict(json.loads(path.read_text()))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[subprocess.CompletedProcess[str], dict[str, Any]]:
    out = tmp_path_factory.mktemp("gpu")
    scratch = out / "checkpoints"
    scratch.mkdir()
    done = subprocess.run(
        command(out, "--part", ",".join(PARTS), "--directory", str(scratch)),
        env=environment(),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert list(scratch.iterdir()) == [], "the run left checkpoints behind"
    return done, document(out)


def test_every_part_is_measured(run: tuple[subprocess.CompletedProcess[str], dict[str, Any]]) -> None:
    done, found = run
    assert {name: (part["status"], part["reason"]) for name, part in found["parts"].items()} == dict.fromkeys(
        PARTS, ("measured", None)
    )
    assert found["tests"]["status"] == "passed", found["tests"]
    assert found["tests"]["counts"]["passed"] == 2
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_document_says_that_nothing_was_measured_on_a_device(
    run: tuple[subprocess.CompletedProcess[str], dict[str, Any]],
) -> None:
    done, found = run
    assert found["device"] == "fake driver: these are no measurements"
    assert "fake driver: these are no measurements" in done.stdout
    assert {target["verdict"] for target in found["targets"]} == {"not measured"}
    assert found["facts"]["machine"]["kernel"]
    assert found["facts"]["torch"]["version"]
    assert found["command"][:2] == ["python", "benchmarks/gpu.py"]
    assert str(ROOT) not in json.dumps(found)


def rate(found: Mapping[str, Any]) -> float:
    assert found["low"] <= found["median"] <= found["high"]
    assert found["low"] > 0
    return float(found["median"])


def test_copies_have_rates_by_size(run: tuple[subprocess.CompletedProcess[str], dict[str, Any]]) -> None:
    found = run[1]["parts"]["copies"]["results"]
    for how in ("engine", "torch_pinned", "torch_pageable"):
        assert [row["nbytes"] for row in found[how]["rows"]] == [64 << 10, 1 << 20]
        for row in found[how]["rows"]:
            rate(row["d2h_gbps"])
            rate(row["h2d_gbps"])
    assert found["engine"]["registration"]["register_seconds_per_gb"] > 0
    assert found["engine"]["registration"]["refusal"] == ""
    assert found["prepare"]["seconds_per_gb"] > 0
    assert found["digest"]["digest_of_d2d"] == pytest.approx(
        rate(found["digest"]["digest_gbps"]) / rate(found["digest"]["d2d_gbps"])
    )


def test_saves_of_many_tensors_are_timed(run: tuple[subprocess.CompletedProcess[str], dict[str, Any]]) -> None:
    found = run[1]["parts"]["tensors"]["results"]
    for tensors in (8, 40):
        calls = found[f"calls_{tensors}"]
        assert calls["tensors"] == tensors
        for fence in ("now", "optimizer"):
            rate(calls[fence]["call_seconds"])
            rate(calls[fence]["step_seconds"])
    engine = found["engine"]
    assert engine["tensors"] == 40
    rate(engine["d2h_gbps"])
    rate(engine["load_gbps"])
    for one in engine["saves"]:
        assert one["devices"]["copied_bytes"] >= engine["nbytes"]
        assert one["devices"]["unregistered_bytes"] == 0
        assert one["call"] <= one["snapshot"] <= one["durable"]


def test_an_unchanged_state_is_known_by_its_digests(
    run: tuple[subprocess.CompletedProcess[str], dict[str, Any]],
) -> None:
    found = run[1]["parts"]["unchanged"]["results"]["saves"]
    assert rate(found["known_seconds"]) >= rate(found["digest_pass_seconds"])
    for one in found["saves"]:
        assert one["devices"]["digested_bytes"] > 0
        assert one["unchanged_chunks"] == one["chunks"] > 0
    loaded = run[1]["parts"]["loads"]["results"]["load"]
    rate(loaded["load_gbps"])
    assert loaded["stats"][0]["devices"] == [0]


def test_each_engine_has_steps_with_and_without_saves(
    run: tuple[subprocess.CompletedProcess[str], dict[str, Any]],
) -> None:
    found = run[1]["parts"]["training_8gb"]["results"]
    assert found["workload"]["state_only"], "the fake has a backward now: let it train"
    assert found["engines"].keys() == {"snapstone", "snapstone-now", "dcp-default"}
    for name, engine in found["engines"].items():
        assert engine["status"] == "measured", (name, engine["reason"])
        assert len(engine["turns"]) >= 2
        for turn in engine["turns"]:
            assert turn["quiet"]
            assert turn["durable"] > 0
            assert turn["steps"][0]["total"] >= turn["steps"][0]["call"] > 0
        assert engine["summary"]["exposed_stall"]["samples"] == [turn["exposed"] for turn in engine["turns"]]


def test_a_part_that_raises_is_reported_and_loses_nothing_of_the_others(tmp_path: Path) -> None:
    done = subprocess.run(
        command(tmp_path, "--part", "copies,loads", "--no-tests"),
        env=environment(SNAPSTONE_GPU_FAIL="copies"),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    parts = document(tmp_path)["parts"]
    assert parts["copies"]["status"] == "failed"
    assert parts["copies"]["reason"] == "RuntimeError: SNAPSTONE_GPU_FAIL"
    assert "Traceback" in parts["copies"]["log"]
    assert parts["loads"]["status"] == "measured"
    assert done.returncode == 1
    assert "copies: failed" in done.stdout


def test_without_time_parts_are_not_run_and_named(tmp_path: Path) -> None:
    done = subprocess.run(
        command(tmp_path, "--no-tests", "--seconds", "1"),
        env=environment(),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    parts = document(tmp_path)["parts"]
    assert {part["status"] for part in parts.values()} == {"not run"}
    assert all(part["reason"].startswith("no time left") for part in parts.values())
    assert done.returncode == 1
    assert done.stdout.count("not run, no time left") == len(parts)


def test_a_run_that_is_ended_leaves_what_it_had(tmp_path: Path) -> None:
    process = subprocess.Popen(
        command(tmp_path, "--part", "copies,loads", "--no-tests"), env=environment(), cwd=ROOT, stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    for line in process.stdout:
        if b"loads: a load" in line:
            break
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 128 + signal.SIGTERM
    parts = document(tmp_path)["parts"]
    assert parts["copies"]["status"] == "measured"
    assert (parts["loads"]["status"], parts["loads"]["reason"]) == ("not run", "the run ended before")


def test_the_fake_is_kept_out_of_the_results(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "benchmarks/gpu.py", "--fake", "--out", "benchmarks/results"],
        env=environment(),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2
    assert "--fake measures nothing" in done.stderr


SUITE = """
import time
import pytest

def test_passes(): pass
def test_fails(): assert 1 == 2
def test_hangs():
    while True:
        try:
            time.sleep(1000)
        except BaseException:
            pass
def test_comes_after(): pass
@pytest.mark.skip(reason="no GPU")
def test_is_skipped(): pass
"""

RUN_TESTS = """
import json, os, sys
from pathlib import Path
from on_device import device_tests
device_tests.SECONDS_OF_ONE = 2
print(json.dumps(device_tests.run([Path(path) for path in sys.argv[2:]], 60, Path(sys.argv[1]), os.environ)))
"""


def outcome_of(scratch: Path, *paths: Path) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-c", RUN_TESTS, str(scratch), *map(str, paths)],
        env=environment(PYTHONPATH=str(ROOT / "benchmarks")),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


def test_device_tests_that_fail_hang_or_are_skipped_are_told_apart(tmp_path: Path) -> None:
    suite, broken, empty = (tmp_path / f"test_{name}_suite.py" for name in ("whole", "broken", "empty"))
    suite.write_text(SUITE)
    broken.write_text("import a_module_that_is_not_there\n")
    empty.write_text("")
    found = outcome_of(tmp_path, suite, broken)
    assert found["status"] == "failed"
    assert found["counts"] == {"passed": 2, "failed": 2, "skipped": 1, "hung": 1}
    said = {failure["test"].rpartition("::")[2] or failure["test"]: failure for failure in found["failures"]}
    assert "assert 1 == 2" in said["test_fails"]["said"]
    assert said["test_hangs"]["what"] == "hung"
    assert "no GPU" in said["test_is_skipped"]["said"]
    assert any("a_module_that_is_not_there" in failure["said"] for failure in found["failures"])
    nothing = outcome_of(tmp_path, empty)
    assert (nothing["status"], nothing["counts"]["passed"]) == ("failed", 0)
    assert "no test was found" in nothing["reason"]


def test_a_device_gets_all_tests_that_are_about_one() -> None:
    program = "from on_device import device_tests; print(*[path.name for path in device_tests.files()])"
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=environment(PYTHONPATH=str(ROOT / "benchmarks")),
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    names = set(done.stdout.split())
    assert {"test_saves.py", "test_loads.py", "test_failures.py", "test_steps.py", "test_dcp.py"} <= names
    assert not names & {"test_fake_driver.py", "test_fake_torch.py", "test_processes.py"}


def judge(parts: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    program = (
        "import json, sys; from on_device import goals\n"
        "print(json.dumps([one.to_json() for one in goals.judge(json.load(sys.stdin))]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=environment(PYTHONPATH=str(ROOT / "benchmarks")),
        input=json.dumps(parts),
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return {one["what"]: (one["verdict"], one["got"]) for one in json.loads(done.stdout)}


def spread(value: float) -> dict[str, Any]:
    return {"median": value, "low": value, "high": value, "samples": [value]}


def test_targets_are_met_missed_or_not_measured() -> None:
    def parts(compute: float, stall: float) -> dict[str, Any]:
        engine = {"summary": {"exposed_stall": spread(stall), "stall_of_all_steps_in_flight": spread(0.004)}}
        return {
            "tensors": {"results": {"engine": {"d2h_gbps": spread(51.0)}, "calls_100": {"now": {"failed": "x"}}}},
            "copies": {"results": {"digest": {"digest_gbps": spread(2900.0)}}},
            "training_8gb": {
                "results": {"workload": {"compute_seconds": compute}, "engines": {"snapstone": engine}},
            },
        }

    found = judge(parts(0.2, 0.0015))
    assert found["D2H of the 10,000-tensor state"][0] == "met"
    assert found["digest kernel"][0] == "missed"
    assert found["async_save call, 100 tensors, fence now"][0] == "not measured"
    assert found["load from the page cache to the device"] == ("not measured", "")
    stall = found["exposed stall at 8 GB, fence optimizer"]
    assert stall == ("met", "1.5 ms (1.5 to 1.5); all steps in flight: 4 ms")
    assert judge(parts(0.2, 0.0025))["exposed stall at 8 GB, fence optimizer"][0] == "missed"
    verdict, got = judge(parts(0.1, 0.0015))["exposed stall at 8 GB, fence optimizer"]
    assert verdict == "not measured"
    assert "forward and backward took 0.100 s" in got
