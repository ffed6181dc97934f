"""The parts of a run, the most important first: what each measures, and the seconds that it may take."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["PARTS", "Part"]


@dataclass(frozen=True, slots=True)
class Part:
    name: str
    module: str  # of this package, with a function `measure`
    title: str
    seconds: float


PARTS = (
    Part("copies", "copies", "copies by size, registration, digests", 45),
    Part("tensors", "tensors", "10,000 tensors off the device; host time of the call", 50),
    Part("unchanged", "unchanged", "an unchanged state", 35),
    Part("loads", "loads", "a load from the page cache", 35),
    Part("training_8gb", "training", "stall of a training with 8 GB of state", 125),
    Part("training_1gb", "training", "the same with 1 GB", 45),
    Part("training_32gb", "training", "the same with 32 GB", 110),
)
