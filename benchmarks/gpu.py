"""What snapstone does on this machine's GPU, in one command that ends within 8 minutes:

    python benchmarks/gpu.py

builds the package from the tree into build/gpu, runs the CUDA tests on the device, then measures, the most important
first: on_device/parts.py has the list. Everything goes into benchmarks/results/gpu_<device>_<date>.json, which is
written after every part; what failed, and what there was no time or room for, stands there with the reason. Ends with a
table of targets, and with status 1 if the build, a test or a part failed or was not got through.

    python benchmarks/gpu.py --fake --out build/gpu-fake

gets through all of it, with tiny sizes, on the driver that the tests use in place of a device: it measures nothing.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from on_device import building, device_tests, facts, goals, processes
from on_device.parts import PARTS, Part

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
BUILD = ROOT / "build" / "gpu"
RESULTS = HERE / "results"
NOT_MEASURED = "fake driver: these are no measurements"
BUILD_SECONDS, TEST_SECONDS = 160.0, 100.0
END_SECONDS = 6.0  # for ending what runs, and for writing


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=480.0, help="for everything")
    parser.add_argument("--out", type=Path, help="directory of the JSON (benchmarks/results)")
    parser.add_argument(
        "--directory",
        type=Path,
        action="append",
        default=[],
        help="for checkpoints; more than one: where there is room",
    )
    parser.add_argument("--part", help=f"some of {','.join(part.name for part in PARTS)} (default: all)")
    parser.add_argument("--no-tests", action="store_true", help="measure only")
    parser.add_argument("--installed", action="store_true", help="measure the package that is installed, build none")
    parser.add_argument(
        "--memory-gib", type=float, default=0.0, help="of the machine, if its kernel shows less at first"
    )
    parser.add_argument("--fake", action="store_true", help="on the fake driver of the tests, with tiny sizes")
    options = parser.parse_args(arguments)
    options.out = (options.out or (BUILD if options.fake else RESULTS)).resolve()
    if options.fake and options.out == RESULTS:
        parser.error("--fake measures nothing, and benchmarks/results is for measurements: give another --out")
    names = [part.name for part in PARTS]
    wanted = options.part.split(",") if options.part else names
    if unknown := set(wanted) - set(names):
        parser.error(f"--part: no {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    options.parts = [part for part in PARTS if part.name in wanted]
    options.whole = len(options.parts) == len(PARTS) and not options.no_tests and not options.installed
    return options


class Run:
    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.begin = time.monotonic()
        self.end = self.begin + options.seconds - END_SECONDS
        self.scratch = Path(tempfile.mkdtemp(prefix="snapstone-gpu-run-"))
        self.prefix = f"snapstone-gpu-{os.getpid()}-"  # of directories for checkpoints
        self.directories = [path.resolve() for path in options.directory] or _usual_directories()
        self.package = BUILD / "python"
        card = None if options.fake else facts.graphics_card()
        device = NOT_MEASURED if options.fake else (card or {}).get("name", "no device that nvidia-smi knows")
        self.document: dict[str, Any] = {
            "theme": "gpu",
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "command": ["python", "benchmarks/gpu.py", *sys.argv[1:]],
            "device": device,
            "revision": facts.revision(),
            "limit_seconds": options.seconds,
            "seconds": 0.0,
            "facts": None,
            "build": {"status": "not run", "reason": "the run ended before"},
            "tests": {"status": "not run", "reason": "the run ended before"},
            "parts": {
                part.name: {"title": part.title, "status": "not run", "reason": "the run ended before", "results": {}}
                for part in options.parts
            },
            "targets": [],
        }
        theme = "gpu" if options.whole else "partial-gpu"
        slug = "fake" if options.fake else re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
        self.path = options.out / f"{theme}_{slug}_{datetime.date.today():%Y%m%d}.json"

    def left(self) -> float:
        return self.end - time.monotonic()

    def say(self, text: str) -> None:
        print(f"{time.monotonic() - self.begin:6.1f} s  {text}", flush=True)

    def write(self) -> None:
        self.document["seconds"] = round(time.monotonic() - self.begin, 1)
        self.document["targets"] = [one.to_json() for one in self.verdicts()]
        names = {str(ROOT): "REPOSITORY", sys.prefix: "PYTHON", str(self.scratch): "SCRATCH", str(Path.home()): "HOME"}
        text = json.dumps(self.document, indent=1)
        for path, name in names.items():
            text = text.replace(path + "/", name + "/")
        self.options.out.mkdir(parents=True, exist_ok=True)
        part = self.path.with_suffix(".part")
        part.write_text(text + "\n")
        part.replace(self.path)

    def verdicts(self) -> list[goals.Verdict]:
        return goals.judge(self.document["parts"], fake=self.options.fake)

    def environment(self) -> dict[str, str]:
        """Of everything that uses the package."""
        paths = [*([] if self.options.installed else [self.package]), ROOT / "tests", HERE]
        inherited = os.environ.get("PYTHONPATH")
        variables = {
            **{name: value for name, value in os.environ.items() if not name.startswith("FAKECUDA_")},
            "PYTHONPATH": os.pathsep.join([*map(str, paths), *([inherited] if inherited else [])]),
            "PYTHONUNBUFFERED": "1",
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        if self.options.fake:
            variables.update(self.fake_driver)
        return variables

    # Before the parts -------------------------------------------------------------------------------------------------

    def prepare(self) -> bool:
        """Builds, and looks at the machine meanwhile. False: there is nothing to measure with."""
        self.write()
        if self.options.fake:
            sys.path.insert(0, str(ROOT / "tests"))
            from cuda import fake_driver

            self.fake_driver = fake_driver.environment(mode="eager")
        with ThreadPoolExecutor(2) as pool:
            looking = pool.submit(self._look)
            building_ = pool.submit(self._build)
            self.document["facts"] = looking.result()
            self.document["build"] = found = building_.result()
        self.say(f"build: {found['status']}{', ' + found['reason'] if found['reason'] else ''}")
        self.write()
        return bool(found["status"] in ("built", "installed"))

    def _look(self) -> Any:
        result = self.scratch / "facts.json"
        command = [sys.executable, "-m", "on_device.facts", *map(str, self.directories), str(result)]
        environment = {**os.environ, "PYTHONPATH": str(HERE)}
        processes.run(command, seconds=60, log=self.scratch / "facts.txt", environment=environment, cwd=self.scratch)
        try:
            return json.loads(result.read_text())
        except (OSError, ValueError):
            return {"problem": processes.tail(self.scratch / "facts.txt")}

    def _build(self) -> dict[str, Any]:
        if self.options.installed:
            return {"status": "installed", "reason": None}
        begin, log = time.monotonic(), self.scratch / "build.txt"
        try:
            for command in building.commands(BUILD):
                limit = min(begin + BUILD_SECONDS, self.end) - time.monotonic()
                ended = processes.run(command, seconds=limit, log=log, environment=os.environ, cwd=ROOT)
                if ended.problem:
                    return {"status": "failed", "reason": ended.problem, "log": processes.tail(log)}
            self.package = building.assemble(BUILD)
        except (OSError, RuntimeError) as error:
            return {"status": "failed", "reason": str(error), "log": processes.tail(log)}
        lacking = [line for line in log.read_text(errors="replace").splitlines() if "not found" in line]
        return {"status": "built", "reason": None, "seconds": time.monotonic() - begin, "without": lacking}

    def test(self) -> None:
        if self.options.no_tests:
            self.document["tests"] = {"status": "not run", "reason": "--no-tests"}
            return
        begin = time.monotonic()
        environment = {**self.environment(), "SNAPSTONE_TEST_CUDA": "" if self.options.fake else "real"}
        tests = [ROOT / "tests" / "cuda" / "test_facts.py"] if self.options.fake else device_tests.files()
        wanted = "pickle or forked" if self.options.fake else ""
        found = device_tests.run(tests, min(TEST_SECONDS, self.left()), self.scratch, environment, wanted=wanted)
        found["seconds"] = time.monotonic() - begin
        self.document["tests"] = found
        self.say(f"tests: {found['status']}{', ' + found['reason'] if found['reason'] else ''}")
        self.write()

    # The parts --------------------------------------------------------------------------------------------------------

    def measure(self, part: Part) -> None:
        row = self.document["parts"][part.name]
        limit = min(part.seconds, self.left())
        if limit < 5:
            row["reason"] = f"no time left, {part.seconds:g} s wanted"
            return
        self.say(f"{part.name}: {part.title}, {limit:.0f} s at most")
        job, result = self.scratch / f"{part.name}.json", self.scratch / f"{part.name}-result.json"
        log = self.scratch / f"{part.name}.txt"
        job.write_text(
            json.dumps(
                {
                    "part": part.name,
                    "module": part.module,
                    "fake": self.options.fake,
                    "seconds": limit - 2,
                    "memory_bytes": int(self.options.memory_gib * (1 << 30)),
                    "prefix": self.prefix,
                    "directories": list(map(str, self.directories)),
                    "result": str(result),
                }
            )
        )
        command = [sys.executable, "-m", "on_device.child", str(job)]
        ended = processes.run(command, seconds=limit, log=log, environment=self.environment(), cwd=self.scratch)
        self.remove_checkpoints()
        row.update(_outcome(result, ended.problem, log), seconds=ended.seconds)
        self.write()

    def remove_checkpoints(self) -> None:
        """Of a process that could not do it itself."""
        for directory in self.directories:
            for path in directory.glob(f"{self.prefix}*"):
                shutil.rmtree(path, ignore_errors=True)

    def run(self) -> int:
        if self.prepare():
            self.test()
            for part in self.options.parts:
                self.measure(part)
        else:
            for row in [self.document["tests"], *self.document["parts"].values()]:
                row["reason"] = "there is no build"
        self.write()
        for name, row in self.document["parts"].items():
            if row["status"] != "measured":
                self.say(f"{name}: {row['status']}, {row['reason']}")
        self.say(f"wrote {os.path.relpath(self.path)}")
        if self.options.fake:
            print(f"\n{NOT_MEASURED}")
        print(f"\n{goals.table(self.verdicts())}", flush=True)
        asked = [self.document["build"], *self.document["parts"].values()]
        asked += [] if self.options.no_tests else [self.document["tests"]]
        return int(any(one["status"] not in ("built", "installed", "passed", "measured") for one in asked))


def _outcome(result: Path, problem: str | None, log: Path) -> dict[str, Any]:
    """Of a part's process: whatever it had found until it ended."""
    try:
        found = json.loads(result.read_text())
    except (OSError, ValueError):
        found = {"results": {}, "problems": []}
    problems = [*found["problems"], *([problem] if problem else [])]
    if not problems:
        return {"status": "measured", "reason": None, "results": found["results"]}
    status = "partial" if len(found["results"]) > 1 else "failed"
    return {"status": status, "reason": "; ".join(problems), "results": found["results"], "log": processes.tail(log)}


def _usual_directories() -> list[Path]:
    """Memory first: rates are the engine's then, not the disk's."""
    found = [Path(path) for path in ("/dev/shm", tempfile.gettempdir()) if os.access(path, os.W_OK)]
    return found or [Path.cwd()]


def main() -> int:
    run = Run(parse())

    def stop(number: int, _: object) -> None:
        """What was found stays."""
        processes.end_all()
        run.write()
        run.remove_checkpoints()
        shutil.rmtree(run.scratch, ignore_errors=True)
        os._exit(128 + number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    try:
        return run.run()
    finally:
        processes.end_all()
        shutil.rmtree(run.scratch, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
