"""Which tests reach which site, how long they take, and which pass: recorded once per test file."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mutation.forked import native_tests, run_native, run_python
from mutation.sites import Site

__all__ = ["TEST_FILES", "Reached", "record"]

# What runs on every machine and says something about saves and loads. In this order.
TEST_FILES = (
    "tests/unit/test_*.py",
    "tests/format/test_*.py",
    "tests/roundtrip/test_*.py",
    "tests/durability/test_*.py",
    "tests/distributed/test_*.py",
    "tests/dcp/test_*.py",
    "tests/fuzz/test_*.py",
    "tests/cuda/test_*.py",
    "tests/simulation/test_*.py",
    "tests/unit/cli/test_*.py",
)
LEFT_OUT = {
    "test_docs.py": "reads pages",
    "test_readme.py": "reads pages",
    "test_kernels.py": "compiles kernels",
    "test_bundled_build.py": "builds an extension of its own",
    "test_fence.py": "waits of optimizers; no check",
    "test_steps.py": "leaves steps out itself",
    "test_kill.py": "each case is a save that is killed, no check",
    "test_kill_python.py": "as before",
    "test_killed_ranks.py": "as before",
    "test_outside_judge.py": "as before",
}


@dataclass
class Reached:
    by_site: dict[str, list[str]] = field(default_factory=dict)  # tests that passed, the quickest first
    seconds: dict[str, float] = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)  # without any mutant


def record(
    tree: Path, work: Path, sites: Sequence[Site], files: Sequence[str] = (), *, params: int, file_seconds: float
) -> Reached:
    """Runs what has not been recorded in its present form; everything that has been is in the result."""
    texts = {site.name: site.text for site in sites}
    folder = work / "recorded"
    folder.mkdir(parents=True, exist_ok=True)
    wanted = [path for pattern in files or TEST_FILES for path in sorted(tree.glob(pattern))]
    for path in wanted:
        if path.name in LEFT_OUT:
            continue
        name = str(path.relative_to(tree))
        target = folder / (name.replace("/", "__") + ".json")
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        if target.exists() and _is_of_today(json.loads(target.read_text()), digest, texts):
            continue
        print(f"recording {name}", flush=True)
        recorded = _one_file(tree, work, name, params, file_seconds)
        reached = {site: texts.get(site) for site, _ in recorded["reached"]}
        target.write_text(json.dumps({"digest": digest, **recorded, "texts": reached}))
    return _gather(folder)


def _is_of_today(recorded: dict[str, Any], digest: str, texts: dict[str, str]) -> bool:
    """No name that it reached means another statement by now: sites are numbered within their function."""
    return recorded["digest"] == digest and all(texts.get(name, was) == was for name, was in recorded["texts"].items())


def record_native(tree: Path, work: Path) -> None:
    folder = work / "recorded"
    folder.mkdir(parents=True, exist_ok=True)
    by_program: dict[str, list[str]] = {}
    for test in native_tests(tree):
        by_program.setdefault(test.partition("::")[0], []).append(test)
    for program, tests in by_program.items():
        target = folder / (program.replace("/", "__") + ".json")
        binary = tree / "build/tests/native" / f"native_{program.removeprefix('native/')}"
        digest = hashlib.sha256(binary.read_bytes()).hexdigest()
        if target.exists() and json.loads(target.read_text())["digest"] == digest:
            continue
        print(f"recording {program}", flush=True)
        log = work / "native.log"
        log.unlink(missing_ok=True)
        results = []
        for test in tests:
            passed, message, seconds = run_native(
                tree, test, {"SNAPSTONE_MUTANT_LOG": str(log)}, work / "scratch" / "native"
            )
            outcome = "passed" if passed else "failed"
            results.append({"nodeid": test, "outcome": outcome, "seconds": round(seconds, 3), "message": message})
        target.write_text(json.dumps({"digest": digest, "results": results, "reached": _read_log(log)}))


def _one_file(tree: Path, work: Path, name: str, params: int, seconds: float) -> dict[str, Any]:
    scratch = work / "scratch" / f"record-{os.getpid()}"
    shutil.rmtree(scratch, ignore_errors=True)
    log = work / f"python-{os.getpid()}.log"
    log.unlink(missing_ok=True)
    env = {"SNAPSTONE_MUTANT_LOG": str(log)}
    ran = run_python(tree, [name], scratch, seconds, env, params=params, first_failure=False)
    return {"results": ran.results, "reached": _read_log(log), "code": ran.code}


def _read_log(log: Path) -> list[list[str]]:
    if not log.exists():
        return []
    with log.open(errors="replace") as file:
        pairs = {tuple(line.rstrip("\n").partition("\t")[::2]) for line in file}
    return sorted([site, test.rpartition(" (")[0] or test] for site, test in pairs if test)


def _gather(folder: Path) -> Reached:
    reached = Reached()
    passed: set[str] = set()
    documents = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    for document in documents:
        for result in document["results"]:
            reached.seconds[result["nodeid"]] = result["seconds"]
            if result["outcome"] == "failed":
                reached.failed.append(result["nodeid"])
            elif result["outcome"] == "passed":
                passed.add(result["nodeid"])
    passed -= set(reached.failed)
    for document in documents:
        for site, test in document["reached"]:
            if test in passed:
                reached.by_site.setdefault(site, []).append(test)
    for tests in reached.by_site.values():
        tests.sort(key=lambda test: (reached.seconds[test], test))
    return reached
