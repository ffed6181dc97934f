"""Plays many seeds, or one of them with its story:

python -m simulation --seed 4711             (PYTHONPATH=python:tests)
python -m simulation --seeds 100000 --first 0 --jobs 2 --json benchmarks/results
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from simulation.batches import batch, nothing
from simulation.history import play

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))

import machine

BATCH = 100


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m simulation")
    parser.add_argument("--seed", type=int, help="play this one and tell what happened")
    parser.add_argument("--again", type=Path, help="play what failed in this document, and keep in it what still does")
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seeds", type=int, default=100_000)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no seeds after this")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--json", type=Path, help="write a dated document into this directory, after every batch")
    options = parser.parse_args()
    if options.again is not None:
        return bool(again(options.again))
    if options.seed is not None:
        played = play(options.seed)
        print(played.tell())
        return bool(played.problems)
    return bool(many(options)["failed"])


def many(options: argparse.Namespace) -> dict[str, Any]:
    begin = time.monotonic()
    total = nothing()
    done = 0
    firsts = iter(range(options.first, options.first + options.seeds, BATCH))
    with multiprocessing.get_context("forkserver").Pool(options.jobs) as pool:
        running: list[tuple[int, Any]] = []
        while True:
            while len(running) < options.jobs and time.monotonic() - begin < options.seconds:
                if (first := next(firsts, None)) is None:
                    break
                count = min(BATCH, options.first + options.seeds - first)
                running.append((count, pool.apply_async(batch, (first, count))))
            if not running:
                break
            count, result = running.pop(0)
            for name, counts in result.get().items():
                total[name].update(counts)
            done += count
            for seed, told in list(total["failed"].items())[-3:] if done % 1000 < BATCH else []:
                print(seed, *told, sep="\n    ", flush=True)
            if options.json is not None:
                _write(options.json, options, done, total, time.monotonic() - begin)
    print(
        f"{done} seeds from {options.first}, {len(total['failed'])} failed, {time.monotonic() - begin:.0f} s",
        flush=True,
    )
    for seed, told in list(total["failed"].items())[:20]:
        print(f"failed: python -m simulation --seed {seed}", *told, sep="\n    ")
    return total


def again(path: Path) -> dict[str, Any]:
    """What still fails. `played_again`, in the document, is what had failed, and what it said then."""
    document = json.loads(path.read_text())
    document["played_again"] = document.get("played_again", {}) | document["failed"]
    seeds = [int(seed) for seed in document["failed"]]
    played = {seed: play(seed) for seed in seeds}
    document["failed"] = {str(seed): [str(one.scenario), *one.problems] for seed, one in played.items() if one.problems}
    path.write_text(json.dumps(document, indent=1) + "\n")
    print(f"{len(seeds)} played again, {len(document['failed'])} failed")
    return dict(document["failed"])


def _write(directory: Path, options: argparse.Namespace, done: int, total: dict[str, Any], seconds: float) -> None:
    date = datetime.now(UTC)
    limit = "" if math.isinf(options.seconds) else f" --seconds {options.seconds:g}"
    document = {
        "theme": "ranks",
        "date": date.strftime("%Y-%m-%d %H:%M UTC"),
        "command": f"python -m simulation --first {options.first} --seeds {options.seeds} --jobs {options.jobs}{limit}",
        "machine": machine.facts(),
        "first_seed": options.first,
        "seeds": done,
        "seconds": round(seconds),
        **{name: dict(sorted(total[name].items(), key=str)) for name in ("operations", "ranks", "faults", "ends")},
        "failed": total["failed"],
    }
    path = directory / f"ranks_{machine.cpu_slug()}_{date:%Y%m%d}.json"
    path.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
