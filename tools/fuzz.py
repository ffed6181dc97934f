"""Runs every fuzz target for its share of the time, and ends with 1 where one finds something: `make fuzz SECONDS=60`.

Native targets (tests/native/fuzz) are built with libFuzzer, ASan and UBSan; without clang they are left out with a
message. Python targets (tests/fuzz) follow coverage where atheris is installed, and are random where it is not. What
libFuzzer learns stays in build/fuzz-corpus for the next run; inputs that broke something are in build/fuzz-findings.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build" / "fuzz"
CORPUS = ROOT / "build" / "fuzz-corpus"
FINDINGS = ROOT / "build" / "fuzz-findings"
SEEDS = ROOT / "tests" / "native" / "fuzz" / "corpus"
LIMITS = ("-rss_limit_mb=1024", "-malloc_limit_mb=64", "-timeout=10", "-max_len=1024", "-print_final_stats=1")
TAIL_LINES = 40


def build() -> list[Path]:
    """The native targets; none where there is no clang with libFuzzer."""
    if shutil.which("clang++") is None:
        print("fuzz: native targets left out: no clang++")
        return []
    options = [
        "-DCMAKE_C_COMPILER=clang",
        "-DCMAKE_CXX_COMPILER=clang++",
        "-DSNAPSTONE_PYTHON=OFF",
        "-DSNAPSTONE_FUZZ=ON",
    ]
    subprocess.run(["cmake", "-S", ROOT, "-B", BUILD, *options], check=True, stdout=subprocess.DEVNULL)
    subprocess.run(["cmake", "--build", BUILD, "--target", "fuzz_targets", "--parallel"], check=True)
    return sorted(path for path in (BUILD / "tests/native/fuzz").glob("fuzz_*") if os.access(path, os.X_OK))


def python_targets() -> list[str]:
    text = (ROOT / "tests/fuzz/targets.py").read_text().partition("TARGETS: ")[2]
    return re.findall(r'^    "(\w+)": ', text, re.MULTILINE)


def run_native(binary: Path, seconds: float) -> dict[str, Any]:
    name = binary.name.removeprefix("fuzz_")
    learnt = CORPUS / "native" / name
    learnt.mkdir(parents=True, exist_ok=True)
    where = [f"-artifact_prefix={FINDINGS}/{name}-", str(learnt), str(SEEDS / name)]
    return run(f"native/{name}", [str(binary), f"-max_total_time={seconds:.0f}", *LIMITS, *where])


def run_python(name: str, seconds: float) -> dict[str, Any]:
    corpus = CORPUS / "python" / name
    return run(f"python/{name}", [sys.executable, str(ROOT / "tests/fuzz/run.py"), name, f"{seconds:.0f}", str(corpus)])


def run(target: str, command: list[str]) -> dict[str, Any]:
    begin = time.monotonic()
    paths = os.pathsep.join([str(ROOT / "python"), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    found = subprocess.run(command, capture_output=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": paths}, check=False)
    log = found.stderr.decode(errors="replace")
    executions = re.findall(r"number_of_executed_units:\s*(\d+)", log)
    coverage = re.findall(r" cov: (\d+)", log)
    if found.returncode != 0:
        FINDINGS.mkdir(parents=True, exist_ok=True)
        (FINDINGS / f"{target.replace('/', '-')}.log").write_text(log)
        print(f"{target}: found something\n" + "\n".join(log.splitlines()[-TAIL_LINES:]))
    return {
        "target": target,
        "executions": int(executions[-1]) if executions else 0,
        "coverage": int(coverage[-1]) if coverage else None,
        "seconds": round(time.monotonic() - begin, 1),
        "findings": int(found.returncode != 0),
    }


def cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def record(rows: list[dict[str, Any]], seconds: float, path: Path) -> None:
    """Adds the run to a document: executions and seconds of the runs before are kept in it."""
    before = {row["target"]: row for row in json.loads(path.read_text())["targets"]} if path.exists() else {}
    for row in rows:
        for key in ("executions", "seconds", "findings") if row["target"] in before else ():
            row[key] = round(row[key] + before[row["target"]][key], 1)
    rows = sorted((before | {row["target"]: row for row in rows}).values(), key=lambda row: str(row["target"]))
    document = {
        "theme": "fuzz",
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": f"make fuzz SECONDS={seconds:.0f}",
        "machine": {"cpu": cpu_model(), "cores": os.cpu_count(), "kernel": platform.release()},
        "coverage": "edges of the code under the target that libFuzzer counts",
        "executions": sum(row["executions"] for row in rows),
        "targets": rows,
    }
    path.write_text(json.dumps(document, indent=1) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=60, help="for all targets together (default: 60)")
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count() or 1, help="targets at a time (default: one per core)"
    )
    parser.add_argument("--native-only", action="store_true", help="leave out the targets in Python")
    parser.add_argument("--record", type=Path, help="a result document to write, or to add to")
    given = parser.parse_args()
    FINDINGS.mkdir(parents=True, exist_ok=True)
    natives, pythons = build(), [] if given.native_only else python_targets()
    share = max(1.0, given.seconds * given.jobs / max(1, len(natives) + len(pythons)))
    with ThreadPoolExecutor(given.jobs) as pool:
        jobs = [pool.submit(run_native, binary, share) for binary in natives]
        jobs += [pool.submit(run_python, name, share) for name in pythons]
        rows = [job.result() for job in jobs]
    for row in rows:
        print(
            f"{row['target']:28} {row['executions']:>10,} executions  {row['seconds']:>7} s  {row['coverage'] or '':>6}"
        )
    if given.record:
        record(rows, given.seconds, given.record)
    return 1 if any(row["findings"] or not row["executions"] for row in rows) else 0


if __name__ == "__main__":
    raise SystemExit(main())
