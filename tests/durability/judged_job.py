"""A training script for ckpt-chaos, which kills it at what it sees it do and judges how it resumes.

    python judged_job.py --out DIR [--naive]

ckpt-chaos sees Python's audit events and torch.save; the engine writes in native code, which raises no such events. So
each step of a save raises one here when it begins, under the run's directory, as if a directory were made. With --naive
it saves as people do who have not heard of crashes: JSON over the one file there is.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any

STEPS = 3


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--naive", action="store_true")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    (naive if options.naive else train)(options.out)


def train(out: Path) -> None:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    import torch

    import snapstone as ss
    from snapstone.integrations.step_folder import StepFolder

    torch.manual_seed(1)
    weights, begin = torch.randn(300, 300), 0
    newest = StepFolder(str(out)).newest()
    if newest >= 0:
        state: dict[str, Any] = {"weights": weights, "step": 0}
        ss.load(state, checkpoint_id=out / f"step-{newest}")
        begin = state["step"]
    print(f"resumed from step {begin}", flush=True)
    raise_events(out)
    for step in range(begin + 1, STEPS + 1):
        weights += torch.randn(300, 300, generator=torch.Generator().manual_seed(step))
        ss.save({"weights": weights, "step": step}, checkpoint_id=out / f"step-{step}", step=step)
    sys.settrace(None)
    put(out / "final", hashlib.sha256(weights.numpy().tobytes()).hexdigest())


def raise_events(out: Path) -> None:
    """One for each function of `steps.FUNCTIONS` that is entered, on this thread."""
    from durability import points, steps

    wanted = set(steps.step_functions())

    def enter(frame: Any, event: str, _: Any) -> None:
        if frame.f_code.co_filename.startswith(points.PACKAGE) and points.name_of(frame) in wanted:
            sys.audit("os.mkdir", str(out / points.name_of(frame)), 0, -1)

    sys.settrace(enter)


def naive(out: Path) -> None:
    path = out / "state.json"
    state = json.loads(path.read_text()) if path.exists() else {"step": 0, "sum": 0}
    print(f"resumed from step {state['step']}", flush=True)
    for step in range(state["step"] + 1, STEPS + 1):
        state = {"step": step, "sum": state["sum"] + step}
        with open(path, "w") as file:
            json.dump(state, file)
    put(out / "final", json.dumps(state))


def put(path: Path, text: str) -> None:
    path.with_suffix(".new").write_text(text)
    os.replace(path.with_suffix(".new"), path)


if __name__ == "__main__":
    main()
