"""Runs every test that docs/guarantees.md names, and writes what came out at the end of that page: `make proof`.

`--missing` runs only those of which the page has no counts yet, `--recorded` none: both keep the other counts. The page
is written after each file of tests, so that a run that was stopped goes on with `--missing`. `--report` takes the
counts of Python tests from a run of all (`make test PYTEST_ARGS="--junitxml=FILE"`). With the counts stand the newest
documents of benchmarks/results of the long forms: states, seeds, kills, executions, mutants.
"""

from __future__ import annotations

import argparse
import datetime
import fnmatch
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "guarantees.md"
RESULTS = ROOT / "benchmarks" / "results"
TITLE = "## Counts of the last run"
BEGIN, END = "<!-- proof: begin -->", "<!-- proof: end -->"
SECONDS_PER_TEST = 900
NOT_RUN = "not run"

FAILURES = ("violations", "findings", "that broke a rule", "that failed", "not noticed", "not taken away")

# Of each kind of document what is worth a word: (key, or keys one inside the other; what it counts).
KINDS: dict[str, tuple[tuple[str, str], ...]] = {
    "crash": (
        ("total.states", "states after a crash"), ("total.recovery_states", "after a second one"),
        ("total.checkpoints_read", "different checkpoints read"), ("total.violations", "violations"),
    ),
    "ranks": (("seeds", "histories"), ("failed", "that broke a rule"), ("played_again", "that had, before a change")),
    "fuzz": (
        ("executions_native", "executions of native parsers"), ("executions_python", "of Python ones"),
        ("findings", "findings"),
    ),
    "soak": (
        ("counts.lives", "lives"), ("counts.kills", "kills"), ("counts.checkpoints checked", "checkpoints read"),
        ("found", "findings"),
    ),
    "kill": (("counts.kills", "kills"), ("cases", "tests"), ("failed", "that failed")),
    "kill-ranks": (("counts.kills", "kills"), ("cases", "tests"), ("failed", "that failed")),
    "sweep": (("counts.failing calls", "failing calls"), ("cases", "tests"), ("failed", "that failed")),
    "cuts": (("counts.power cuts", "power cuts"), ("cases", "tests"), ("failed", "that failed")),
    "links": (("counts.cut links", "cut links"), ("cases", "tests"), ("failed", "that failed")),
    "mutation": (
        ("sites", "checks"), ("mutants", "taken away"), ("killed", "noticed"), ("survived", "that survived"),
        ("reached_by_no_recorded_test", "reached by no recorded test"), ("accepted", "of both accepted with a reason"),
        ("not_noticed", "not noticed"), ("not_judged", "not taken away"),
    ),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Count:
    cases: int
    passed: int
    skipped: int
    date: str

    @property
    def failed(self) -> int:
        return self.cases - self.passed - self.skipped


def named_tests(page: str) -> dict[str, list[str]]:
    """Of each test that the page names outside of the section: numbers of the promises, or "" where it has none."""
    found: dict[str, list[str]] = {}
    for part in re.split(r"^## ", page.partition(TITLE)[0], flags=re.MULTILINE):
        match = re.match(r"(\d+)\.", part)
        for name in re.findall(r"\btests/[\w./-]*\w::[\w.]+", part):
            promises = found.setdefault(name, [])
            if (promise := match[1] if match else "") not in promises:
                promises.append(promise)
    return found


def counted_tests(page: str) -> dict[str, Count]:
    """What the section says of tests that were run."""
    row = re.compile(r"^\|[^|]*\| `(tests/[^`]+)` \| (\d+) \| (\d+) \| (\d+) \| ([\d-]+) \|$", re.MULTILINE)
    section = page.partition(TITLE)[2]
    return {
        name: Count(int(cases), int(ok), int(skipped), date) for name, cases, ok, skipped, date in row.findall(section)
    }


def listed_tests(page: str) -> set[str]:
    """Whether they were run or not."""
    return set(re.findall(r"^\|[^|]*\| `(tests/[^`]+)` \|", page.partition(TITLE)[2], re.MULTILINE))


def run(names: Iterable[str], native: Path) -> Iterator[dict[str, Count]]:
    """File by file; nothing of native tests that are not built."""
    by_file: dict[str, list[str]] = {}
    for name in names:
        by_file.setdefault(name.partition("::")[0], []).append(name)
    for path, here in sorted(by_file.items()):
        with tempfile.TemporaryDirectory() as directory:
            yield (_run_python if path.endswith(".py") else _run_native)(sorted(here), native, Path(directory))


def _run_python(names: Sequence[str], _: Path, scratch: Path) -> dict[str, Count]:
    report = scratch / "python.xml"
    command = [sys.executable, "-m", "pytest", "-q", "--junitxml", str(report), *names]
    subprocess.run(command, cwd=ROOT, check=False)
    return counts_of(report, names)


def counts_of(report: Path, names: Iterable[str]) -> dict[str, Count]:
    """Of Python tests, from what pytest wrote with --junitxml."""
    cases: dict[str, list[str]] = {name: [] for name in names}
    for case in ElementTree.parse(report).iter("testcase"):
        *folders, last = (case.get("classname") or "").split(".")
        of_class = last[:1].isupper()  # of hypothesis, a machine of states
        path = "/".join(folders if of_class else [*folders, last])
        name = f"{path}.py::{last if of_class else (case.get('name') or '').partition('[')[0]}"
        if name in cases:
            cases[name].append(_outcome(case))
    return {name: _count(outcomes) for name, outcomes in cases.items()}


def _run_native(names: Sequence[str], native: Path, scratch: Path) -> dict[str, Count]:
    """tests/native/store/staging_test.cc::Suite.case is in native_store_staging; cases of TEST_P have more around."""
    counts = {}
    for source in sorted({name.partition("::")[0] for name in names}):
        program = source.removeprefix("tests/native/").removesuffix("_test.cc").replace("/", "_")
        wanted = [name.partition("::")[2] for name in names if name.startswith(f"{source}::")]
        report = scratch / f"{program}.xml"
        if not (native / f"native_{program}").exists():
            continue
        chosen = ":".join(pattern for case in wanted for pattern in (case, f"*/{case}/*", f"{case}/*"))
        command = [str(native / f"native_{program}"), f"--gtest_filter={chosen}", f"--gtest_output=xml:{report}"]
        subprocess.run(command, check=False, stdout=subprocess.DEVNULL, timeout=SECONDS_PER_TEST)
        cases: dict[str, list[str]] = {case: [] for case in wanted}
        for case in ElementTree.parse(report).iter("testcase"):
            suite = (case.get("classname") or "").rpartition("/")[2]
            name = f"{suite}.{(case.get('name') or '').partition('/')[0]}"
            if name in cases:
                cases[name].append(_outcome(case))
        counts.update({f"{source}::{case}": _count(outcomes) for case, outcomes in cases.items()})
    return counts


def _outcome(case: ElementTree.Element) -> str:
    kinds = {child.tag for child in case}
    if kinds & {"failure", "error"}:
        return "failed"
    return "skipped" if "skipped" in kinds or case.get("result") == "skipped" else "passed"


def _count(outcomes: list[str]) -> Count:
    today = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d")
    return Count(len(outcomes), outcomes.count("passed"), outcomes.count("skipped"), today)


def recorded_runs(folder: Path = RESULTS) -> list[tuple[str, str, str, str]]:
    """(kind, date, what it counted, command) of the newest document of each kind."""
    rows = []
    for kind, keys in KINDS.items():
        documents = [json.loads(path.read_text()) for path in folder.glob(f"{kind}_*.json")]
        if not documents:
            rows.append((kind, "-", NOT_RUN, "-"))
        else:
            newest = max(documents, key=lambda document: str(document["date"]))
            counts = [(_inside(newest, key), words) for key, words in keys]
            said = ", ".join(f"{value:,} {words}" for value, words in counts if value is not None)
            rows.append((kind, str(newest["date"])[:10], said, str(newest["command"])))
    return rows


def shortfalls(runs: list[tuple[str, str, str, str]]) -> dict[str, str]:
    """What was counted by those that found something, or have not run."""
    failed = re.compile(rf"\b[1-9][\d,]* ({'|'.join(FAILURES)})(,|$)")
    return {kind: said for kind, _, said, _ in runs if said == NOT_RUN or failed.search(said)}


def _inside(document: dict[str, Any], keys: str) -> int | float | None:
    value: Any = document
    for key in keys.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    if isinstance(value, list | dict):
        return len(value)
    return value if isinstance(value, int | float) else None


def section(named: dict[str, list[str]], counts: dict[str, Count], runs: list[tuple[str, str, str, str]]) -> str:
    lines = [TITLE, "", BEGIN, "", "What `make proof` counted: cases of each test named above, and the newest runs of"]
    lines += ["the long forms.", "", "| promise | tests run | cases | passed | skipped |", "|---|---|---|---|---|"]
    for promise in sorted({promise for promises in named.values() for promise in promises}):
        here = [counts[name] for name, promises in named.items() if promise in promises and name in counts]
        sums = [sum(values) for values in zip(*((one.cases, one.passed, one.skipped) for one in here), strict=True)]
        lines.append(f"| {promise or '-'} | {len(here)} | {' | '.join(map(str, sums or [0, 0, 0]))} |")
    lines += ["", "| long form | date | counted | command |", "|---|---|---|---|"]
    lines += [f"| {' | '.join(cell.replace('|', '/') for cell in run)} |" for run in runs]
    lines += ["", "| promises | test | cases | passed | skipped | date |", "|---|---|---|---|---|---|"]
    for name, promises in sorted(named.items(), key=lambda pair: (pair[1], pair[0])):
        one = counts.get(name)
        said = f"{one.cases} | {one.passed} | {one.skipped} | {one.date}" if one else "- | - | - | not run"
        lines.append(f"| {', '.join(promises)} | `{name}` | {said} |")
    return "\n".join([*lines, "", END, ""])


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("tests", nargs="*", help="patterns of names, as 'tests/unit/*' (default: all)")
    parser.add_argument("--missing", action="store_true", help="run only tests that have no counts yet")
    parser.add_argument("--recorded", action="store_true", help="run no tests; documents of benchmarks/results alone")
    parser.add_argument("--report", type=Path, help="Python tests are those of this file; native ones are run")
    parser.add_argument(
        "--native", type=Path, default=ROOT / "build/native/tests/native", help="where test programs are"
    )
    given = parser.parse_args(arguments)
    page = PAGE.read_text()
    named, counts = named_tests(page), counted_tests(page)
    counts = {name: count for name, count in counts.items() if name in named}
    os.environ["PYTHONPATH"] = os.pathsep.join(
        [str(ROOT / "python"), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
    )
    wanted = [name for name in named if not given.recorded and not (given.missing and name in counts)]
    if given.tests:
        wanted = [name for name in wanted if any(fnmatch.fnmatch(name, pattern) for pattern in given.tests)]
    if given.report is not None:
        counts |= counts_of(given.report, [name for name in wanted if name.partition("::")[0].endswith(".py")])
        wanted = [name for name in wanted if not name.partition("::")[0].endswith(".py")]
    for more in itertools.chain([{}], run(wanted, given.native)):
        counts |= more
        PAGE.write_text(page.partition(TITLE)[0].rstrip() + "\n\n" + section(named, counts, recorded_runs()))
    wrong = [name for name, count in counts.items() if count.failed or not count.cases]
    for name in wrong:
        print(f"proof: {name}: {counts[name]}")
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
