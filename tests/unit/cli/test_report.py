"""`snapstone report` and `snapstone trace`: formats, files, exit codes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

from report.measured import disk_document, write_results
from snapstone.bench import results

Run = Callable[..., Result]
RunJson = Callable[..., tuple[int, dict[str, Any]]]


@pytest.fixture
def measured(tmp_path: Path) -> Path:
    return write_results(tmp_path / "R")


def test_the_page_is_written_whole_and_stdout_stays_empty(measured: Path, tmp_path: Path, snapstone: Run) -> None:
    target = tmp_path / "report.html"
    target.write_text("old")
    done = snapstone("report", measured, "-o", target)
    assert (done.exit_code, done.stdout) == (0, "")
    assert done.stderr == f"wrote {target}\n"
    assert target.read_text().startswith("<!doctype html>")
    assert target.stat().st_mode & 0o777 == 0o644
    assert sorted(path.name for path in tmp_path.iterdir()) == ["R", "report.html"]


def test_without_a_name_the_page_is_report_html_and_text_goes_to_stdout(
    measured: Path, tmp_path: Path, snapstone: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert snapstone("report", "R").exit_code == 0
    assert (tmp_path / "report.html").exists()
    assert snapstone("report", "R", "-o", "-").stdout.startswith("<!doctype html>")
    assert snapstone("report", "R", "--csv").stdout.startswith("file,kind,name")
    assert "| snapstone | 1.2.3 |" in snapstone("report", "R", "--markdown").stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["R", "report.html"]


def test_markdown_refers_to_the_chart_from_where_it_lies(measured: Path, tmp_path: Path, snapstone: Run) -> None:
    (tmp_path / "docs").mkdir()
    chart, target = tmp_path / "charts.svg", tmp_path / "docs" / "results.md"
    assert snapstone("report", measured, "--markdown", "--chart", chart, "-o", target).exit_code == 0
    assert 'src="../charts.svg"' in target.read_text()
    assert 'srcset="../charts-narrow.svg"' in target.read_text()
    assert (tmp_path / "charts-narrow.svg").read_text().startswith("<svg ")
    assert chart.read_text().startswith("<svg xmlns=")


def test_json_has_the_documents(measured: Path, snapstone_json: RunJson) -> None:
    code, document = snapstone_json("report", measured)
    assert code == 0
    assert document["schema"] == "snapstone.report/1"
    kinds = sorted(one["document"]["kind"] for one in document["documents"])
    assert kinds == ["disk", "link", "load", "model", "stall"]
    assert document["skipped"] == []


def test_a_file_of_another_version_is_named_and_the_others_are_reported(
    measured: Path, tmp_path: Path, snapstone: Run, snapstone_json: RunJson
) -> None:
    (measured / "stall-new.json").write_text(json.dumps({"format": "snapstone-bench", "version": 2}))
    done = snapstone("report", measured, "-o", tmp_path / "r.html")
    assert done.exit_code == 0
    assert done.stderr.startswith(f"snapstone: skipped {measured / 'stall-new.json'}: version 2")
    assert len(snapstone_json("report", measured)[1]["skipped"]) == 1


def test_no_result_is_a_finding_and_no_directory_is_not_found(tmp_path: Path, snapstone: Run) -> None:
    (tmp_path / "empty").mkdir()
    for command in ("report", "trace"):
        done = snapstone(command, tmp_path / "empty")
        assert (done.exit_code, done.stdout) == (1, "")
        assert str(tmp_path / "empty") in done.stderr
        assert snapstone(command).exit_code == 2
        missing = snapstone(command, tmp_path / "absent")
        assert (missing.exit_code, missing.stderr) == (
            3,
            f"snapstone: {tmp_path / 'absent'}: No such file or directory\n",
        )


def test_formats_exclude_each_other(measured: Path, snapstone: Run) -> None:
    assert snapstone("report", measured, "--csv", "--markdown").exit_code == 2
    assert snapstone("trace", measured, "--json", "-o", "-").exit_code == 2


def test_a_chart_needs_a_stall_document(tmp_path: Path, snapstone: Run) -> None:
    results.write(disk_document(), tmp_path, "one")
    done = snapstone("report", tmp_path, "--markdown", "--chart", tmp_path / "x.svg")
    assert (done.exit_code, done.stdout) == (2, "")
    assert "no chart to write" in done.stderr


def test_an_unwritable_target_is_named(measured: Path, snapstone: Run) -> None:
    target = measured / "absent" / "r.html"
    done = snapstone("report", measured, "-o", target)
    assert (done.exit_code, done.stderr) == (3, f"snapstone: {target}: No such file or directory\n")


def test_trace_says_what_it_merged(measured: Path, tmp_path: Path, snapstone: Run, snapstone_json: RunJson) -> None:
    target = tmp_path / "trace.json"
    done = snapstone("trace", measured, "-o", target)
    count = sum(event["ph"] == "X" for event in json.loads(target.read_text())["traceEvents"])
    assert (done.exit_code, done.stdout) == (0, f"{count} events in {target}\n")
    code, document = snapstone_json("trace", measured, "-o", target)
    assert (code, document["schema"], document["events"], document["clocks"]) == (0, "snapstone.trace/1", count, [])
    assert json.loads(snapstone("trace", measured, "-o", "-").stdout)["displayTimeUnit"] == "ms"
