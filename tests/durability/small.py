"""Small states, and what every test of this folder asks of a checkpoint directory afterwards."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

import snapstone as ss
from snapstone import _native

Bits = dict[str, Any]
RUNGS = ("uring-fixed", "uring", "threads-direct", "buffered")  # all ways of doing I/O


def state(seed: int = 0) -> dict[str, Any]:
    """A packed chunk of three tensors, a large tensor of two chunks (with SNAPSTONE_CHUNK_BYTES=65536), two values."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "large": torch.randn(17_000, generator=generator),
        "small": torch.randn(3, 5, generator=generator),
        "bytes": torch.randint(0, 256, (7,), dtype=torch.uint8, generator=generator),
        "scalar": torch.tensor(float(seed)),
        "step": seed,
        "extra": (seed, "text"),
    }


def blank() -> dict[str, Any]:
    """A state to load into: the names of `state`, other values."""
    return {name: value * 0 - 77 if isinstance(value, torch.Tensor) else None for name, value in state(1).items()}


def bits(values: dict[str, Any]) -> Bits:
    """Tensors as bytes, so that == means bit for bit."""
    return {
        name: (str(value.dtype), tuple(value.shape), value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        if isinstance(value, torch.Tensor)
        else value
        for name, value in values.items()
    }


def load(path: Path) -> Bits:
    target = blank()
    ss.load(target, checkpoint_id=path)
    return bits(target)


def assert_holds(path: Path, seed: int) -> None:
    """The checkpoint at `path` is `state(seed)`, bit for bit and in every byte of its files."""
    assert load(path) == bits(state(seed)), path
    report = ss.verify(path)
    assert report, report.problems


def leftovers(run: Path) -> list[str]:
    return sorted(name for name in os.listdir(run) if name.startswith("."))


def open_files(under: Path) -> list[str]:
    """What this process has open in a directory. Rings and probes that the engine keeps are elsewhere."""
    links = []
    for fd in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):  # the descriptor of the listing itself
            links.append(os.readlink(f"/proc/self/fd/{fd}"))
    return [link for link in links if link.startswith(str(under))]


def assert_slots_free() -> None:
    facts = _native.ring_facts()
    assert facts["free_slots"] == facts["slots"], facts
