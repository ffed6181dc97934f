"""The shortest DeepSpeed job that saves through the engine, and goes on where it stopped.

torchrun --nproc-per-node 2 examples/deepspeed/train.py --dir run --steps 20
torchrun --nproc-per-node 2 examples/deepspeed/train.py --dir run --steps 40   # goes on at step 20

On a machine without a GPU as well. `deepspeed examples/deepspeed/train.py ...` does the same.
"""

from __future__ import annotations

import argparse

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator

from snapstone.integrations.deepspeed import attach

CONFIG = {
    "train_micro_batch_size_per_gpu": 16,
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
    "zero_allow_untested_optimizer": True,
    "bf16": {"enabled": True},
    "zero_optimization": {"stage": 3},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", required=True)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--local_rank", type=int, default=0)  # from the launcher
    options = parser.parse_args()
    deepspeed.init_distributed()
    torch.manual_seed(1)
    model = torch.nn.Sequential(torch.nn.Linear(32, 256), torch.nn.Dropout(0.1), torch.nn.Linear(256, 32))
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=CONFIG)
    attached = attach(engine)
    engine.load_checkpoint(options.dir)
    while engine.global_steps < options.steps:
        batch = torch.randn(16, 32, dtype=torch.bfloat16).to(get_accelerator().current_device_name())
        loss = (engine(batch) - batch).float().square().mean()
        engine.backward(loss)
        engine.step()
        if engine.global_rank == 0:
            print(f"step {engine.global_steps} loss {loss.item():.6f}")
        if engine.global_steps % 10 == 0:
            engine.save_checkpoint(options.dir)
    attached.wait()


if __name__ == "__main__":
    main()
