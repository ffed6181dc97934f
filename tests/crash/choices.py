"""Which of what is not durable a crash leaves: each corner case, and draws by seed."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy as np

from crash.model import File, Tree, World, pulled

__all__ = ["choices", "state_of"]

_TORN = ("data", "zeros", "half", "odd", "first", "last", "short")


class Chooser:
    """The state of a world that a text names: "none", "all", "but=N", "only=N", "from=N", "torn=HOW" or "random=SEED".
    N counts changes of names, then files.
    """

    def __init__(self, world: World, text: str) -> None:
        self._world = world
        self._how, _, value = text.partition("=")
        self._value = value
        self._random = random.Random(int(value)) if self._how == "random" else random.Random(0)
        # Apart: without the name of its directory nothing is seen of what is in there.
        self._share_of_names = self._random.choice((0.5, 0.9, 0.99))
        self._share_of_files = self._random.choice((0.1, 0.5, 0.9))

    def tree(self) -> Tree:
        kept: dict[int, list[bool]] = {}
        bytes_of: dict[int, int] = {}
        at = 0
        for number, directory in self._world.pending_changes():
            count = len(directory.pending)
            wanted = [self._wants(at + i, self._share_of_names) for i in range(count)]
            if self._how == "but":  # what rests on the one that is missing is missing, too
                gone = pulled(directory.pending[::-1], [not one for one in wanted[::-1]])[::-1]
                kept[number] = [not one for one in gone]
            else:
                kept[number] = pulled(directory.pending, wanted)
            at += count
        for number, file in self._world.pending_files():
            bytes_of[number] = self._world.contents.key(self._bytes(file, self._wants(at, self._share_of_files)))
            at += 1
        return self._world.tree(kept, bytes_of)

    def _wants(self, unit: int, share: float) -> bool:
        if self._how == "random":
            return self._random.random() < share
        if self._how in ("all", "torn"):
            return True
        if self._how == "none":
            return False
        number = int(self._value)
        return {"but": unit != number, "only": unit == number, "from": unit >= number}[self._how]

    def _bytes(self, file: File, wanted: bool) -> bytes:
        how = "data" if wanted else "durable"
        if self._how == "torn":
            how = self._value
        elif self._how == "random" and self._random.random() < 0.5:
            how = self._random.choice((*_TORN, "any"))
        return self._torn(file, how)

    def _torn(self, file: File, how: str) -> bytes:
        nbytes, count = len(file.live), file.sector_count
        if how == "data":
            return bytes(file.live)
        if how == "durable":
            return file.durable
        if how == "short":
            return bytes(file.live[: nbytes // 2])
        mask: Any = np.zeros(count, bool)
        if how == "half":
            mask[: count // 2] = True
        elif how == "odd":
            mask[1::2] = True
        elif how == "first":
            mask[1:] = True
        elif how == "last":
            mask[: count - 1] = True
        elif how == "any":
            mask = np.frombuffer(self._random.randbytes(count), np.uint8) < 256 * self._random.random()
            nbytes = self._random.choice((*file.sizes, len(file.durable), nbytes))
        return file.mixed(mask, nbytes)


def state_of(world: World, text: str) -> Tree:
    return Chooser(world, text).tree()


def choices(world: World, draws: int, seed: int) -> Iterator[str]:
    """Texts for `state_of`: every corner case, then `draws` seeds."""
    changes = sum(len(directory.pending) for _, directory in world.pending_changes())
    files = sum(1 for _ in world.pending_files())
    units = changes + files
    yield "none"
    if units == 0:
        return
    yield "all"
    for number in range(units):
        yield f"but={number}"
        yield f"only={number}"
        if number:
            yield f"from={number}"
    if files:
        yield from (f"torn={how}" for how in _TORN[1:])
    yield from (f"random={seed + draw}" for draw in range(draws))
