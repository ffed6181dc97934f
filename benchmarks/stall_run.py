"""What saves cost a training run of 2 GB of state, engine by engine: the README's stall table, `make readme-bench`.

Each engine gets processes of its own, `torchrun -m snapstone.bench stall --engine NAME`, so that none finds the memory,
the threads or the children of another, and one that crashes or hangs takes nobody with it. Their documents become one,
in benchmarks/results/stall_<cpu>_<date>/. Ends with status 1, and stores nothing, if an engine of snapstone itself
could not be measured or the run was interrupted.
"""

from __future__ import annotations

import argparse
import ctypes
import datetime
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import psutil
from machine import cpu_slug
from stall_documents import merged, scrubbed

from snapstone.bench import results
from snapstone.bench.engines import chosen, engine_class
from snapstone.bench.results import Document, EngineResult
from snapstone.bench.stall import blank_result

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parent
LABEL = "2gb"
LEAVE_SECONDS = 20
PR_SET_CHILD_SUBREAPER = 36


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm-135m", help="2.0 GB with its optimizer")
    parser.add_argument("--engine", default="all")
    parser.add_argument("--ranks", type=int, default=2, help="processes that share the state (FSDP2)")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--saves", type=int, default=1, help="in a block")
    parser.add_argument("--directory", type=Path, default=Path("build"), help="on the disk to measure")
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--limit", type=float, default=600.0, help="seconds that one engine may take")
    options = parser.parse_args(arguments)
    plain = parser.parse_args([])
    varied = ("model", "engine", "ranks", "pairs", "saves")
    options.scratch = options.directory / "bench-stall"
    options.results = options.results.resolve()
    options.full = all(getattr(options, name) == getattr(plain, name) for name in varied)
    return options


def command_of(options: argparse.Namespace, engine: str) -> list[str]:
    """The measurement of one engine, as a shell in the repository would start it."""
    ranks = str(options.ranks)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", ranks]
    workload = ["--model", options.model, "--fsdp", ranks, "--state-only", "--device", "cpu"]
    protocol = ["--cadence", "relaxed", "--pairs", str(options.pairs), "--saves", str(options.saves)]
    truth = ["--checks", "1", "--kills", "1"]
    places = ["--dir", str(options.scratch), "--out", str(options.scratch / "documents")]
    places += ["--label", engine.partition("=")[0]]
    stall = ["-m", "snapstone.bench", "stall", "--engine", engine, *workload, *protocol, *truth, *places]
    return ["python", *launcher, *stall]


def measure(options: argparse.Namespace, engine: str) -> Document | str:
    """The document of a run with this engine alone, or what went wrong. Nothing of the run is left behind."""
    name = engine.partition("=")[0]
    command = [sys.executable, *command_of(options, engine)[1:]]
    log = options.scratch / "logs" / f"{name}.txt"
    ended = True
    with log.open("w") as output:
        process = subprocess.Popen(command, cwd=REPOSITORY, stdout=output, stderr=subprocess.STDOUT)
        try:
            process.wait(options.limit)
        except subprocess.TimeoutExpired:
            ended = False
        finally:
            _end(process)
    path = results.path_of(options.scratch / "documents", "stall", name)
    if not ended:
        return f"no end after {options.limit:.0f} s"
    try:
        document = results.read(path)
    except (OSError, results.ResultsError):
        return f"ended with status {process.returncode} and no result, see {log}"
    return document


def _end(process: subprocess.Popen[bytes]) -> None:
    """First torchrun, which ends its ranks; then whatever an engine has started and left."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(LEAVE_SECONDS)
    left = psutil.Process().children(recursive=True)
    for one in left:
        with suppress(psutil.Error):
            one.kill()
    psutil.wait_procs(left, LEAVE_SECONDS)
    process.wait(LEAVE_SECONDS)


def adopt_orphans() -> None:
    """Processes whose parents end become children of this one, where `_end` finds them: prctl(2), Linux 3.4."""
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        print(f"stall: leftovers of engines may stay: {os.strerror(ctypes.get_errno())}", file=sys.stderr)


def run(options: argparse.Namespace) -> Document:
    """One document of all engines. ValueError when none could be measured."""
    begin = time.monotonic()
    documents: list[Document] = []
    engines: list[EngineResult] = []
    problems: list[str] = []
    names = chosen(options.engine)
    given = {part.partition("=")[0].strip(): part.strip() for part in options.engine.split(",")}
    for number, name in enumerate(names, start=1):
        kind = engine_class(name)
        result = blank_result(name, kind)
        reason = kind.absent("cpu")
        if reason is not None:
            result["status"], result["reason"] = "absent", reason
        else:
            found = measure(options, given.get(name, name))
            if isinstance(found, str):
                result["status"], result["reason"] = "failed", found
            else:
                documents.append(found)
                (result,) = found["engines"]
                problems += [f"{name}: {problem}" for problem in found["problems"]]
                if result["status"] == "partial":
                    problems.append(f"{name}: not measured to the end")
        engines.append(result)
        print(f"{time.monotonic() - begin:6.0f} s  {number}/{len(names)}  {name}: {_said(result)}", flush=True)
    document = merged(documents, engines, problems)
    document["command"] = (
        ["make", "readme-bench"] if options.full else ["python", "benchmarks/stall_run.py", *sys.argv[1:]]
    )
    document["seconds"] = time.monotonic() - begin
    return scrubbed(document, {str(REPOSITORY): "REPOSITORY", sys.prefix: "PYTHON", str(Path.home()): "HOME"})


def _said(result: EngineResult) -> str:
    if result["status"] in ("absent", "failed"):
        return f"{result['status']}, {result['reason']}"
    stalls = sorted(seconds for cadence in result["cadences"] for seconds in cadence["stall_seconds"])
    return f"stall {stalls[len(stalls) // 2]:.3f} s per save" if stalls else "no pair"


def unfit(document: Document) -> list[str]:
    """Why this run must not be stored."""
    own = [one for one in document["engines"] if one["name"].startswith("snapstone")]
    return [f"{one['name']}: {one['status']}, {one['reason']}" for one in own if one["status"] != "measured"]


def main() -> int:
    options = parse()
    os.chdir(REPOSITORY)
    adopt_orphans()
    shutil.rmtree(options.scratch, ignore_errors=True)
    for name in ("documents", "logs"):
        (options.scratch / name).mkdir(parents=True)
    print(f"one command for each engine, such as\n  {' '.join(command_of(options, 'snapstone'))}", flush=True)
    try:
        document = run(options)
    except KeyboardInterrupt:
        print("stall: interrupted, nothing is stored", file=sys.stderr)
        return 130
    except ValueError as error:
        print(f"stall: {error}", file=sys.stderr)
        return 1
    wrong = unfit(document)
    if wrong:
        print(f"stall: not stored: {'; '.join(wrong)}; logs are in {options.scratch}/logs", file=sys.stderr)
        return 1
    theme = "stall" if options.full else "partial-stall"
    target = options.results / f"{theme}_{cpu_slug()}_{datetime.date.today():%Y%m%d}"
    shutil.rmtree(target, ignore_errors=True)
    path = results.write(document, target, LABEL)
    print(f"wrote {os.path.relpath(path)} after {document['seconds'] / 60:.0f} minutes")
    shutil.rmtree(options.scratch, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
