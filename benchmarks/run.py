"""snapstone beside the limit of the disk and beside other engines, in one run: `make bench`.

Each state is measured in a process of its own; there every engine saves, loads and removes in turn, in an order that
rotates every round. The rows under torch.distributed.checkpoint, with stock and with snapstone storage, and delta
saves come after them. docs/benchmarks.md says what is measured and how to read it. Ends with status 1 if snapstone
itself could not be measured.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import machine
import micro_run
import results
import table
from drop_in.rows import ROWS
from rich.console import Console
from scenarios import EVERYTHING, Scenario, scenarios
from targets import judge

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parent
STATES = ("2gb", "small")
UNDER_DCP = tuple(row.name for row in ROWS)
TMPFS = Path("/dev/shm")
CONSOLE_COLUMNS_MIN = 150


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, default=REPOSITORY / "build" / "bench", help="on the disk to measure")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--states", help="comma-separated: 2gb, small; without it both, and the rows under DCP")
    parser.add_argument("--only", help=f"comma-separated engines, without the rows under DCP: {', '.join(EVERYTHING)}")
    parser.add_argument("--dcp", help=f"comma-separated rows under DCP, without the states: {', '.join(UNDER_DCP)}")
    parser.add_argument("--delta", action="store_true", help="delta saves, without the states and the rows under DCP")
    parser.add_argument("--results", type=Path, default=results.DIRECTORY, help="where the JSON goes")
    parser.add_argument("--no-micro", action="store_true", help="leave the micro benchmarks out")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, one round: shows that it works, not how fast")
    options = parser.parse_args(arguments)
    options.full = not (options.states or options.only or options.dcp or options.delta)
    if not options.states and (options.only or not (options.dcp or options.delta)):
        options.states = ",".join(STATES)
    options.states = _choices(parser, options.states, STATES) if options.states else []
    options.only = _choices(parser, options.only, EVERYTHING) if options.only else None
    options.dcp = _choices(parser, options.dcp, UNDER_DCP) if options.dcp else list(UNDER_DCP if options.full else ())
    options.delta = options.delta or options.full
    if options.rounds < 1:
        parser.error("--rounds must be at least 1")
    return options


def _choices(parser: argparse.ArgumentParser, text: str, known: Sequence[str]) -> list[str]:
    names = text.split(",")
    unknown = [name for name in names if name not in known]
    if unknown:
        parser.error(f"{', '.join(unknown)}: not one of {', '.join(known)}")
    return names


def command_line(options: argparse.Namespace) -> str:
    """The command that repeats this run, without paths of this machine."""
    words = ["python benchmarks/run.py", "--quick" if options.quick else f"--rounds {options.rounds}"]
    if options.states and not options.full:
        words.append(f"--states {','.join(options.states)}")
    if options.only:
        words.append(f"--only {','.join(options.only)}")
    if options.dcp and not options.full:
        words.append(f"--dcp {','.join(options.dcp)}")
    if options.delta and not options.full:
        words.append("--delta")
    return " ".join(words)


def theme(options: argparse.Namespace) -> str:
    """Only a full run may become the README's table."""
    if options.quick:
        return "quick"
    return results.THEME if options.full else "partial"


def build_probe(scratch: Path) -> tuple[str | None, str]:
    """The compiled disk_limit, or why there is none."""
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        return None, f"no C++ compiler ({compiler}) for disk_limit.cc"
    binary = scratch / "disk_limit"
    command = [compiler, "-std=c++20", "-O3", str(HERE / "disk_limit.cc"), "-o", str(binary), "-luring"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        print(done.stderr, file=sys.stderr)
        return None, "disk_limit.cc does not compile: it needs liburing and its headers"
    return str(binary), ""


def measure(scenario: Scenario, probe: tuple[str | None, str], directory: Path, scratch: Path) -> dict[str, Any]:
    """Runs one scenario in a new process."""
    details = {
        "scenario": dataclasses.asdict(scenario),
        "disk_limit": probe[0],
        "disk_limit_missing": probe[1],
    }
    return dict(_in_process("measure.py", details, TMPFS if scenario.place == "tmpfs" else directory, scratch))


def measure_under_dcp(options: argparse.Namespace, scratch: Path) -> list[dict[str, Any]]:
    """Runs the rows under DCP in a process, which starts their ranks."""
    details = {"rows": options.dcp, "rounds": 1 if options.quick else options.rounds, "quick": options.quick}
    return list(_in_process("measure_under_dcp.py", details, options.directory, scratch))


def measure_delta(options: argparse.Namespace, scratch: Path) -> list[dict[str, Any]]:
    details = {"rounds": 1 if options.quick else options.rounds, "quick": options.quick}
    return list(_in_process("measure_delta.py", details, options.directory, scratch))


def _in_process(program: str, details: dict[str, Any], parent: Path, scratch: Path) -> Any:
    """What a program of this folder makes of its job, for which it gets a directory below `parent`."""
    work = Path(tempfile.mkdtemp(prefix="snapstone-bench-", dir=parent))
    job, result = scratch / "job.json", scratch / "result.json"
    result.unlink(missing_ok=True)
    document = {
        **details,
        "directory": str(work),
        "scrub": {str(work): "DIRECTORY", str(REPOSITORY): "REPOSITORY", sys.prefix: "PYTHON", str(scratch): "SCRATCH"},
        "result": str(result),
    }
    job.write_text(json.dumps(document))
    try:
        subprocess.run([sys.executable, str(HERE / program), str(job)], check=True)
        return json.loads(result.read_text())
    finally:
        shutil.rmtree(work, ignore_errors=True)


def run(options: argparse.Namespace, console: Console, scratch: Path) -> dict[str, Any]:
    begin = time.monotonic()
    probe = build_probe(scratch)
    document: dict[str, Any] = {
        "theme": theme(options),
        "date": datetime.date.today().isoformat(),
        "command": command_line(options),
        "snapstone": machine.version_of("snapstone") or _source_version(),
        "machine": machine.facts(),
        "scenarios": [],
        "dcp": [],
        "delta": [],
        "micro": [],
    }
    facts = document["machine"]
    console.print(
        f"{facts['cores']} x {facts['cpu']}, {facts['memory_gib']} GiB, Linux {facts['kernel']}, "
        f"torch {facts['torch']}, snapstone {document['snapstone']}"
    )
    for scenario in scenarios(states=options.states, engines=options.only, rounds=options.rounds, quick=options.quick):
        if scenario.place == "tmpfs" and not (TMPFS.is_dir() and os.access(TMPFS, os.W_OK)):
            console.print(f"{scenario.title}: left out: no tmpfs to write to")
        elif scenario.engines:
            document["scenarios"].append(measure(scenario, probe, options.directory, scratch))
            table.print_scenario(console, document["scenarios"][-1])
    if options.dcp:
        document["dcp"] = measure_under_dcp(options, scratch)
        table.print_under_dcp(console, document["dcp"])
    if options.delta:
        document["delta"] = measure_delta(options, scratch)
        table.print_delta(console, document["delta"])
    if not (options.quick or options.no_micro):
        micro = micro_run.measure(scratch)
        if isinstance(micro, str):
            console.print(f"micro benchmarks: left out: {micro}")
        else:
            document["micro"] = micro
            table.print_micro(console, micro)
    verdicts = judge(document)
    document["targets"] = [verdict.to_json() for verdict in verdicts]
    document["seconds"] = round(time.monotonic() - begin, 1)
    table.print_targets(console, verdicts, quick=options.quick)
    return document


def _source_version() -> str:
    import snapstone

    return snapstone.__version__


def failures(document: dict[str, Any]) -> list[str]:
    found = [
        f"{scenario['state']} on {scenario['place']}: {name}: {entry['skipped']}"
        for scenario in document["scenarios"]
        for name, entry in scenario["engines"].items()
        if name.startswith("snapstone") and entry["skipped"] is not None
    ]
    return (
        found
        + [
            f"{row['title']}: {entry['label']}: {entry['skipped']}"
            for row in document["dcp"]
            for entry in row["engines"].values()
            if entry["storage"] == "snapstone" and entry["skipped"] is not None and not entry["unavailable"]
        ]
        + [
            f"{row['title']}: {entry['label']}: {entry['skipped']}"
            for row in document["delta"]
            for entry in row["engines"].values()
            if entry["storage"] == "snapstone" and entry["skipped"] is not None
        ]
    )


def main() -> int:
    options = parse()
    console = Console()
    if console.width < CONSOLE_COLUMNS_MIN:
        console = Console(width=CONSOLE_COLUMNS_MIN)
    options.directory.mkdir(parents=True, exist_ok=True)
    options.results.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="snapstone-bench-") as scratch:
        document = run(options, console, Path(scratch))
    name = f"{document['theme']}_{machine.cpu_slug()}_{document['date'].replace('-', '')}.json"
    (options.results / name).write_text(json.dumps(document, indent=1) + "\n")
    console.print(f"\n{document['seconds']:.0f} s; {name} written", markup=False)
    for failure in failures(document):
        print(f"snapstone was not measured: {failure}", file=sys.stderr)
    return 1 if failures(document) else 0


if __name__ == "__main__":
    sys.exit(main())
