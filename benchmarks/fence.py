"""What a call of `async_save(fence=optimizer)` takes when the caller keeps Adam's tensors in a plain dict."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

import torch

import snapstone as ss

__all__ = ["measure"]

ELEMENTS = 2048


def measure(directory: Path, parameters: int, calls: int) -> dict[str, Any]:
    """Seconds of each call and of the optimizer step after it, which waits for the snapshot. The first call also plans.

    `parameters` parameters make four times as many tensors: each with exp_avg, exp_avg_sq and step.
    """
    weights = [torch.nn.Parameter(torch.randn(ELEMENTS)) for _ in range(parameters)]
    optimizer = torch.optim.Adam(weights, lr=1e-3)
    for weight in weights:
        weight.grad = torch.randn(ELEMENTS)
    optimizer.step()
    state: dict[str, torch.Tensor] = {}
    for number, weight in enumerate(weights):
        state[f"model.layers.{number}.weight"] = weight.detach()
        for slot, tensor in optimizer.state[weight].items():
            state[f"optim.layers.{number}.{slot}"] = tensor

    plain_step = _seconds_of_step(optimizer)
    call_seconds: list[float] = []
    step_seconds: list[float] = []
    for number in range(calls + 1):
        target = directory / f"fence-{number}"
        begin = time.perf_counter()
        handle = ss.async_save(state, checkpoint_id=target, fence=optimizer)
        call_seconds.append(time.perf_counter() - begin)
        step_seconds.append(_seconds_of_step(optimizer))
        handle.result()
        shutil.rmtree(target)
    return {
        "tensors": len(state),
        "first_call_seconds": call_seconds[0],
        "call_seconds": call_seconds[1:],
        "step_after_call_seconds": step_seconds[1:],
        "step_alone_seconds": plain_step,
    }


def _seconds_of_step(optimizer: torch.optim.Optimizer) -> float:
    begin = time.perf_counter()
    optimizer.step()
    return time.perf_counter() - begin
