"""One target of `targets`, for so many seconds: with atheris, which follows coverage, or with random bytes without it.

python tests/fuzz/run.py TARGET SECONDS CORPUS
"""

from __future__ import annotations

import random
import sys
import time
from pathlib import Path

try:
    import atheris
except ImportError:
    atheris = None

BYTES_MAX = 200


def run_randomly(name: str, seconds: float, corpus: Path) -> None:
    from fuzz.targets import TARGETS

    chance, executions, begin = random.Random(), 0, time.monotonic()
    while time.monotonic() - begin < seconds:
        data = chance.randbytes(chance.randrange(4, BYTES_MAX))
        try:
            TARGETS[name](data)
        except BaseException:
            (corpus / "crash").write_bytes(data)
            raise
        executions += 1
    print(f"stat::number_of_executed_units: {executions}", file=sys.stderr)


def run_atheris(name: str, seconds: float, corpus: Path) -> None:
    import torch  # noqa: F401  imported before the hook, so that torch itself is not followed

    with atheris.instrument_imports(include=["snapstone"]):
        from fuzz.targets import TARGETS

    limits = [f"-max_total_time={seconds:.0f}", f"-max_len={BYTES_MAX}", "-timeout=20", "-rss_limit_mb=4096"]
    outputs = ["-print_final_stats=1", f"-artifact_prefix={corpus}/", str(corpus)]
    atheris.Setup([sys.argv[0], *limits, *outputs], TARGETS[name])
    atheris.Fuzz()


if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).resolve().parents[1])]
    given_corpus = Path(sys.argv[3])
    given_corpus.mkdir(parents=True, exist_ok=True)
    (run_randomly if atheris is None else run_atheris)(sys.argv[1], float(sys.argv[2]), given_corpus)
