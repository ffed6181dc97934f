"""One mutant against the tests that reach it, the quickest first."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

from mutation.accepted import NOTICED_BY
from mutation.forked import MUTANT, OUT_OF_TIME, USAGE_ERROR, Ran, run_native, run_python
from mutation.record import Reached
from mutation.sites import Site

__all__ = ["Outcome", "judge", "judge_all"]

BATCHES = (
    (6, 60.0),
    (24, 240.0),
    (60, 600.0),
    (200, 120.0),  # the quickest of the rest
)  # tests, seconds that they may take: three times what they took, and a start
NATIVE_TESTS_MAX = 40
NATIVE_SECONDS_MAX = 60.0
CONFIRM_SECONDS = 120.0
UNRECORDED_SECONDS = 5.0
NO_MUTANT = "none"


@dataclass
class Outcome:
    name: str
    line: int
    text: str
    digest: str  # of the file
    killed_by: str  # empty: it survived
    message: str
    tried: int
    reached_by: int
    seconds: float


def judge(site: Site, digest: str, reached: Reached, tree: Path, scratch: Path) -> Outcome:
    begin = time.monotonic()
    tests = reached.by_site.get(site.name, [])
    env = {MUTANT: site.name}
    killed, message, tried = _by_native(tree, tests, reached, env, scratch)
    left = _hinted(site) + _varied([test for test in tests if not test.startswith("native/")])
    for number, (count, limit) in enumerate(BATCHES if not killed else (), 1):
        if number == len(BATCHES):
            left = sorted(left, key=lambda test: _seconds(test, reached))
        batch = left[:count]
        while (expected := sum(_seconds(test, reached) for test in batch)) > limit and len(batch) > 1:
            batch.pop()
        left = left[len(batch) :]
        if not batch:
            break
        seconds = 40 + 4 * expected
        ran = _run(tree, batch, scratch, seconds, env)
        tried += len(batch)
        if ran.message == OUT_OF_TIME:  # which may be the machine's fault
            ran = _run(tree, [ran.failed], scratch, CONFIRM_SECONDS + seconds, env)
        if ran.failed:
            if _run(tree, [ran.failed], scratch, CONFIRM_SECONDS + seconds, {MUTANT: NO_MUTANT}).code == 0:
                killed, message = ran.failed, ran.message
                break
            left = [test for test in batch if test != ran.failed] + left  # it fails in the sandbox in any case
    shutil.rmtree(scratch, ignore_errors=True)
    seconds = round(time.monotonic() - begin, 2)
    return Outcome(site.name, site.line, site.text[:160], digest, killed, message, tried, len(tests), seconds)


def _by_native(
    tree: Path, tests: list[str], reached: Reached, env: dict[str, str], scratch: Path
) -> tuple[str, str, int]:
    native = [test for test in tests if test.startswith("native/")][:NATIVE_TESTS_MAX]
    spent = 0.0
    for tried, test in enumerate(native, 1):
        spent += reached.seconds[test]
        if spent > NATIVE_SECONDS_MAX and tried > 1:
            return "", "", tried - 1
        passed, message, _ = run_native(tree, test, env, scratch)
        if not passed and run_native(tree, test, {**env, MUTANT: NO_MUTANT}, scratch)[0]:  # not the sandbox's doing
            return test, message, tried
    return "", "", len(native)


def _run(tree: Path, tests: list[str], scratch: Path, seconds: float, env: dict[str, str]) -> Ran:
    ran = run_python(tree, tests, scratch, seconds, env)
    if ran.code == USAGE_ERROR:  # names that pytest does not take back
        ran = run_python(tree, sorted({test.partition("[")[0] for test in tests}), scratch, seconds, env)
    return ran


def _seconds(test: str, reached: Reached) -> float:
    return reached.seconds.get(test, UNRECORDED_SECONDS)


def _hinted(site: Site) -> list[str]:
    where = site.name.partition("#")[0]
    return [test for name, text, test in NOTICED_BY if name == where and site.text.startswith(text)]


def _varied(tests: list[str]) -> list[str]:
    """First one case of each file, then one of each function, then the second ones; the quickest first among them."""
    turns: Counter[str] = Counter()
    numbered = []
    for test in tests:
        file, function = test.partition("::")[0], test.partition("[")[0]
        numbered.append(((turns[function], turns[file] > 0), test))
        turns.update({file, function})
    return [test for _, test in sorted(numbered, key=lambda pair: pair[0])]


def judge_all(
    sites: list[Site], digests: dict[str, str], reached: Reached, tree: Path, work: Path, jobs: int, seconds: float
) -> list[Outcome]:
    """In processes of their own, `jobs` at a time; each outcome is added to work/outcomes.jsonl when it is there. Stops
    to begin with new ones after `seconds`.
    """
    end = time.monotonic() + seconds
    left, running, done = list(sites), dict[int, tuple[Site, Path]](), list[Outcome]()
    while running or (left and time.monotonic() < end):
        if left and len(running) < jobs and time.monotonic() < end:
            site = left.pop(0)
            scratch = work / "scratch" / f"{os.getpid()}-{len(left)}"
            answer = scratch.with_suffix(".json")
            scratch.parent.mkdir(parents=True, exist_ok=True)
            answer.unlink(missing_ok=True)
            pid = os.fork()
            if pid == 0:
                try:
                    outcome = judge(site, digests[site.path], reached, tree, scratch)
                    answer.write_text(json.dumps(asdict(outcome)))
                finally:
                    os._exit(0)
            running[pid] = site, answer
            continue
        pid, _ = os.waitpid(-1, 0)
        if pid not in running:
            continue
        site, answer = running.pop(pid)
        if not answer.exists():
            print(f"{site.name}: no answer", flush=True)
            continue
        outcome = Outcome(**json.loads(answer.read_text()))
        answer.unlink()
        done.append(outcome)
        with (work / "outcomes.jsonl").open("a") as file:
            file.write(json.dumps(asdict(outcome)) + "\n")
        said = f"killed by {outcome.killed_by}" if outcome.killed_by else f"SURVIVED {outcome.tried} tests"
        print(f"{outcome.name} ({outcome.text[:60]}): {said}", flush=True)
    return done
