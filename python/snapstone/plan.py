"""Save and load plans: which rank writes which shard, whether shards tile their tensor, where they overlap.

Pure functions over names, sizes and offsets: no tensors, no files, no ranks to talk to. Offsets and sizes count
elements.
"""

from __future__ import annotations

import hashlib
import heapq
import itertools
import json
import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from .errors import IncompatibleCheckpointError

__all__ = [
    "Box",
    "TensorItem",
    "assign_writers",
    "check_tiling",
    "first_overlap",
    "overlap",
    "shard_range",
    "spread",
    "structure_digest",
]

DIMENSIONS_MAX = 64

Ints = tuple[int, ...]


class TensorItem(NamedTuple):
    """One shard of a named tensor, as one rank holds it."""

    name: str
    dtype: str
    shape: Ints  # of the global tensor
    offsets: Ints  # where the shard starts in it
    sizes: Ints
    nbytes: int  # of the shard


class Box(NamedTuple):
    offsets: Ints
    sizes: Ints

    @property
    def volume(self) -> int:
        return math.prod(self.sizes)


def shard_range(size: int, parts: int, index: int) -> tuple[int, int]:
    """First element and count of part `index` when `size` elements are cut as `torch.chunk` cuts them."""
    step = -(-size // parts)
    first = min(size, step * index)
    return first, min(size, first + step) - first


def overlap(a: Box, b: Box) -> Box | None:
    """The common part of two boxes in global coordinates; None when empty."""
    offsets = tuple(map(max, a.offsets, b.offsets))
    ends = tuple(
        min(ao + asz, bo + bsz) for ao, asz, bo, bsz in zip(a.offsets, a.sizes, b.offsets, b.sizes, strict=True)
    )
    sizes = tuple(end - offset for end, offset in zip(ends, offsets, strict=True))
    if any(size <= 0 for size in sizes):
        return None
    return Box(offsets, sizes)


def structure_digest(items: Iterable[Sequence[object]], *more: object) -> str:
    """Equal exactly for equal items (names, dtypes, shapes, offsets, sizes) in equal order."""
    text = json.dumps([list(items), more], separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


_Shard = tuple[str, Ints, Ints]  # name, offsets, sizes
_Places = list[tuple[int, int]]  # (rank, position in its list) of those that hold a shard


def assign_writers(
    ranks: Sequence[Sequence[TensorItem]], ties: Sequence[Sequence[int]] | None = None
) -> list[list[int]]:
    """For each rank the positions of the items it writes: every distinct shard once, bytes spread evenly.

    Shards that one rank holds alone are fixed; those that several hold go, largest first, to the holder with the fewest
    bytes so far. `ties` holds for each rank and item the position of the first item with the same memory: items tied on
    every rank that holds them are written by one rank, which stores their bytes once. Equal input gives equal output.

    Raises:
        IncompatibleCheckpointError: ranks disagree on a tensor's dtype or global shape.
    """
    holders = _holders(ranks)
    leaders = {shard: _leader(ranks, ties, shard, places) for shard, places in holders.items()} if ties else {}
    chosen: list[list[int]] = [[] for _ in ranks]
    load = [0] * len(ranks)
    writers: dict[_Shard, int] = {}

    def give(shard: _Shard, places: _Places, rank: int) -> None:
        chosen[rank].append(next(position for holder, position in places if holder == rank))
        writers[shard] = rank

    def give_all(units: list[tuple[int, _Shard, _Places]]) -> None:
        ranks_of_units = spread([(nbytes, [rank for rank, _ in places]) for nbytes, _, places in units], load)
        for (_, shard, places), rank in zip(units, ranks_of_units, strict=True):
            give(shard, places, rank)

    alone: list[tuple[int, _Shard, _Places]] = []
    shared: list[tuple[int, _Shard, _Places]] = []
    tied: list[tuple[int, _Shard, _Places]] = []
    for shard, places in holders.items():
        nbytes = ranks[places[0][0]][places[0][1]].nbytes
        if leaders.get(shard, shard) != shard:
            tied.append((nbytes, shard, places))
        else:
            (alone if len({rank for rank, _ in places}) == 1 else shared).append((nbytes, shard, places))
    give_all(alone)
    give_all(shared)
    for nbytes, shard, places in tied:
        leader = writers.get(leaders[shard])
        if leader in {rank for rank, _ in places}:
            give(shard, places, leader)
        else:
            give_all([(nbytes, shard, places)])
    return [sorted(positions) for positions in chosen]


def spread(units: Sequence[tuple[int, Sequence[int]]], load: list[int]) -> list[int]:
    """The writer of each unit (bytes, ranks that hold it, ascending): largest first, to the holder with the fewest
    bytes so far, the lowest of equals. `load` is what each rank writes besides, in bytes, and grows by the units.
    """
    writers = [0] * len(units)
    for number in sorted(range(len(units)), key=lambda number: -units[number][0]):
        nbytes, holders = units[number]
        rank = writers[number] = min(holders, key=load.__getitem__)
        load[rank] += nbytes
    return writers


def _holders(ranks: Sequence[Sequence[TensorItem]]) -> dict[_Shard, _Places]:
    holders: dict[_Shard, _Places] = {}
    described: dict[str, tuple[int, TensorItem]] = {}
    for rank, items in enumerate(ranks):
        for position, item in enumerate(items):
            first_rank, first = described.setdefault(item.name, (rank, item))
            if (first.dtype, first.shape) != (item.dtype, item.shape):
                raise IncompatibleCheckpointError(
                    f"ranks {first_rank} and {rank} disagree: {first.dtype}{list(first.shape)} and "
                    f"{item.dtype}{list(item.shape)}; give rank-local tensors rank-specific names",
                    tensor=item.name,
                    rank=rank,
                )
            holders.setdefault((item.name, item.offsets, item.sizes), []).append((rank, position))
    return holders


def _leader(
    ranks: Sequence[Sequence[TensorItem]], ties: Sequence[Sequence[int]], shard: _Shard, places: _Places
) -> _Shard:
    """The shard that this one is tied to, the same on every rank that holds it; else the shard itself."""
    if all(ties[rank][position] == position for rank, position in places):
        return shard
    found = {ranks[rank][ties[rank][position]] for rank, position in places}
    first = next(iter(found))
    return (first.name, first.offsets, first.sizes) if len(found) == 1 else shard


def check_tiling(items: Iterable[TensorItem], *, holes: bool = False) -> None:
    """Raises IncompatibleCheckpointError unless the shards of every tensor cover it exactly once; with `holes`, at most
    once.
    """
    boxes: dict[str, dict[tuple[Ints, Ints], Box]] = {}
    shapes: dict[str, Ints] = {}
    for item in items:
        shapes[item.name] = item.shape
        if 0 not in item.sizes:
            boxes.setdefault(item.name, {})[(item.offsets, item.sizes)] = Box(item.offsets, item.sizes)
    for name, shape in shapes.items():
        parts = list(boxes.get(name, {}).values())
        covered = sum(part.volume for part in parts)
        for part in parts:
            if any(o < 0 or o + s > extent for o, s, extent in zip(part.offsets, part.sizes, shape, strict=True)):
                raise IncompatibleCheckpointError(f"shard {part} lies outside the tensor {list(shape)}", tensor=name)
        pair = first_overlap(parts)
        if pair is not None:
            raise IncompatibleCheckpointError(f"shards overlap: {pair[0]} and {pair[1]}", tensor=name)
        if covered != math.prod(shape) and not holes:
            raise IncompatibleCheckpointError(
                f"shards leave a hole: {covered} of {math.prod(shape)} elements", tensor=name
            )


def first_overlap(boxes: list[Box]) -> tuple[Box, Box] | None:
    """Two boxes that share an element, if any. Sweeps along the first dimension, so that only boxes that meet there
    are compared.
    """
    if len(boxes) < 2:
        return None
    active: list[tuple[int, int]] = []  # (end along dimension 0, position)
    ordered = sorted(boxes, key=lambda box: box.offsets)
    for position, box in enumerate(ordered):
        while active and active[0][0] <= box.offsets[0]:
            heapq.heappop(active)
        for _, other in active:
            if overlap(box, ordered[other]) is not None:
                return ordered[other], box
        heapq.heappush(active, (box.offsets[0] + box.sizes[0], position))
    return None


def runs_of(indices: Sequence[int]) -> list[tuple[int, int, int]]:
    """Cuts an increasing or piecewise increasing index list into (first index, count, position) runs of neighbours."""
    runs: list[tuple[int, int, int]] = []
    for position, index in enumerate(indices):
        if runs and runs[-1][0] + runs[-1][1] == index:
            first, count, at = runs[-1]
            runs[-1] = (first, count + 1, at)
        else:
            runs.append((index, 1, position))
    return runs


def boxes_of_runs(runs: Sequence[Sequence[tuple[int, int, int]]]) -> list[tuple[Box, Ints]]:
    """The product of per-dimension runs: (global box, offsets of that part inside the local shard)."""
    boxes = []
    for combination in itertools.product(*runs):
        box = Box(tuple(run[0] for run in combination), tuple(run[1] for run in combination))
        boxes.append((box, tuple(run[2] for run in combination)))
    return boxes
