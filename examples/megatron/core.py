"""Megatron-core's dist_checkpointing with the engine, on any number of ranks: resumes, and saves in the background.

torchrun --nproc-per-node 2 examples/megatron/core.py --dir run --steps 8
torchrun --nproc-per-node 1 examples/megatron/core.py --dir run --steps 12   # continues, on another layout
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedTensor

from snapstone.integrations.megatron import AsyncCallsQueue, LoadStrategy, SaveStrategy


def sharded(weight: torch.Tensor, bias: torch.Tensor, step: int) -> dict[str, Any]:
    """Rows of `weight` are split over the ranks, `bias` is the same on all of them."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    return {
        "weight": ShardedTensor.from_rank_offsets("weight", weight, (0, rank, world_size)),
        "bias": ShardedTensor.from_rank_offsets("bias", bias, replica_id=rank),
        "step": step,
    }


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--dir", type=Path, required=True)
    arguments.add_argument("--steps", type=int, default=8)
    given = arguments.parse_args()
    dist.init_process_group("gloo")
    weight, bias, step = torch.zeros(8 // dist.get_world_size(), 4), torch.zeros(4), 0
    tracker = given.dir / "latest_checkpointed_iteration.txt"
    if tracker.exists():
        checkpoint = given.dir / f"iter_{int(tracker.read_text()):07d}"
        loaded = dist_checkpointing.load(sharded(weight, bias, step), str(checkpoint), LoadStrategy())
        weight, bias, step = loaded["weight"], loaded["bias"], loaded["step"]
    queue, strategy = AsyncCallsQueue(), SaveStrategy()
    while step < given.steps:
        step += 1
        weight += step
        bias -= step
        queue.maybe_finalize_async_calls()
        if step % 2 == 0:
            save(given.dir, sharded(weight, bias, step), step, queue, strategy, tracker)
    queue.maybe_finalize_async_calls(blocking=True)
    # print() of an unbuffered rank writes the end of a line on its own, and another rank's line comes between.
    sys.stdout.write(f"rank {dist.get_rank()}: step {step}, weight {weight[0, 0].item():g}, bias {bias[0].item():g}\n")
    dist.destroy_process_group()


def save(
    directory: Path, state: dict[str, Any], step: int, queue: AsyncCallsQueue, strategy: SaveStrategy, tracker: Path
) -> None:
    checkpoint = directory / f"iter_{step:07d}"
    if dist.get_rank() == 0:
        checkpoint.mkdir(parents=True, exist_ok=True)
    dist.barrier()
    request = dist_checkpointing.save(state, str(checkpoint), strategy, async_sharded_save=True)
    if dist.get_rank() == 0:
        request.add_finalize_fn(lambda: tracker.write_text(str(step)))
    queue.schedule_async_request(request)


if __name__ == "__main__":
    main()
