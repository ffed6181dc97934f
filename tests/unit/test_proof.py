"""Counts at the end of docs/guarantees.md (`make proof`): of each test that the page names, and of no other."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
_spec = importlib.util.spec_from_file_location("proof", ROOT / "tools" / "proof.py")
assert _spec is not None
assert _spec.loader is not None
proof = importlib.util.module_from_spec(_spec)
sys.modules["proof"] = proof
_spec.loader.exec_module(proof)

PAGE = """# Page

| a | `tests/unit/test_plan.py::test_not_of_a_promise` |

## 1. First

| a | `tests/unit/test_x.py::test_a`, `tests/native/store/x_test.cc::Suite.case` |

## 2. Second

| b | `tests/unit/test_x.py::test_a` |
"""


def test_every_test_of_the_page_is_listed_and_no_other() -> None:
    """After adding a row to the page: `make proof PROOF_ARGS=--missing`, or `--recorded`, which runs nothing."""
    page = (ROOT / "docs" / "guarantees.md").read_text()
    named, counted = proof.named_tests(page), proof.counted_tests(page)
    assert len(named) > 150
    assert sorted(named.keys() ^ proof.listed_tests(page)) == []
    assert [name for name, count in counted.items() if count.failed or not count.passed] == []
    assert named.keys() - counted.keys() == set(), "not run yet"


PENDING = {"kill-ranks"}  # not run to its end yet


def test_no_long_form_is_missing_or_ended_with_a_failure() -> None:
    assert proof.shortfalls(proof.recorded_runs()).keys() == PENDING


@pytest.mark.parametrize("said", ["not run", "9 histories, 1 that broke a rule", "7 tests, 1,000 findings, 3 lives"])
def test_a_failure_is_a_shortfall(said: str) -> None:
    ended = ("ranks", "2026-01-02", said, "make")
    assert proof.shortfalls([("soak", "2026-01-02", "3 lives, 0 findings", "make soak"), ended]) == {"ranks": said}


def test_the_section_is_read_as_it_was_written() -> None:
    named = proof.named_tests(PAGE)
    assert named["tests/unit/test_x.py::test_a"] == ["1", "2"]
    assert named["tests/unit/test_plan.py::test_not_of_a_promise"] == [""]
    counts = {name: proof.Count(4, 3, 1, "2026-01-02") for name in named}
    section = proof.section(named, counts, [("crash", "2026-01-02", "5 states", "make crash")])
    assert proof.counted_tests(PAGE + "\n" + section) == counts
    assert proof.named_tests(PAGE + "\n" + section) == named
    assert proof.listed_tests(PAGE + "\n" + section) == named.keys()
    assert "| 1 | 2 | 8 | 6 | 2 |" in section
    del counts["tests/unit/test_x.py::test_a"]
    section = proof.section(named, counts, [])
    assert proof.counted_tests(PAGE + "\n" + section) == counts
    assert proof.listed_tests(PAGE + "\n" + section) == named.keys()


def test_tests_are_run_and_counted_case_by_case(tmp_path: Path) -> None:
    name = "tests/unit/test_plan.py::test_a_hole_an_overlap_and_a_stray_part_are_refused"
    empty, counts = proof.run(["tests/native/store/no_test.cc::Not.built", name], tmp_path)
    assert empty == {}
    count = counts[name]
    assert (count.passed, count.failed) == (count.cases, 0)
    assert count.cases > 0


def test_the_newest_document_of_each_kind_is_told(tmp_path: Path) -> None:
    for day, states in (("2026-01-02", 5), ("2026-01-03", 1234)):
        document = {"date": day, "command": "make crash", "total": {"states": states, "checkpoints_read": 7}}
        (tmp_path / f"crash_machine_{day}.json").write_text(json.dumps(document))
    first, *others = proof.recorded_runs(tmp_path)
    assert first == ("crash", "2026-01-03", "1,234 states after a crash, 7 different checkpoints read", "make crash")
    assert {said for _, _, said, _ in others} == {"not run"}


def _long_form(directory: Path, tests: str) -> subprocess.CompletedProcess[str]:
    (directory / "test_long.py").write_text(tests)
    command = [sys.executable, str(ROOT / "tools" / "long_form.py"), "kill", "--into", str(directory)]
    command += ["-c", str(ROOT / "pyproject.toml"), "-p", "no:cacheprovider", str(directory / "test_long.py")]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_a_long_form_stores_what_its_tests_counted_and_what_failed(tmp_path: Path) -> None:
    ended = _long_form(
        tmp_path,
        "from durability.counted import count\n"
        "def test_that_kills():\n    count('kills', 3)\n    count('kills')\n"
        "def test_that_fails():\n    assert False\n",
    )
    (path,) = tmp_path.glob("kill_*.json")
    document = json.loads(path.read_text())
    assert ended.returncode == 1
    assert document["counts"] == {"kills": 4}
    assert (document["cases"], len(document["failed"])) == (2, 1)
    assert document["failed"][0].endswith("::test_that_fails")
    (said,) = [said for kind, _, said, _ in proof.recorded_runs(tmp_path) if kind == "kill"]
    assert said == "4 kills, 2 tests, 1 that failed"


def test_a_long_form_that_was_stopped_stores_nothing(tmp_path: Path) -> None:
    ended = _long_form(tmp_path, "def test_that_passes(): ...\ndef test_that_is_stopped(): raise KeyboardInterrupt\n")
    assert ended.returncode == 2
    assert "1 passed" in ended.stdout
    assert "nothing is stored" in ended.stdout
    assert list(tmp_path.glob("kill_*.json")) == []
