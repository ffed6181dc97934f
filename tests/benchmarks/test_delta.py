"""The rows of delta saves: a quick run measures everybody, and goals are of its medians."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
README = "# snapstone\n\n<!-- stall:begin -->\n<!-- stall:end -->\n<!-- bench:begin -->\n<!-- bench:end -->\n"
PAGE = "# Benchmarks\n\n<!-- bench:begin -->\n<!-- bench:end -->\n"
OPTIONAL = {"moonclip"}
SAVES = ("nothing", "some", "all")


@pytest.fixture(autouse=True)
def _benchmarks_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *map(str, arguments)], capture_output=True, text=True, timeout=110, check=False
    )


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("bench")
    places = ("--directory", directory / "work", "--results", directory / "results")
    done = run(BENCHMARKS / "run.py", "--quick", "--delta", *places)
    assert done.returncode == 0, done.stderr
    assert list((directory / "work").iterdir()) == [], "the run left checkpoints behind"
    (found,) = (directory / "results").iterdir()
    assert found.name.startswith("quick_")
    return found


@pytest.fixture(scope="module")
def rows(result: Path) -> dict[str, dict[str, Any]]:
    return {row["row"]: row for row in json.loads(result.read_text())["delta"]}


def measured(row: dict[str, Any]) -> dict[str, dict[str, Any]]:
    entries = {name: entry for name, entry in row["engines"].items() if not (entry["unavailable"] and name in OPTIONAL)}
    for name, entry in entries.items():
        assert entry["skipped"] is None, f"{name}: {entry['skipped']}"
    return entries


def test_a_full_run_has_them_and_a_partial_one_only_when_asked() -> None:
    parse = importlib.import_module("run").parse
    assert parse([]).delta
    assert not parse(["--dcp", "save"]).delta
    assert not parse(["--states", "2gb"]).delta
    alone = parse(["--delta"])
    assert (alone.delta, alone.states, alone.dcp, alone.full) == (True, [], [], False)


def test_everybody_is_verified_and_timed(rows: dict[str, dict[str, Any]]) -> None:
    assert list(rows) == [*SAVES, "load"]
    for name, row in rows.items():
        entries = measured(row)
        assert {"delta", "full"} <= entries.keys()
        for entry in entries.values():
            assert entry["verified"], entry["label"]
            assert len(entry["samples"]["load_seconds" if name == "load" else "save_seconds"]) == row["rounds"] == 1
            assert entry["version"] is not None or entry["storage"] == "snapstone"


def test_what_is_written_is_what_has_changed(rows: dict[str, dict[str, Any]]) -> None:
    written = {
        name: {engine: entry["samples"]["written_bytes"][0] for engine, entry in measured(rows[name]).items()}
        for name in SAVES
    }
    for name in SAVES:
        assert written[name]["full"] >= rows[name]["nbytes"]
        assert written[name]["dcp"] >= rows[name]["nbytes"]
    assert (rows["nothing"]["changed_bytes"], rows["all"]["changed_bytes"]) == (0, rows["all"]["nbytes"])
    assert rows["some"]["changed_tensors"] == 5
    assert written["nothing"]["delta"] < 64 << 10 < rows["some"]["changed_bytes"] < written["some"]["delta"]
    assert written["some"]["delta"] < written["all"]["delta"] == pytest.approx(written["all"]["full"], rel=0.05)


def test_goals_are_judged_from_the_samples_of_the_run(result: Path, rows: dict[str, dict[str, Any]]) -> None:
    verdicts = {verdict["what"]: verdict for verdict in json.loads(result.read_text())["targets"]}

    def seconds(row: str, engine: str) -> float:
        return float(rows[row]["engines"][engine]["samples"]["save_seconds"][0])

    ratio = seconds("some", "delta") / (0.15 * seconds("some", "full") + seconds("some", "hashing"))
    verdict = verdicts["delta save, 5 % changed, of 0.15 full saves and hashing"]
    assert verdict["got"] == f"{ratio:.2f}x"
    assert verdict["passed"] is (ratio <= 1)
    ratio = seconds("all", "delta") / seconds("all", "full")
    assert verdicts["delta save, all changed, of a full save"]["got"] == f"{ratio:.2f}x"
    judge = importlib.import_module("delta.goals").judge_deltas
    assert {(goal.got, goal.passed) for goal in judge([])} == {("not measured", None)}


def test_the_page_shows_seconds_and_bytes_of_each_case(result: Path, tmp_path: Path) -> None:
    readme, page = tmp_path / "README.md", tmp_path / "page.md"
    readme.write_text(README)
    page.write_text(PAGE)
    done = run(BENCHMARKS / "readme_table.py", "--readme", readme, "--page", page, "--result", result)
    assert done.returncode == 0, done.stderr
    text = page.read_text()
    assert re.search(r"^\| nothing \| \d+\.\d+ m?s, \d+\.\d MB \|", text, re.MULTILINE)
    assert re.search(r"^\| 5 of 99 tensors, ", text, re.MULTILINE)
    assert re.search(r"^\| load 10 deltas deep, .* \| <= 1\.11x \| \d+\.\d\dx \| (met|missed) \|", text, re.MULTILINE)


def test_a_change_gives_every_byte_that_changes_other_bits_and_the_second_one_takes_it_back() -> None:
    cases, states = importlib.import_module("delta.cases"), importlib.import_module("states")
    state = states.build("2gb", 64)
    before = {name: tensor.clone() for name, tensor in state.items()}
    assert cases.changed_names(state, "nothing") == []
    assert sorted(cases.changed_names(state, "all")) == sorted(state)
    some = [cases.changed_names(state, "some", turn) for turn in range(20)]
    assert sorted(name for names in some for name in names) == sorted(state), "in turns all of them change"
    share = sum(state[name].nbytes for name in some[0]) / states.nbytes_of(state)
    assert 0.02 < share < 0.08
    cases.change(state, some[0])
    assert sorted(states.differences(state, before)) == sorted(some[0])
    for name in some[0]:
        same = state[name].view(-1).view(torch.uint8) == before[name].view(-1).view(torch.uint8)
        assert same.float().mean() < 0.05
    cases.change(state, some[0])
    assert states.differences(state, before) == []


def test_a_contender_that_loads_other_bits_gets_no_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measure, contenders = importlib.import_module("measure_delta"), importlib.import_module("delta.contenders")

    class OneBit(contenders.Full):  # type: ignore[misc, name-defined]
        def load(self, target: Any, directory: Path) -> None:
            super().load(target, directory)
            next(iter(target.values())).view(-1).view(torch.uint8)[3] ^= 1

    monkeypatch.setattr(
        measure, "CONTENDERS", {"delta": contenders.Delta, "full": OneBit, "hashing": contenders.Hashing}
    )
    case = importlib.import_module("delta.cases").Case("some", "title", ("delta", "full", "hashing"))
    monkeypatch.setattr(measure, "CASES", (case, measure.CASES[-1]))
    (tmp_path / "work").mkdir()
    job = {"quick": True, "rounds": 1, "directory": str(tmp_path / "work"), "scrub": {str(tmp_path): "HERE"}}
    rows = measure.Measurement(job).run()
    for row in rows:
        assert "1 of 99 tensors came back different" in row["engines"]["full"]["skipped"]
        assert row["engines"]["full"]["samples"] == {}
        assert row["engines"]["delta"]["verified"]


def test_a_case_that_takes_too_long_ends_after_two_rounds() -> None:
    interleave = importlib.import_module("drop_in.interleave")
    contender = importlib.import_module("delta.contenders").Hashing()
    entries = {contender.name: interleave.Entry(contender.label, contender.package, contender.role, None)}

    def rounds(seconds_max: float) -> int:
        entries[contender.name].samples.clear()
        interleave.interleave(
            "title",
            [contender],
            entries,
            5,
            warm_up=lambda one: None,
            step=lambda one: {"save_seconds": 1.0},
            scrub={},
            seconds_max=seconds_max,
        )
        return len(entries[contender.name].samples["save_seconds"])

    assert rounds(60.0) == 5
    assert rounds(-1.0) == 2
