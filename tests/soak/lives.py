"""What one life of the training job will do, drawn from the seed and its number alone, so that it can be repeated.

What the clock decides cannot: a life that is killed at a time dies elsewhere in the next run.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Literal

__all__ = ["KINDS", "Life", "life_of"]

Ends = Literal["at a time", "at a call", "all at once", "by itself"]

# Of a save: where it goes, and through what.
KINDS = ("full", "delta", "difference", "last", "dcp", "dcp async")
KILLED_AFTER_S = 1.2
CALL_MAX = 70  # a save makes about as many
MARATHON_SAVES = 150  # enough to see what grows from save to save


@dataclass(frozen=True)
class Life:
    number: int
    seed: str  # of what the job chooses itself
    world_size: int
    ends: Ends
    victim: int
    after_s: float
    """"at a time", "all at once": from when the job has resumed."""
    save: int
    """ "at a call": the save in which the victim is killed, from 1."""
    call: int
    saves: int
    """After which it ends by itself."""


def life_of(seed: int, number: int) -> Life:
    text = f"{seed}/{number}"
    chosen = random.Random(text)
    world_size = chosen.choice([1, 1, 2])
    ends: Ends = chosen.choice(["at a time", "at a time", "at a call", "at a call", "at a call", "all at once"])
    saves = 1_000_000
    if number % 12 == 5:
        ends, saves = "by itself", chosen.choice([3, 10])
    if number % 40 == 9:
        ends, saves = "by itself", MARATHON_SAVES
    return Life(
        number,
        text,
        world_size,
        ends,
        chosen.randrange(world_size),
        chosen.uniform(0.0, KILLED_AFTER_S),
        chosen.randint(1, 4),
        chosen.randint(1, CALL_MAX),
        saves,
    )
