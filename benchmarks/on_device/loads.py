"""A checkpoint in the page cache into tensors on the device, verified there."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch

import snapstone as ss

from .bench import Bench, gbps
from .unchanged import even

__all__ = ["measure"]


def measure(bench: Bench) -> None:
    bench.step("load", lambda: _load(bench), seconds=8)


def _load(bench: Bench) -> dict[str, Any]:
    from machine import file_system

    state = even(bench)
    nbytes = sum(tensor.nbytes for tensor in state.values())
    bench.check_host_memory(2 * nbytes, "staging and the file")
    directory = bench.place(nbytes)
    ss.prepare(bench.device)
    with bench.checkpoint(directory) as path:
        ss.save(state, checkpoint_id=path)
        _read(path)
        targets = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
        seconds, stats = [], []
        for _ in range(bench.scale.saves + 1):
            bench.settle()
            begin = time.perf_counter()
            loaded = ss.load(targets, checkpoint_id=path)
            bench.wait()
            seconds.append(time.perf_counter() - begin)
            stats.append({key: loaded.stats.get(key) for key in ("rung", "devices", "read", "digest", "decode")})
        wrong = [name for name, tensor in state.items() if not torch.equal(targets[name], tensor)]
        found = file_system(directory)
    if wrong:
        raise RuntimeError(f"{len(wrong)} of {len(state)} tensors came back different, the first is {wrong[0]}")
    return {
        "nbytes": nbytes,
        "file_system": found,
        "first_seconds": seconds[0],
        "load_gbps": gbps(nbytes, seconds[1:]),
        "stats": stats,
    }


def _read(directory: Path) -> None:
    """Whatever the save wrote past the page cache comes into it."""
    for path in directory.rglob("*"):
        if path.is_file():
            with path.open("rb", buffering=0) as file:
                while file.read(16 << 20):
                    pass
