"""How large everything is that a part measures: for a device with much memory, or for the fake driver, which only has
to be got through.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["DEVICE", "FAKE", "Scale", "Training"]

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
GB = 10**9


@dataclass(frozen=True, slots=True)
class Training:
    """A transformer that trains, and for how long forward and backward take at least."""

    model: str  # of snapstone.bench.models
    batch: int
    length: int
    compute_seconds_min: float
    steps: int  # of a block; the save begins with the first
    engines: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Scale:
    copy_sizes: tuple[int, ...]
    ring_bytes: int
    digest_bytes: int  # read by the digest kernel and by a copy within the device
    prepared_bytes: int
    repeat: int
    parameters: tuple[int, ...]  # of the optimizers whose states are saved, four tensors each
    tensors: int  # of the state that leaves the device against the clock
    tensor_bytes: tuple[int, ...]  # of its tensors, in turn
    state_bytes: int  # of the state that does not change, and of the one that is loaded
    state_tensors: int
    saves: int
    training: dict[str, Training]


_OWN = ("snapstone", "snapstone-now")
_ENGINES = (*_OWN, "dcp-default", "dcp-pinned", "torch-checkpointing")

DEVICE = Scale(
    copy_sizes=(64 * KIB, 256 * KIB, MIB, 4 * MIB, 16 * MIB, 64 * MIB, 256 * MIB, GIB),
    ring_bytes=GIB,
    digest_bytes=8 * GIB,
    prepared_bytes=8 * GIB,
    repeat=7,
    parameters=(25, 2500),
    tensors=10_000,
    tensor_bytes=(KIB, 16 * KIB, 128 * KIB, 512 * KIB, 1536 * KIB),
    state_bytes=8 * GB,
    state_tensors=200,
    saves=5,
    training={
        "training_1gb": Training("bf16-1gb", 8, 1024, 0.05, 8, _ENGINES),
        "training_8gb": Training("bf16-8gb", 6, 2048, 0.20, 6, _ENGINES),
        "training_32gb": Training("bf16-32gb", 4, 2048, 0.80, 4, _ENGINES),
    },
)

FAKE = Scale(
    copy_sizes=(64 * KIB, MIB),
    ring_bytes=4 * MIB,
    digest_bytes=4 * MIB,
    prepared_bytes=8 * MIB,
    repeat=2,
    parameters=(2, 10),
    tensors=40,
    tensor_bytes=(KIB, 16 * KIB, 128 * KIB),
    state_bytes=4 * MIB,
    state_tensors=10,
    saves=2,
    training={
        name: Training("tiny", 1, 8, 0.02, 2, (*_OWN, "dcp-default"))
        for name in ("training_1gb", "training_8gb", "training_32gb")
    },
)
