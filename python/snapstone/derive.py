"""Derived shards: what a rank need not write, because it is a float32 shard of the same rank, rounded.

Mixed precision keeps parameters in bfloat16 or float16 beside float32 masters. Where each element of a shard is its
master's, rounded to nearest, ties to even, bit for bit, the master's bytes stand for both. NaN is left alone: how its
payload is rounded depends on the machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from . import _native, tensors
from .index import DERIVED_DTYPES, MASTER_DTYPE
from .plan import Ints, TensorItem
from .tensors import LocalShard

__all__ = ["NBYTES_MIN", "Derivation", "find_derived"]

NBYTES_MIN = 4096  # of a shard; a smaller one would save little more than its longer row in the index costs
_SAMPLES = 64
_PIECE_ELEMENTS = 1 << 18  # compared at once: half a MiB, which stays in cache

_Box = tuple[Ints, Ints, Ints]


class Derivation(NamedTuple):
    derived_from: str  # the master's name
    xxh128: str  # of the derived shard's own bytes


def find_derived(
    shards: Sequence[LocalShard], ties: Sequence[int], written: Sequence[int]
) -> tuple[dict[int, Derivation], int]:
    """Which of the shards at the positions `written` are derived, and how many bytes that leaves out of the data file.

    `shards` are all of the rank's: a master may be one that another rank writes. Tied shards are derived together, or
    not at all. No master has two shards that are not tied: equal masters mean shared memory.
    """
    found: dict[int, Derivation] = {}
    nbytes = 0
    groups_by_box = _groups_by_box(shards, ties, written)
    masters: dict[_Box, list[LocalShard]] = {box: [] for box in groups_by_box}
    for shard in shards:
        if shard.item.dtype == MASTER_DTYPE and (box := _box_of(shard.item)) in masters:
            masters[box].append(shard)
    for box, groups in groups_by_box.items():
        samples: dict[tuple[torch.dtype, bytes], list[LocalShard]] = {}
        for dtype in {shards[group[0]].tensor.dtype for group in groups}:
            for master in masters[box]:
                samples.setdefault((dtype, _samples(master.tensor, dtype)), []).append(master)
        for group in groups:
            shard = shards[group[0]]
            candidates = samples.get((shard.tensor.dtype, _samples(shard.tensor, shard.tensor.dtype)), [])
            for master in sorted(candidates, key=lambda one: _unlikeness(one.item.name, shard.item.name)):
                if _rounds_to(master.tensor, shard.tensor):
                    candidates.remove(master)
                    found |= dict.fromkeys(group, Derivation(master.item.name, _digest(shard)))
                    nbytes += shard.item.nbytes
                    break
    return found, nbytes


def _groups_by_box(
    shards: Sequence[LocalShard], ties: Sequence[int], written: Sequence[int]
) -> dict[_Box, list[list[int]]]:
    """Groups of tied shards that may be derived, by the box that all of a group are."""
    groups: dict[int, list[int]] = {}
    for position in written:
        item = shards[position].item
        if item.dtype in DERIVED_DTYPES and item.nbytes >= NBYTES_MIN:
            groups.setdefault(ties[position], []).append(position)
    by_box: dict[_Box, list[list[int]]] = {}
    for group in groups.values():
        boxes = {_box_of(shards[position].item) for position in group}
        if len(boxes) == 1:
            by_box.setdefault(boxes.pop(), []).append(group)
    return by_box


def _box_of(item: TensorItem) -> _Box:
    return item.shape, item.offsets, item.sizes


def _unlikeness(master: str, name: str) -> tuple[bool, int]:
    return name not in master, -len(set(name.split(".")) & set(master.split(".")))


def _samples(tensor: torch.Tensor, dtype: torch.dtype) -> bytes:
    """Some elements, rounded: different for nearly all tensors that are not each other's master."""
    per_dimension = max(1, round(_SAMPLES ** (1 / tensor.dim())))
    some = tensor.detach()[tuple(slice(None, None, -(-size // per_dimension)) for size in tensor.shape)]
    bits = some.to(dtype).resolve_neg().contiguous().view(torch.int16)
    return bits.cpu().numpy().tobytes()


def _rounds_to(master: torch.Tensor, shard: torch.Tensor) -> bool:
    """Whether every element is the master's, rounded, and none is NaN."""
    master, shard = master.detach().resolve_neg(), shard.detach().resolve_neg()
    if master.is_contiguous() and shard.is_contiguous():
        master, shard = master.view(-1), shard.view(-1)
    rows = max(1, _PIECE_ELEMENTS * len(shard) // shard.numel())
    for begin in range(0, len(shard), rows):
        own = shard[begin : begin + rows]
        rounded = master[begin : begin + rows].to(own.device, own.dtype)
        words = _words(own)
        if not torch.equal(rounded.view(words), own.view(words)) or own.max().isnan():  # max propagates NaN
            return False
    return True


def _words(flat: torch.Tensor) -> torch.dtype:
    """As what its bits are compared: several elements at once, where that many make it up."""
    elements = torch.int64.itemsize // flat.dtype.itemsize
    whole = flat.dim() == 1 and flat.stride(0) == 1
    return torch.int64 if whole and len(flat) % elements == flat.storage_offset() % elements == 0 else torch.int16


def _digest(shard: LocalShard) -> str:
    host = tensors.on_host(shard).tensor.detach().contiguous()
    return _native.digest_memory(host.data_ptr(), host.nbytes)
