"""The benchmark itself: a quick run measures every engine, and its JSON becomes the README's table."""

from __future__ import annotations

import getpass
import json
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from report.measured import stall_document
from snapstone.bench import results
from snapstone.report import Measurements, markdown

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
# What a machine may lack; their rows then carry the reason.
OPTIONAL = {"limit", "fio", "safetensors", "torch-checkpointing"}
BLOCK = "<!-- bench:begin -->\nold table\n<!-- bench:end -->"
README = f"# snapstone\n\nBefore.\n\n<!-- stall:begin -->\nold chart\n<!-- stall:end -->\n\n{BLOCK}\n\nAfter.\n"
PAGE = f"# Benchmarks\n\n{BLOCK}\n"


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *map(str, arguments)], capture_output=True, text=True, timeout=110, cwd=BENCHMARKS, check=False
    )


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The JSON of a quick run; test_under_dcp.py has the rows that are left out here."""
    directory = tmp_path_factory.mktemp("bench")
    places = ("--directory", directory / "work", "--results", directory / "results")
    done = run(BENCHMARKS / "run.py", "--quick", "--states", "2gb,small", *places)
    assert done.returncode == 0, done.stderr
    assert list((directory / "work").iterdir()) == [], "the run left checkpoints behind"
    (found,) = (directory / "results").iterdir()
    return found


@pytest.fixture(scope="module")
def document(result: Path) -> dict[str, Any]:
    return dict(json.loads(result.read_text()))


def test_every_engine_has_samples_or_says_why_not(document: dict[str, Any]) -> None:
    assert {(one["state"], one["place"]) for one in document["scenarios"]} >= {("2gb", "disk"), ("small", "disk")}
    for scenario in document["scenarios"]:
        assert {"snapstone", "dcp", "dcp-2", "torch"} <= set(scenario["engines"])
        for name, entry in scenario["engines"].items():
            if entry["skipped"] is not None:
                assert name in OPTIONAL, f"{name}: {entry['skipped']}"
                continue
            assert len(entry["samples"]["save_seconds"]) == scenario["rounds"]
            assert all(seconds > 0 for samples in entry["samples"].values() for seconds in samples if samples)
            assert entry["verified"] or name in ("limit", "fio"), name


def test_asynchronous_engines_report_their_stall_within_the_time_to_durable(document: dict[str, Any]) -> None:
    for scenario in document["scenarios"]:
        if scenario["place"] != "disk":
            continue
        for name in ("snapstone-async", "dcp-async"):
            samples = scenario["engines"][name]["samples"]
            pairs = zip(samples["stall_seconds"], samples["save_seconds"], strict=True)
            assert all(0 < stall < durable for stall, durable in pairs)


def test_fenced_calls_are_timed_from_the_second_one_on(document: dict[str, Any]) -> None:
    (small,) = (one for one in document["scenarios"] if (one["state"], one["place"]) == ("small", "disk"))
    fence = small["fence"]
    assert fence["tensors"] == 100
    assert len(fence["call_seconds"]) == small["rounds"]


def test_targets_are_judged_from_the_samples_of_the_run(document: dict[str, Any]) -> None:
    verdicts = {verdict["what"]: verdict for verdict in document["targets"]}
    large = next(one for one in document["scenarios"] if (one["state"], one["place"]) == ("2gb", "disk"))
    seconds = {name: large["engines"][name]["samples"]["save_seconds"][0] for name in ("snapstone", "dcp", "dcp-2")}
    ratio = min(seconds["dcp"], seconds["dcp-2"]) / seconds["snapstone"]
    verdict = verdicts["2gb save, against the best DCP"]
    assert verdict["got"] == f"{ratio:.2f}x"
    assert verdict["passed"] is (ratio >= 1.8)
    assert len(verdicts) == 13 + 8 + 5
    assert verdicts["dcp.save"]["passed"] is None, "not measured in this run"


def test_the_json_names_the_hardware_and_neither_host_nor_user_nor_path(result: Path, document: dict[str, Any]) -> None:
    assert {"cpu", "cores", "memory_gib", "kernel", "python", "torch"} <= set(document["machine"])
    assert document["command"].startswith("python benchmarks/run.py --quick")
    text = result.read_text()
    assert not re.search(r'"/|/(tmp|home|root|work|dev/shm)\b', text)
    assert socket.gethostname() not in text
    if getpass.getuser() != "root":
        assert getpass.getuser() not in text


@pytest.fixture
def pages(tmp_path: Path) -> tuple[Path, Path]:
    """A README and a page that hold something old."""
    readme, page = tmp_path / "README.md", tmp_path / "page.md"
    readme.write_text(README)
    page.write_text(PAGE)
    return readme, page


def readme_table(pages: tuple[Path, Path], result: Path, *more: object) -> subprocess.CompletedProcess[str]:
    readme, page = pages
    return run(BENCHMARKS / "readme_table.py", "--readme", readme, "--page", page, "--result", result, *more)


def test_tables_replace_what_is_between_the_markers_and_nothing_else(result: Path, pages: tuple[Path, Path]) -> None:
    assert readme_table(pages, result, "--check").returncode == 1
    done = readme_table(pages, result)
    assert done.returncode == 0, done.stderr
    text, full = (path.read_text() for path in pages)
    assert text.startswith("# snapstone\n\nBefore.\n\n<!-- stall:begin -->\n")
    assert text.endswith("<!-- bench:end -->\n\nAfter.\n")
    assert "old table" not in text + full
    assert "old chart" not in text
    for found in (text, full):
        assert re.search(r"^\| \*\*snapstone\*\* \| \d", found, re.MULTILINE)
        assert "torch.distributed.checkpoint" in found
    assert "Small tensors: " in full
    assert "Small tensors: " not in text
    assert readme_table(pages, result, "--check").returncode == 0


def test_a_readme_without_markers_is_refused(result: Path, pages: tuple[Path, Path]) -> None:
    pages[0].write_text("# snapstone\n")
    done = readme_table(pages, result)
    assert done.returncode == 1
    assert "stall:begin" in done.stderr
    assert pages[0].read_text() == "# snapstone\n"
    assert pages[1].read_text() == PAGE


def test_the_stall_run_becomes_table_and_charts(result: Path, pages: tuple[Path, Path], tmp_path: Path) -> None:
    run_directory = tmp_path / "stall_cpu_20261121"
    results.write(stall_document(), run_directory, "2gb")
    assert readme_table(pages, result, "--stall", run_directory).returncode == 0
    text = pages[0].read_text()
    block = text.partition("<!-- stall:begin -->\n")[2].partition("<!-- stall:end -->")[0]
    shown = Measurements.read(run_directory)
    assert markdown(shown, "docs/images/stall.svg").strip() in block, "the report's own words"
    assert re.search(r"^\| snapstone \| 1\.2\.3 \| 40\.\d\sms", block, re.MULTILINE)
    for name in ("stall.svg", "stall-narrow.svg"):
        assert f'="docs/images/{name}"' in block
        assert (tmp_path / "docs" / "images" / name).read_text().startswith("<svg ")
    check = (pages, result, "--stall", run_directory, "--check")
    assert readme_table(*check).returncode == 0
    (tmp_path / "docs" / "images" / "stall.svg").write_text("<svg/>")
    assert readme_table(*check).returncode == 1


def test_the_repository_shows_what_its_stored_results_say() -> None:
    """Where no stall run is stored, the README has no stall table; a chart without a run would be out of date."""
    done = run(BENCHMARKS / "readme_table.py", "--check")
    assert done.returncode == 0, done.stderr
    readme = (BENCHMARKS.parent / "README.md").read_text()
    stored = list((BENCHMARKS / "results").glob("stall_*/stall-*.json"))
    assert ("docs/images/stall.svg" in readme) is bool(stored)
    assert (BENCHMARKS.parent / "docs" / "images" / "stall.svg").exists() is bool(stored)


def test_micro_benchmarks_run(tmp_path: Path) -> None:
    pytest.importorskip("pytest_benchmark")
    done = run(
        *("-m", "pytest", "-q", BENCHMARKS / "micro", "-p", "no:cacheprovider", f"--basetemp={tmp_path / 'base'}"),
        *("-o", "addopts=", "-o", "python_files=bench_*.py", "-o", "python_functions=bench_*", "--benchmark-disable"),
    )
    assert done.returncode == 0, done.stdout
    assert re.search(r"\b19 passed", done.stdout), done.stdout
