"""The process of one part: `python -m on_device.child JOB.json`. It may be ended at any time."""

from __future__ import annotations

import faulthandler
import importlib
import json
import os
import sys
import traceback
import warnings
from pathlib import Path
from typing import Any

import torch

from .bench import Bench

__all__ = ["main"]


def main() -> int:
    job: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text())
    # Where a part hangs, its log says so before it is ended.
    faulthandler.dump_traceback_later(max(1.0, job["seconds"] - 1))
    warnings.simplefilter("ignore")
    bench = Bench(job)
    bench.write()
    try:
        _begin(bench)
        if os.environ.get("SNAPSTONE_GPU_FAIL") == bench.part:
            raise RuntimeError("SNAPSTONE_GPU_FAIL")
        importlib.import_module(f".{job['module']}", __package__).measure(bench)
        if bench.fake:
            bench.problems += [f"violation on the fake driver: {one}" for one in bench.stand_in.violations()]
    except Exception as error:
        traceback.print_exc()
        bench.problems.append(f"{type(error).__name__}: {' '.join(str(error).split())}"[:600])
    finally:
        bench.write()
        bench.close()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # what an engine left running, or a device that hangs, keeps nobody


def _begin(bench: Bench) -> None:
    from snapstone import _native

    if bench.fake:
        from .stand_in import StandIn

        bench.stand_in = StandIn()
        bench.results["cuda"] = _native.cuda_facts()
        return
    if not torch.cuda.is_available():
        raise RuntimeError("torch finds no CUDA device")
    torch.cuda.set_device(0)
    torch.empty(1, device="cuda")
    bench.results["cuda"] = facts = _native.cuda_facts()
    if not facts["available"]:
        raise RuntimeError(f"the engine finds no driver: {facts['reason']}")


if __name__ == "__main__":
    sys.exit(main())
