"""What checkpoints cost torchtitan's debug run: step time and stall, with its own and with snapstone's, in turns.

    python benchmarks/trainers/torchtitan_run.py            # under five minutes, stored in benchmarks/results

The real trainer trains on CPU with FSDP2 and gloo, by the stand-ins of tests/trainers/torchtitan_shim.py; what steps
take is that of a CPU. Needs the packages of `make test-integrations`. `until durable` ends in async modes when the
block's steps are over and the save is done, so it is never less than the block.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1]
sys.path[:0] = [str(REPOSITORY / "tests"), str(HERE)]

from interleaved import Block, document, store, table  # noqa: E402

from trainers.torchtitan_jobs import Job, make_assets  # noqa: E402


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=6, help="of a block; a save follows the first")
    parser.add_argument("--layers", type=int, default=6, help="of the debug model")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--directory", type=Path, default=REPOSITORY / "build", help="on the disk to measure")
    parser.add_argument("--results", type=Path, default=REPOSITORY / "benchmarks" / "results")
    parser.add_argument("--limit", type=float, default=290.0, help="seconds that the run may take")
    options = parser.parse_args(arguments)
    plain = parser.parse_args([])
    options.full = all(
        getattr(options, name) == getattr(plain, name) for name in ("rounds", "steps", "layers", "ranks")
    )
    return options


def main() -> int:
    options = parse()
    options.directory.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="bench-torchtitan-", dir=options.directory.resolve()))
    try:
        make_assets(folder)
        result = folder / "result.json"
        job = {
            "rounds": options.rounds,
            "steps": options.steps,
            "directory": str(folder / "checkpoints"),
            "result": str(result),
        }
        env = {
            "SNAPSTONE_TEST_ACTION": f"{HERE / 'torchtitan_rank.py'}:measure",
            "SNAPSTONE_TEST_LAYERS": str(options.layers),
            "SNAPSTONE_BENCH_JOB": json.dumps(job),
        }
        arguments = ["--training.steps=1000000", "--checkpoint.no-enable", "--metrics.log_freq=1000000"]
        with Job(folder, *arguments, engine=None, ranks=options.ranks, env=env) as ranks:
            statuses = ranks.wait(options.limit)
            if any(statuses):
                print(f"{ranks.log()}\nranks ended with {statuses}", file=sys.stderr)
                return 1
        measured = json.loads(result.read_text())
        found = document(
            "torchtitan",
            [{name: Block(**block) for name, block in blocks.items()} for blocks in measured["rounds"]],
            "torchtitan",
            folder,
            command=["python", "benchmarks/trainers/torchtitan_run.py", *sys.argv[1:]],
            ranks=options.ranks,
            steps_per_block=options.steps,
            state_nbytes=3 * measured["model_nbytes"],
        )
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    path = store(found, options.results, full=options.full)
    print(table(found))
    print(f"wrote {path.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
