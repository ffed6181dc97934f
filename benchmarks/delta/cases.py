"""What is measured of delta saves: how much of the state has changed, and who saves or loads it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from states import State

__all__ = ["CASES", "DEPTH", "Case", "change", "changed_names"]

DEPTH = 10  # of the chain whose last checkpoint is loaded
SOME_OF = 20  # one of so many tensors is "some"
_BLOCK_BYTES = 7_999_993  # no codec's window holds two of them
_SEED = 5


@dataclass(frozen=True, slots=True)
class Case:
    name: Literal["nothing", "some", "all", "load"]
    title: str
    contenders: tuple[str, ...]


_SAVES = ("delta", "full", "dcp", "moonclip", "hashing")

CASES = (
    Case("nothing", "delta save, nothing changed", _SAVES),
    Case("some", "delta save, 5 % of the tensors changed", _SAVES),
    Case("all", "delta save, all tensors changed", _SAVES),
    Case("load", f"load of a checkpoint {DEPTH} deltas deep", ("delta", "full")),
)


def changed_names(state: State, how_many: str, turn: int = 0) -> list[str]:
    """The tensors that change. Some of them: of every size, others each `turn`."""
    if how_many == "nothing":
        return []
    by_size = sorted(state, key=lambda name: (state[name].nbytes, name))
    return by_size if how_many == "all" else by_size[(SOME_OF // 2 + turn) % SOME_OF :: SOME_OF]


def change(state: State, names: Iterable[str]) -> None:
    """Gives tensors other bits, as random as those they had; doing it twice changes nothing."""
    block = torch.from_numpy(np.random.default_rng(_SEED).integers(0, 256, _BLOCK_BYTES, dtype=np.uint8))
    for name in names:
        for piece in state[name].view(-1).view(torch.uint8).split(_BLOCK_BYTES):
            piece ^= block[: len(piece)]
