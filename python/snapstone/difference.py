"""What differs between two checkpoints, by name and by chunk."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from . import index

if TYPE_CHECKING:
    from .checkpoint import Checkpoint

__all__ = ["Change", "Difference", "compare"]


@dataclass(frozen=True, slots=True)
class Change:
    """One tensor that both checkpoints have, with other bytes or another dtype or shape.

    `changed_bytes` counts whole chunks; `max_abs_difference` is None unless values were compared and shapes agree.
    """

    name: str
    before: str  # dtype and shape
    after: str
    nbytes: int
    changed_bytes: int
    max_abs_difference: float | None


@dataclass(frozen=True, slots=True)
class Difference:
    """Falsy when both checkpoints hold the same names, shapes, dtypes, tensor bytes and Python values.

    `changed_share` is the part of the second's bytes that the first does not have, 0 to 1.
    """

    added: tuple[str, ...]  # only in the second
    removed: tuple[str, ...]  # only in the first
    changed: tuple[Change, ...]
    changed_objects: tuple[str, ...]
    same_tensors: int
    changed_bytes: int  # of the second's tensors: chunks that differ, and tensors that are added
    nbytes: int  # of the second's tensors, each counted once

    @property
    def changed_share(self) -> float:
        return self.changed_bytes / self.nbytes if self.nbytes else 0.0

    def __bool__(self) -> bool:
        return bool(self.added or self.removed or self.changed or self.changed_objects)


def compare(first: Checkpoint, second: Checkpoint, *, values: bool) -> Difference:
    """From `first` to `second`. Digests decide where both store a tensor alike; otherwise its bytes are read."""
    before, after = first.reader.shards, second.reader.shards
    changed = []
    same = 0
    for name in before.keys() & after.keys():
        change = _compare_tensor(first, second, name, values)
        if change is None:
            same += 1
        else:
            changed.append(change)
    objects = first.reader.objects(0), second.reader.objects(0)
    names = objects[0].keys() | objects[1].keys()
    added = tuple(sorted(after.keys() - before.keys()))
    return Difference(
        added=added,
        removed=tuple(sorted(before.keys() - after.keys())),
        changed=tuple(sorted(changed, key=lambda change: change.name)),
        changed_objects=tuple(sorted(name for name in names if objects[0].get(name) != objects[1].get(name))),
        same_tensors=same,
        changed_bytes=sum(change.changed_bytes for change in changed)
        + sum(second.get_slice(name).nbytes for name in added),
        nbytes=sum(second.get_slice(name).nbytes for name in after),
    )


def _compare_tensor(first: Checkpoint, second: Checkpoint, name: str, values: bool) -> Change | None:
    a, b = first.describe(name), second.describe(name)
    before, after = f"{a.dtype}{list(a.shape)}", f"{b.dtype}{list(b.shape)}"
    if before != after:
        nbytes = second.get_slice(name).nbytes
        return Change(name, before, after, nbytes, nbytes, None)
    chunks = _chunks(first, name), _chunks(second, name)
    nbytes = first.get_slice(name).nbytes
    differing = []
    if chunks[0] is not None and chunks[1] is not None and chunks[0].keys() == chunks[1].keys():
        differing = [key for key, digest in chunks[0].items() if chunks[1][key] != digest]
        if not differing:
            return None
    if differing and not any(key.is_packed for key in differing):
        changed_bytes = sum(key.nbytes for key in differing)
        largest = _largest(first.get_tensor(name), second.get_tensor(name)) if values else None
        return Change(name, before, after, nbytes, changed_bytes, largest)
    left, right = first.get_tensor(name), second.get_tensor(name)
    if _bits(left).equal(_bits(right)):
        return None
    return Change(name, before, after, nbytes, nbytes, _largest(left, right) if values else None)


class _Chunk(NamedTuple):
    """Where a chunk stands in a tensor. What two checkpoints store under equal keys is the same bytes of the tensor;
    of a packed chunk, which other tensors are in too, only if the digests are equal.
    """

    offsets: tuple[int, ...]  # of the shard
    sizes: tuple[int, ...]
    position: int
    nbytes: int
    at: int
    is_packed: bool


def _chunks(checkpoint: Checkpoint, name: str) -> dict[_Chunk, bytes] | None:
    """The digests of a tensor's chunks; None where chunks do not hold all its bytes."""
    found: dict[_Chunk, bytes] = {}
    for shard in checkpoint.reader.shards[name]:
        place, item = shard.stored.place, shard.stored.item
        one = checkpoint.reader.indexes[shard.table]
        table = np.frombuffer(one.table, dtype=index.CHUNK_DTYPE)[
            place.first_chunk : place.first_chunk + place.chunk_count
        ]
        nbytes = int(table["raw_bytes"].sum())
        if nbytes < item.nbytes:
            return None
        sizes = table["raw_bytes"].tolist()
        for position, (raw_bytes, digest) in enumerate(zip(sizes, table["digest"], strict=True)):
            key = _Chunk(item.offsets, item.sizes, position, raw_bytes, place.at, nbytes != item.nbytes)
            found[key] = digest.tobytes()
    return found


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def _largest(left: torch.Tensor, right: torch.Tensor) -> float | None:
    """None for a dtype that torch does not compute with, such as packed pairs of 4-bit floats."""
    if left.numel() == 0:
        return 0.0
    wide = torch.complex128 if left.dtype.is_complex else torch.float64
    try:
        return float((left.to(wide) - right.to(wide)).abs().max())
    except NotImplementedError:
        return None
