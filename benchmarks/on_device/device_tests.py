"""The CUDA tests on the device: each file in a process of its own, since a device that has failed fails whatever a
process does afterwards. A test that hangs is ended, and those after it run in a new process.

Skipping is a failure there, and so is finding no test.
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from . import processes
from .test_log import LOG_VARIABLE, entries

__all__ = ["files", "run"]

ROOT = Path(__file__).resolve().parents[2]
SECONDS_OF_ONE = 25  # pytest ends it; at the double of that, as in a call that does not return, we do
_OF_THE_FAKE = re.compile(r"^pytestmark = pytest\.mark\.skipif\(IS_REAL", re.MULTILINE)
_FAILURES_MAX = 40
_AT_A_TIME = 4


def files(directory: Path = ROOT / "tests" / "cuda") -> list[Path]:
    """Those that are about a device."""
    found = sorted(directory.glob("test_*.py"))
    return [path for path in found if "test_fake_" not in path.name and not _OF_THE_FAKE.search(path.read_text())]


def run(
    tests: list[Path], seconds: float, scratch: Path, environment: Mapping[str, str], *, wanted: str = ""
) -> dict[str, Any]:
    """`wanted`: an expression for pytest's -k.

    Returns:
        status ("passed", "failed"), reason, counts by outcome ("passed", "failed", "skipped", "hung"), failures with
        the end of what they said.
    """
    end = time.monotonic() + seconds
    with ThreadPoolExecutor(_AT_A_TIME) as pool:
        found = list(pool.map(lambda path: _run_file(path, end, scratch, environment, wanted), tests))
    counts = dict.fromkeys(("passed", "failed", "skipped", "hung"), 0)
    failures, problems = [], []
    for outcomes, problem in found:
        for test, (outcome, said) in outcomes.items():
            counts[outcome] += 1
            if outcome != "passed":
                failures.append({"test": test, "what": outcome, "said": said})
        problems += [problem] if problem else []
    bad = [f"{count} {outcome}" for outcome, count in counts.items() if count and outcome != "passed"]
    if not sum(counts.values()):
        bad.append("no test was found")
    reason = "; ".join([*bad, *problems]) or None
    return {
        "status": "failed" if reason else "passed",
        "reason": reason,
        "counts": counts,
        "failures": failures[:_FAILURES_MAX],
    }


Outcomes = dict[str, tuple[str, str]]


def _run_file(
    path: Path, end: float, scratch: Path, environment: Mapping[str, str], wanted: str
) -> tuple[Outcomes, str | None]:
    """What became of each test, and what was wrong besides."""
    notes, log = scratch / f"{path.stem}.jsonl", scratch / f"{path.stem}.txt"
    variables = {**environment, LOG_VARIABLE: str(notes)}
    command = [
        *(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "on_device.test_log", "--tb=short"),
        *(f"--timeout={SECONDS_OF_ONE}", f"--rootdir={ROOT}", str(path)),
        *(("-k", wanted) if wanted else ()),
    ]
    while True:
        known = len(entries(notes))
        notes.touch()
        ended = processes.run(
            command,
            seconds=end - time.monotonic(),
            log=log,
            environment=variables,
            cwd=ROOT,
            alive=lambda: _seconds_since_change(notes) < 2 * SECONDS_OF_ONE,
        )
        outcomes, hung = _outcomes(notes)
        if hung is None:
            # 1: tests failed, as their entries say; 5: all of them were run before.
            fine = ended.returncode in (0, 1) or (ended.returncode == 5 and outcomes)
            return outcomes, None if fine else f"{path.name}: {ended.problem}: {processes.tail(log)[-300:]}"
        if time.monotonic() > end or len(entries(notes)) == known:
            return outcomes, f"{path.name}: not run to the end: {ended.problem}"


def _seconds_since_change(path: Path) -> float:
    return time.time() - path.stat().st_mtime


def _outcomes(notes: Path) -> tuple[Outcomes, str | None]:
    """Of each test that has begun; and whether the last one that began never ended."""
    outcomes: Outcomes = {}
    hung = None
    for entry in entries(notes):
        if "begun" in entry:
            hung = entry["begun"]
            outcomes[hung] = ("hung", "")
        else:
            if outcomes.get(entry["test"], ("hung", ""))[0] in ("hung", "passed"):
                outcomes[entry["test"]] = (entry["outcome"], entry["said"])
            hung = None
    return outcomes, hung
