"""`snapstone bench model`: its table, document and errors; tests/bench/cluster has the numbers."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result

from snapstone.bench import results
from snapstone.bench.cluster import Cluster

Run = Callable[..., Result]

ROW_KEYS = {
    "engine",
    "gpus",
    "hosts",
    "stall_seconds",
    "durable_seconds",
    "load_seconds",
    "mtbf_seconds",
    "cadence_seconds_young",
    "cadence_seconds_daly_first_order",
    "cadence_seconds_young_daly",
    "cadence_seconds_exact",
    "cadence_seconds",
    "interval_steps",
    "goodput",
    "goodput_at_young",
    "goodput_at_daly",
    "stall_share",
    "replay_share",
    "recovery_share",
    "replay_seconds_per_failure",
    "lost_seconds_per_failure",
    "simulated_goodput",
}


def test_the_table_has_a_line_for_each_engine_and_size(snapstone: Run) -> None:
    result = snapstone("bench", "model", "--gpus", "100000,16384", "--engine", "staged,mine=30/60")
    assert (result.exit_code, result.stderr) == (0, "")
    lines = [line.split() for line in result.stdout.splitlines()]
    assert [line[:2] for line in lines[1:]] == [
        ["staged", "16384"],
        ["staged", "100000"],
        ["mine", "16384"],
        ["mine", "100000"],
    ]
    assert "3.05 h" in result.stdout
    assert "simulated" not in result.stdout


def test_json_has_every_documented_key(snapstone: Run) -> None:
    result = snapstone("bench", "model", "--gpus", "1024", "--mtbf-gpu-hours", "45565", "--json")
    document = json.loads(result.stdout)
    assert document["schema"] == "snapstone.bench-model/1"
    assert (document["format"], document["kind"], document["complete"]) == ("snapstone-bench", "model", True)
    assert {frozenset(row) for row in document["rows"]} == {frozenset(ROW_KEYS)}
    inputs = document["inputs"]
    figures = set(Cluster.__dataclass_fields__)
    assert set(inputs) - figures == {"sources", "engines", "gpus", "interval_steps", "simulated_runs", "seed"}
    assert set(inputs["sources"]) == figures <= set(inputs)
    assert (inputs["mtbf_gpu_hours"], inputs["sources"]["mtbf_gpu_hours"]) == (45565, "option")
    assert [engine["kind"] for engine in inputs["engines"]] == ["blocking", "staged", "hidden"]


def test_a_plan_can_be_written_and_is_a_result(snapstone: Run, tmp_path: Path) -> None:
    result = snapstone("bench", "model", "--gpus", "8", "--out", tmp_path / "R", "--label", "my plan")
    assert result.exit_code == 0
    path = tmp_path / "R" / "model-my-plan.json"
    assert result.stdout.splitlines()[-1] == f"written {path}"
    document = results.read(path)
    assert [row["gpus"] for row in document["rows"]] == [8, 8, 8]
    again = snapstone("bench", "model", "--from", tmp_path / "R")
    assert again.exit_code == 2, "a plan is no measurement"


def test_simulations_stand_beside_the_closed_form(snapstone: Run) -> None:
    pytest.importorskip("simpy", reason="the simulation needs the package simpy")
    arguments = ("bench", "model", "--gpus", "100000", "--engine", "blocking", "--simulate", "3")
    assert "simulated" in snapstone(*arguments).stdout
    first, again, other = (
        json.loads(snapstone(*arguments, "--json", "--seed", seed).stdout)["rows"][0] for seed in ("1", "1", "9")
    )
    assert first == again
    assert first["simulated_goodput"] != other["simulated_goodput"]
    assert first["goodput"] == other["goodput"]


def test_a_simulation_without_simpy_says_what_to_install(snapstone: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "simpy", None)  # as if it were not installed
    assert snapstone("bench", "model", "--gpus", "100000").exit_code == 0
    result = snapstone("bench", "model", "--gpus", "100000", "--simulate", "1")
    assert (result.exit_code, result.stdout) == (4, "")
    assert result.stderr.endswith("needs the package simpy: pip install 'snapstone[bench]'\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--engine", "nothing"], "unknown engine 'nothing': one of blocking, staged, hidden"),
        (["--gpus", "many"], "--gpus 'many': numbers with commas"),
        (["--gpus", ","], "--gpus: no sizes"),
        (["--gpus", "0"], "0 GPUs"),
        (["--mtbf-gpu-hours", "0"], "mtbf_gpu_hours=0.0"),
        (["--step-seconds", "nan"], "step_seconds=nan"),
        (["--load-strategy", "x"], "load_strategy='x'"),
        (["--engine", "a=5/4"], "0 <= stall <= durable"),
        (["--interval-steps", "0"], "interval_steps=0"),
        (["--simulate", "-1"], "runs=-1"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(snapstone: Run, arguments: list[str], message: str) -> None:
    result = snapstone("bench", "model", *arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_missing_directory_of_results_is_not_found(snapstone: Run, tmp_path: Path) -> None:
    result = snapstone("bench", "model", "--from", tmp_path / "absent")
    assert (result.exit_code, result.stdout) == (3, "")
    assert "absent: No such file or directory" in result.stderr


def test_an_unwritable_directory_is_an_io_error(snapstone: Run, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    result = snapstone("bench", "model", "--gpus", "8", "--out", tmp_path / "file" / "R")
    assert (result.exit_code, result.stdout) == (4, "")


def test_every_figure_has_an_option(snapstone: Run) -> None:
    text = snapstone("bench", "model", "--help").stdout
    assert [name for name in Cluster.__dataclass_fields__ if f"--{name.replace('_', '-')}" not in text] == []
