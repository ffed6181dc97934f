"""Runs tests in their long form, and stores what they did: `make kill`, `make sweep`, `make crash`, `make crash-ranks`.

    python tools/long_form.py THEME [--into DIRECTORY] PYTEST-ARGUMENTS...

Writes THEME_CPU_DATE.json into benchmarks/results: cases, what failed, what the tests counted
(tests/durability/counted.py).
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
TESTS_FAILED = 1  # pytest ran all of them
sys.path.insert(0, str(ROOT / "benchmarks"))

import machine  # noqa: E402


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0], allow_abbrev=False)
    parser.add_argument("theme")
    parser.add_argument("--into", type=Path, default=RESULTS, help="the directory of the document")
    given, of_pytest = parser.parse_known_args(arguments)
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        report, counts = Path(scratch, "report.xml"), Path(scratch, "counts")
        counts.touch()
        command = [sys.executable, "-m", "pytest", "--junitxml", str(report), *of_pytest]
        status = subprocess.run(
            command, env={**os.environ, "SNAPSTONE_TEST_COUNTS": str(counts)}, check=False
        ).returncode
        if status not in (0, TESTS_FAILED) or not report.exists():
            print("it did not come to its end: nothing is stored")
            return status or 1
        date = datetime.now(UTC).date()
        document = {
            "theme": given.theme,
            "date": date.isoformat(),
            "command": _command(of_pytest),
            "machine": machine.facts(),
            "seconds": round(time.monotonic() - begin, 1),
            "counts": _counted(counts),
            **_outcomes(report),
        }
    path = given.into / f"{given.theme}_{machine.cpu_slug()}_{date:%Y%m%d}.json"
    path.write_text(json.dumps(document, indent=1) + "\n")
    print(f"{path}: {document['cases']} cases, {document['counts']}")
    return status


def _command(of_pytest: Sequence[str]) -> str:
    knobs = [f"{name}={value}" for name, value in sorted(os.environ.items()) if name.startswith("SNAPSTONE_")]
    return shlex.join([*knobs, "pytest", *of_pytest])


def _counted(path: Path) -> dict[str, int]:
    counts: Counter[str] = Counter()
    for line in path.read_text().splitlines():
        what, _, number = line.partition("\t")
        counts[what] += int(number)
    return dict(sorted(counts.items()))


def _outcomes(report: Path) -> dict[str, Any]:
    cases = Counter({"cases": 0, "skipped": 0})
    failed = []
    for case in ElementTree.parse(report).iter("testcase"):
        kinds = {child.tag for child in case}
        cases["cases"] += 1
        cases["skipped"] += "skipped" in kinds
        if kinds & {"failure", "error"}:
            failed.append(f"{case.get('classname')}::{case.get('name')}")
    return {**cases, "failed": failed}


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
