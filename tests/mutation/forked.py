"""Tests in a process forked from this one, which has imported what they need: half a second instead of five."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import pytest

from mutation import sandbox

__all__ = ["MUTANT", "OUT_OF_TIME", "USAGE_ERROR", "Ran", "native_tests", "run_native", "run_python"]

MUTANT = "SNAPSTONE_MUTANT"  # names what is taken away: mutant.h, mutant.py
POLL_S = 0.02
NATIVE_SECONDS = 120
USAGE_ERROR = 4
OUT_OF_TIME = "ran out of time"


@dataclass
class Ran:
    """`failed`: the first test that failed, or was running when the process died or ran out of time."""

    results: list[dict[str, Any]] = field(default_factory=list)  # nodeid, outcome, seconds
    failed: str = ""
    message: str = ""
    code: int = 0


class _Reports:
    """A plugin: a line when a test begins, and one when it ends. At most `params` cases of a function, evenly taken."""

    def __init__(self, path: Path, params: int) -> None:
        self._file = path.open("a", buffering=1)
        self._params = params
        self._seconds: Counter[str] = Counter()

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        functions: dict[str, list[pytest.Item]] = {}
        for item in items:
            functions.setdefault(item.nodeid.partition("[")[0], []).append(item)
        kept = set()
        for cases in functions.values():
            step = max(1.0, len(cases) / self._params)
            kept |= {cases[int(at * step)].nodeid for at in range(min(len(cases), self._params))}
        items[:] = [item for item in items if item.nodeid in kept]

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._file.write(json.dumps({"begin": nodeid}) + "\n")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._seconds[report.nodeid] += report.duration
        if report.failed or report.when == "call" or report.skipped:
            crash = getattr(report.longrepr, "reprcrash", None)
            message = str(getattr(crash, "message", "") or (report.longrepr or ""))[:300] if report.failed else ""
            seconds = round(self._seconds[report.nodeid], 3)
            line = {"nodeid": report.nodeid, "outcome": report.outcome, "seconds": seconds, "message": message}
            self._file.write(json.dumps(line) + "\n")


def run_python(
    tree: Path,
    tests: Sequence[str],
    scratch: Path,
    seconds: float,
    env: Mapping[str, str],
    *,
    params: int = 1 << 30,
    first_failure: bool = True,
) -> Ran:
    """pytest in a fork; it and all that it started are killed after `seconds`. A mutant runs in a sandbox."""
    scratch.mkdir(parents=True, exist_ok=True)
    reports = scratch / "reports"
    reports.unlink(missing_ok=True)
    reports.touch()
    pid = os.fork()
    if pid == 0:
        _child(tree, tests, scratch, env, _Reports(reports, params), first_failure)
    code = _wait(pid, seconds)
    ran = Ran(code=code)
    running = ""
    for line in map(json.loads, reports.read_text().splitlines()):
        running = line.get("begin", "")
        if "nodeid" in line:
            ran.results.append(line)
            if line["outcome"] == "failed" and not ran.failed:
                ran.failed, ran.message = line["nodeid"], line["message"]
    if not ran.failed and code < 0:
        ran.failed = running or (str(tests[0]) if tests else "")
        ran.message = OUT_OF_TIME if code == -signal.SIGKILL else f"died of {signal.Signals(-code).name}"
    return ran


def _child(
    tree: Path, tests: Sequence[str], scratch: Path, env: Mapping[str, str], plugin: _Reports, first_failure: bool
) -> NoReturn:
    code = 70
    try:
        os.setsid()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        out = os.open(scratch / "output", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        for fd in (1, 2):
            os.dup2(out, fd)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.chdir(tree)
        os.environ.update(env)
        if MUTANT in env:
            sandbox.enter(scratch)
        args = ["-q", "-p", "no:cacheprovider", "--basetemp", str(scratch / "tmp"), "--rootdir", str(tree)]
        args += ["-c", str(tree / "pyproject.toml"), *(["-x"] if first_failure else [])]
        code = int(pytest.main([*args, *tests], plugins=[plugin]))
        sys.stdout.flush()
    finally:
        os._exit(code)


def _wait(pid: int, seconds: float) -> int:
    end = time.monotonic() + seconds
    status = 0
    done = 0
    while not done and time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if not done:
            time.sleep(POLL_S)
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)  # also what a finished one left running
    if not done:
        _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status)


def native_tests(tree: Path) -> list[str]:
    """ "native/store_staging::Suite.case" of all test programs that are built."""
    found = []
    for program in sorted((tree / "build/tests/native").glob("native_*")):
        if not os.access(program, os.X_OK) or program.is_dir():
            continue
        suite = ""
        for line in subprocess.run([program, "--gtest_list_tests"], capture_output=True, text=True).stdout.splitlines():
            if line.startswith(" "):
                found.append(f"native/{program.name.removeprefix('native_')}::{suite}{line.split()[0]}")
            elif line.endswith(".") or ". " in line:
                suite = line.split()[0]
    return found


def run_native(tree: Path, test: str, env: Mapping[str, str], scratch: Path) -> tuple[bool, str, float]:
    """Whether it passed, what it said if not, and seconds. A mutant runs in a sandbox."""
    scratch.mkdir(parents=True, exist_ok=True)
    program, _, case = test.removeprefix("native/").partition("::")
    begin = time.monotonic()
    command = [str(tree / "build/tests/native" / f"native_{program}"), f"--gtest_filter={case}"]
    given = {**os.environ, **env, "PYTEST_CURRENT_TEST": test}
    process = subprocess.Popen(
        command,
        env={**given, "TMPDIR": str(scratch)} if MUTANT in env else given,
        cwd=tree,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        preexec_fn=(lambda: sandbox.enter(scratch)) if MUTANT in env else None,
    )
    try:
        output, _ = process.communicate(timeout=NATIVE_SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return False, OUT_OF_TIME, time.monotonic() - begin
    failures = [line for line in output.decode(errors="replace").splitlines() if "Failure" in line or "what()" in line]
    message = (failures or [f"ended with {process.returncode}"])[0][:300]
    return process.returncode == 0, message, time.monotonic() - begin
