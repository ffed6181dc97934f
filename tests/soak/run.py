"""Trains, saves in every way there is, kills, prunes, compacts and resumes, for as long as asked.

    python tests/soak/run.py --minutes 30 [--seed N] [--first LIFE] [--directory DIR] [--result FILE]

The first finding ends it, is printed, keeps the directory, and makes the exit status 1. A seed repeats what the lives
set out to do; `--first` begins with a later one of them, on an empty directory.
"""

from __future__ import annotations

import argparse
import json
import random
import shlex
import shutil
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
sys.path[:1] = [str(TESTS), str(TESTS.parent)]  # in the place of this file's own directory

import snapstone  # noqa: E402
from benchmarks import machine  # noqa: E402
from soak.driver import soak  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=None, help="default: a random one, which is printed")
    parser.add_argument("--first", type=int, default=0, help="the number of the first life")
    parser.add_argument("--directory", type=Path, default=None, help="where to save; default: a temporary one")
    parser.add_argument("--result", type=Path, default=None, help="default: benchmarks/results/soak_CPU_DATE.json")
    options = parser.parse_args()
    seed = random.SystemRandom().randrange(1 << 32) if options.seed is None else options.seed
    directory = Path(tempfile.mkdtemp(prefix="snapstone-soak-", dir=options.directory))
    print(f"seed {seed}, directory {directory}", flush=True)
    date = datetime.now(UTC).date()
    document = {
        "theme": "soak",
        "date": date.isoformat(),
        "command": shlex.join(
            ["python", "tests/soak/run.py", "--minutes", f"{options.minutes:g}", "--seed", str(seed)]
        ),
        "snapstone": snapstone.__version__,
        "machine": machine.facts(),
        "file_system": machine.file_system(directory),
        **soak(directory, seed, 60 * options.minutes, options.first),
    }
    result = options.result or Path(TESTS.parent, f"benchmarks/results/soak_{machine.cpu_slug()}_{date:%Y%m%d}.json")
    result.write_text(json.dumps(document, indent=1) + "\n")
    print(json.dumps(document, indent=1))
    if document["found"]:
        print(f"what was found stands above; {directory} stays", file=sys.stderr)
        return 1
    shutil.rmtree(directory)
    return 0


if __name__ == "__main__":
    sys.exit(main())
