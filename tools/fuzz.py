"""Runs every fuzz target for its share of the time, and ends with 1 where one finds something: `make fuzz SECONDS=60`.

Native targets (tests/native/fuzz) are built with libFuzzer, ASan and UBSan; without clang they are left out with a
message (`FAIL_WITHOUT=clang` makes that a failure). Python targets (tests/fuzz) follow coverage where atheris is
installed, and are random where it is not. What libFuzzer learns stays in build/fuzz-corpus for the next run; inputs
that broke something are in build/fuzz-findings. Every input has limits of time and memory, and a target that outlasts
its share by `GRACE_SECONDS` has failed, too.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import os
import platform
import re
import shlex
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
# Guards against what hangs or takes the machine's memory; the limits of an input are in limited_input.cc beside the
# native targets, and in tests/fuzz/limits.py.
LIMITS = ("-rss_limit_mb=1024", "-malloc_limit_mb=64", "-timeout=10", "-max_len=1024", "-print_final_stats=1")
TAIL_LINES = 40
# Beyond a target's share: to import, to make a sound checkpoint, and to be the last input, which may take a minute.
GRACE_SECONDS = 180.0


def build() -> list[Path]:
    """The native targets; none where there is no clang with libFuzzer."""
    if shutil.which("clang++") is None:
        print("fuzz: native targets left out: no clang++")
        if {"all", "clang"} & set(os.environ.get("FAIL_WITHOUT", "").replace(",", " ").split()):
            raise SystemExit("fuzz: FAIL_WITHOUT names clang")
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


def native_targets() -> list[str]:
    return sorted(path.name.removesuffix("_fuzz.cc") for path in (ROOT / "tests/native/fuzz").glob("*_fuzz.cc"))


def python_targets() -> list[str]:
    text = (ROOT / "tests/fuzz/targets.py").read_text().partition("TARGETS: ")[2]
    return re.findall(r'^    "(\w+)": ', text, re.MULTILINE)


def run_native(binary: Path, seconds: float) -> dict[str, Any]:
    name = binary.name.removeprefix("fuzz_")
    learnt = CORPUS / "native" / name
    learnt.mkdir(parents=True, exist_ok=True)
    where = [f"-artifact_prefix={FINDINGS}/{name}-", str(learnt), str(SEEDS / name)]
    command = [str(binary), f"-max_total_time={seconds:.0f}", *LIMITS, *where]
    return run(f"native/{name}", command, seconds + GRACE_SECONDS)


def run_python(name: str, seconds: float) -> dict[str, Any]:
    program, corpus = str(ROOT / "tests/fuzz/run.py"), CORPUS / "python" / name
    command = [sys.executable, program, name, f"{seconds:.0f}", str(corpus), str(FINDINGS)]
    return run(f"python/{name}", command, seconds + GRACE_SECONDS)


def run(target: str, command: list[str], seconds_max: float) -> dict[str, Any]:
    begin = time.monotonic()
    paths = os.pathsep.join([str(ROOT / "python"), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=ROOT, env=environment) as made:
        try:
            output, _ = made.communicate(timeout=seconds_max)
            end = ""
        except subprocess.TimeoutExpired:
            made.kill()
            output, _ = made.communicate()
            end = f"{target}: killed, for it had not ended after {seconds_max:.0f} s\n"
    log = output.decode(errors="replace") + end
    executions = re.findall(r"number_of_executed_units:\s*(\d+)", log)
    coverage = re.findall(r" cov: (\d+)", log)
    is_finding = made.returncode != 0 or end != ""
    if is_finding:
        FINDINGS.mkdir(parents=True, exist_ok=True)
        (FINDINGS / f"{target.replace('/', '-')}.log").write_text(log)
        print(f"{target}: found something\n" + "\n".join(log.splitlines()[-TAIL_LINES:]))
    return {
        "target": target,
        "executions": int(executions[-1]) if executions else 0,
        "coverage": int(coverage[-1]) if coverage else None,
        "seconds": round(time.monotonic() - begin, 1),
        "findings": int(is_finding),
    }


def cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def left_out(target: str) -> dict[str, Any]:
    """The row of a target that was not run: with no executions, where a reader of the record looks for it."""
    return {"target": target, "executions": 0, "coverage": None, "seconds": 0, "findings": 0}


def record(rows: list[dict[str, Any]], arguments: list[str], path: Path) -> None:
    """Adds the run to a document: what the runs before did is kept in it, and with which arguments."""
    kept = json.loads(path.read_text()) if path.exists() else {"targets": [], "commands": []}
    merged = {row["target"]: row for row in kept["targets"]}
    everything = [f"native/{name}" for name in native_targets()] + [f"python/{name}" for name in python_targets()]
    ran = {row["target"]: row for row in rows}
    for target in everything:
        row = dict(ran.get(target) or left_out(target))
        if (before := merged.get(target)) is not None:
            row |= {key: round(row[key] + before[key], 1) for key in ("executions", "seconds", "findings")}
            row["coverage"] = row["coverage"] or before["coverage"]
        merged[target] = row
    targets = sorted(merged.values(), key=lambda row: str(row["target"]))
    # A document from before there were "commands" has one command, of the last run that was added to it.
    commands = [*kept.get("commands", [kept.get("command")]), shlex.join(["tools/fuzz.py", *arguments])]
    document = {
        "theme": "fuzz",
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": "; ".join(commands),
        "commands": commands,
        "machine": {"cpu": cpu_model(), "cores": os.cpu_count(), "kernel": platform.release()},
        "coverage": "edges of the code under the target that libFuzzer counts",
        "python_inputs": "by coverage" if importlib.util.find_spec("atheris") else "random",
        "executions": sum(row["executions"] for row in targets),
        "executions_native": sum(row["executions"] for row in targets if row["target"].startswith("native/")),
        "executions_python": sum(row["executions"] for row in targets if row["target"].startswith("python/")),
        "findings": sum(row["findings"] for row in targets),
        "targets": targets,
    }
    path.write_text(json.dumps(document, indent=1) + "\n")


def parsed(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=60, help="for all targets together (default: 60)")
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count() or 1, help="targets at a time (default: one per core)"
    )
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--native-only", action="store_true", help="leave out the targets in Python")
    only.add_argument("--python-only", action="store_true", help="leave out the native targets")
    parser.add_argument("--record", type=Path, help="a result document to write, or to add to")
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> int:
    given = parsed(arguments)
    FINDINGS.mkdir(parents=True, exist_ok=True)
    natives = [] if given.python_only else build()
    pythons = [] if given.native_only else python_targets()
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
        record(rows, arguments, given.record)
    return 1 if any(row["findings"] or not row["executions"] for row in rows) else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
