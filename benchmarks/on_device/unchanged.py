"""A state that did not change since its base: how long until that is known, and the pass over it that tells.

Known is when the host has compared all digests and lets go of the tensors: `handle.staging_completion`.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch

import snapstone as ss

from .bench import Bench, gbps, spread
from .tensors import SLACK_BYTES

__all__ = ["even", "measure"]


def measure(bench: Bench) -> None:
    bench.step("saves", lambda: _saves(bench), seconds=8)


def even(bench: Bench) -> dict[str, torch.Tensor]:
    """The state, in tensors of one size."""
    count = bench.scale.state_tensors
    nbytes = bench.scale.state_bytes // count // 8 * 8
    return {f"tensor.{number}": bench.random(nbytes) for number in range(count)}


def _saves(bench: Bench) -> dict[str, Any]:
    state = even(bench)
    nbytes = sum(tensor.nbytes for tensor in state.values())
    bench.check_host_memory(2 * nbytes, "staging and the base's files")
    directory = bench.place(2 * nbytes)
    ss.prepare(bench.device, SLACK_BYTES)
    # What an optimizer owns needs no copy at the call.
    owner = torch.optim.SGD([torch.nn.Parameter(tensor, requires_grad=False) for tensor in state.values()], lr=0.0)
    with bench.checkpoint(directory) as base:
        ss.save(state, checkpoint_id=base, step=1)
        behind = [_one(bench, state, directory, base, owner) for _ in range(bench.scale.saves + 1)]
        blocking = [_one(bench, state, directory, base, None) for _ in range(bench.scale.saves)]
    passes = [one["device_digest"]["seconds"] for one in behind[1:] if one["device_digest"]]
    return {
        "nbytes": nbytes,
        "tensors": len(state),
        "known_seconds": spread([one["known"] for one in behind[1:]]),
        "digest_pass_seconds": spread(passes),
        "digest_pass_gbps": gbps(nbytes, passes),
        "call_seconds": spread([one["call"] for one in behind[1:]]),
        "durable_seconds": spread([one["durable"] for one in behind[1:]]),
        "blocking_save_seconds": spread([one["durable"] for one in blocking]),
        "saves": behind + blocking,
    }


def _one(
    bench: Bench, state: dict[str, torch.Tensor], directory: Path, base: Path, owner: torch.optim.Optimizer | None
) -> dict[str, Any]:
    """A save with the optimizer as its fence, or one that blocks."""
    with bench.checkpoint(directory) as path:
        bench.settle()
        begin = time.perf_counter()
        if owner is None:
            stats = ss.save(state, checkpoint_id=path, base=base, step=1, on_unchanged="ignore").stats
            called = known = time.perf_counter()
        else:
            handle = ss.async_save(state, checkpoint_id=path, base=base, step=1, fence=owner, on_unchanged="ignore")
            called = time.perf_counter()
            handle.staging_completion.result()
            known = time.perf_counter()
            handle.result()
            stats = handle.stats
        found = {
            "call": called - begin,
            "known": known - begin,
            "durable": time.perf_counter() - begin,
            **{key: stats.get(key) for key in ("device_digest", "devices", "chunks", "unchanged_chunks", "plan")},
        }
    if found["unchanged_chunks"] != found["chunks"]:
        raise RuntimeError(f"{found['unchanged_chunks']} of {found['chunks']} chunks were found unchanged")
    return found
