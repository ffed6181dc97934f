"""The runner of the fuzz targets finds what it promises to find: too much time, too much memory, a death, an error; and
what `make fuzz` records is what it did.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from fuzz import bad
from lacking import skip_without

ROOT = Path(__file__).resolve().parents[2]
RUN = ROOT / "tests" / "fuzz" / "run.py"
SECONDS_MAX = 100.0

BROKEN = {
    "hang": "s of CPU, and goes on",
    "hang_in_c": "s of CPU, and goes on",
    "sleep": "s of CPU, and sleeps on",
    "allocate": "MemoryError",
    "fill": "MiB of memory; promised are 64 MiB",
    "burn": "s of CPU; promised are 0.1 s",
    "die": "ended by SIGABRT",
    "fail": "ValueError: no reader",
}


def run(tmp_path: Path, target: str, seconds: int, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(RUN), f"fuzz.bad:{target}", str(seconds)]
    command += [str(tmp_path / "corpus"), str(tmp_path / "findings"), *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=SECONDS_MAX, check=False)


@pytest.mark.parametrize("target", list(BROKEN))
def test_an_input_that_breaks_a_limit_is_a_finding_and_is_saved(tmp_path: Path, target: str) -> None:
    ended = run(tmp_path, target, 30, "--hang-cpu-seconds=1", f"--wall-seconds={2 if target == 'sleep' else 100}")
    assert ended.returncode == 1, ended
    assert BROKEN[target] in ended.stdout, ended
    (saved,) = (tmp_path / "findings").iterdir()
    assert f"input saved in {saved}" in ended.stdout
    assert bad.is_bad(saved.read_bytes())
    if target.startswith("hang"):
        assert f"in {target}" in ended.stderr, "it does not say where the target was"


def test_a_target_within_its_limits_finds_nothing(tmp_path: Path) -> None:
    ended = run(tmp_path, "keep", 1)
    assert ended.returncode == 0, ended
    assert int(ended.stderr.rpartition("number_of_executed_units:")[2]) > 100
    assert not (tmp_path / "findings").exists()


@pytest.fixture
def tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("fuzz_tool", ROOT / "tools" / "fuzz.py")
    assert spec is not None
    assert spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    monkeypatch.setattr(made, "FINDINGS", tmp_path / "findings")
    return made


def test_a_target_that_outlasts_its_time_has_failed(tool: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    command = [sys.executable, "-c", "import time; print('began', flush=True); time.sleep(600)"]
    row = tool.run("python/any", command, 2.0)
    assert (row["findings"], row["executions"]) == (1, 0)
    assert "began" in (tool.FINDINGS / "python-any.log").read_text()
    assert "killed, for it had not ended after 2 s" in capsys.readouterr().out


def row(target: str, executions: int) -> dict[str, object]:
    return {"target": target, "executions": executions, "coverage": None, "seconds": 1.0, "findings": 0}


def test_a_record_says_what_ran_and_what_did_not(tool: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "fuzz.json"
    tool.record([row("native/layout", 5)], ["--seconds", "8", "--native-only"], path)
    tool.record([row("native/layout", 1), row("python/index", 7)], ["--jobs", "1", "--record", "a b"], path)
    document = json.loads(path.read_text())
    assert document["commands"] == [
        "tools/fuzz.py --seconds 8 --native-only",
        "tools/fuzz.py --jobs 1 --record 'a b'",
    ]
    assert document["command"] == "; ".join(document["commands"])
    counted = [document[key] for key in ("executions", "executions_native", "executions_python")]
    assert counted == [13, 6, 7]
    executions = {one["target"]: one["executions"] for one in document["targets"]}
    assert executions.pop("native/layout") == 6
    assert executions.pop("python/index") == 7
    assert set(executions.values()) == {0}, "a target that was left out is listed, without an execution"
    assert {"native/codec", "python/manifest", "python/marker"} <= set(executions)


def test_native_targets_can_be_built_here(tmp_path: Path) -> None:
    """Else `make fuzz` leaves them out, and nothing at the end of the tests would say so."""
    if shutil.which("clang++") is None:
        skip_without("clang", "there is no clang++, so no native target is fuzzed")
    source, program = tmp_path / "nothing.cc", tmp_path / "nothing"
    source.write_text('extern "C" int LLVMFuzzerTestOneInput(const unsigned char*, unsigned long) { return 0; }')
    built = subprocess.run(
        ["clang++", "-fsanitize=fuzzer,address", source, "-o", program], capture_output=True, check=False
    )
    if built.returncode != 0:
        skip_without("clang", f"it comes without libFuzzer: {built.stderr.decode()[-300:]}")
    ran = subprocess.run([program, "-runs=1"], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr


@pytest.mark.parametrize(("demanded", "outcome"), [("", "skipped"), ("strace", "skipped"), ("clang", "failed")])
def test_what_is_demanded_is_not_skipped(tmp_path: Path, demanded: str, outcome: str) -> None:
    (tmp_path / "test_it.py").write_text(
        "import lacking\ndef test_it():\n    lacking.skip_without('clang', 'none here')\n"
    )
    ended = run_pytest(tmp_path, demanded)
    assert f"1 {outcome}" in ended.stdout, ended
    assert "none here" in ended.stdout
    assert ended.returncode == (outcome == "failed")


def test_a_demand_for_what_nothing_needs_is_an_error(tmp_path: Path) -> None:
    ended = run_pytest(ROOT / "tests" / "fuzz", "clang stracee", "--collect-only")
    assert ended.returncode == 4, ended
    assert "FAIL_WITHOUT: stracee" in ended.stderr


def run_pytest(place: Path, demanded: str, *options: str) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"FAIL_WITHOUT": demanded, "PYTHONPATH": str(ROOT / "tests")}
    command = [sys.executable, "-m", "pytest", "-rsf", "-p", "no:cacheprovider", *options, str(place)]
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=SECONDS_MAX, check=False)
