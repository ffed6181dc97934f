"""The shortest job with torch_checkpointing's manager over the engine's storage, and goes on where it stopped.

python examples/torch_checkpointing/train.py --dir run --steps 20
python examples/torch_checkpointing/train.py --dir run --steps 40   # goes on at step 20
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch_checkpointing import CheckpointManager

from snapstone import capture_rng, restore_rng
from snapstone.integrations.torch_checkpointing import StorageConfig


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args()
    torch.manual_seed(1)
    model = torch.nn.Sequential(torch.nn.Linear(32, 256), torch.nn.Dropout(0.1), torch.nn.Linear(256, 32))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    manager = CheckpointManager(CheckpointManager.Config(storage_config=StorageConfig()))
    job: dict[str, Any]
    step = 0
    saved = sorted(options.dir.glob("step-*"))
    if saved:
        job = manager.load(str(saved[-1]), {"job": None})["job"]
        model.load_state_dict(job["model"])
        optimizer.load_state_dict(job["optimizer"])
        restore_rng(job["rng"])
        step = job["step"]
    future = None
    while step < options.steps:
        batch = torch.randn(16, 32)
        loss = (model(batch) - batch).square().mean()
        loss.backward()
        with manager.lock():  # the copy of the save before has to be complete
            optimizer.step()
        optimizer.zero_grad()
        step += 1
        print(f"step {step} loss {loss.item():.6f}")
        if step % 10 == 0:
            job = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step, "rng": capture_rng()}
            future = manager.save(f"{options.dir}/step-{step:06d}", {"job": job})
    if future is not None:
        future.result()
    manager.close()


if __name__ == "__main__":
    main()
