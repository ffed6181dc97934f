"""Runs benchmarks/micro under pytest-benchmark and keeps what belongs in a result: no names of hosts, no paths."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from machine import version_of

__all__ = ["measure"]

DIRECTORY = Path(__file__).resolve().parent / "micro"
SECONDS_PER_BENCHMARK = 1.0


def measure(scratch: Path) -> list[dict[str, Any]] | str:
    """Medians per benchmark, or why there are none."""
    if version_of("pytest-benchmark") is None:
        return "pytest-benchmark is not installed"
    report = scratch / "micro.json"
    command = [
        *(sys.executable, "-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider", str(DIRECTORY)),
        *("-o", "addopts=", "-o", "python_files=bench_*.py", "-o", "python_functions=bench_*"),
        *("--benchmark-only", "--benchmark-warmup=on", "--benchmark-warmup-iterations=1", "--benchmark-quiet"),
        *(
            f"--benchmark-max-time={SECONDS_PER_BENCHMARK}",
            f"--benchmark-json={report}",
            f"--basetemp={scratch / 'micro'}",
        ),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        print(done.stdout, done.stderr, file=sys.stderr)
        return f"pytest ended with status {done.returncode}"
    return [
        {
            "name": one["name"].removeprefix("bench_"),
            "nbytes": one["extra_info"].get("nbytes"),
            "rounds": one["stats"]["rounds"],
            "median_seconds": one["stats"]["median"],
            "min_seconds": one["stats"]["min"],
            "max_seconds": one["stats"]["max"],
        }
        for one in json.loads(report.read_text())["benchmarks"]
    ]
