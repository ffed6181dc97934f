"""A pytest plugin (`-p on_device.test_log`) that notes each test as it begins and ends, so that a run which has to be
ended is known up to there; what the log has already is not run again.

The log, SNAPSTONE_TEST_LOG, has one JSON object on a line: {"begun": test}, or {"test", "outcome", "said"}.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

__all__ = ["LOG_VARIABLE", "entries"]

LOG_VARIABLE = "SNAPSTONE_TEST_LOG"
_CHARACTERS = 1500


def entries(log: Path) -> list[dict[str, Any]]:
    """All whole lines."""
    try:
        lines = log.read_text().splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue  # of a process that was ended while it wrote
    return found


def _note(entry: dict[str, Any]) -> None:
    with open(os.environ[LOG_VARIABLE], "a") as file:
        file.write(json.dumps(entry) + "\n")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    known = {entry.get("begun") for entry in entries(Path(os.environ[LOG_VARIABLE]))}
    config.hook.pytest_deselected(items=[item for item in items if item.nodeid in known])
    items[:] = [item for item in items if item.nodeid not in known]


def pytest_runtest_logstart(nodeid: str) -> None:
    _note({"begun": nodeid})


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when != "call" and report.passed:
        return
    said = "" if report.passed else str(report.longrepr)[-_CHARACTERS:]
    _note({"test": report.nodeid, "outcome": report.outcome, "when": report.when, "said": said})


def pytest_collectreport(report: pytest.CollectReport) -> None:
    """A file that cannot be imported, or skips itself."""
    if not report.passed:
        said = str(report.longrepr)[-_CHARACTERS:]
        _note({"begun": report.nodeid})
        _note({"test": report.nodeid, "outcome": report.outcome, "when": "collect", "said": said})
