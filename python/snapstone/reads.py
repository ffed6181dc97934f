"""Reads: which parts of which saved shards go where, as the native `LoadJob` takes them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch

from . import plan
from .index import StoredTensor
from .plan import Box
from .tensors import HOST, Memory

__all__ = ["EVERY_CHUNK", "Part", "Reads", "SavedShard", "Window", "packed_strides", "view_of"]

Window = tuple[int, int]  # first chunk and count
EVERY_CHUNK: Window = (0, (1 << 64) - 1)


class SavedShard(NamedTuple):
    table: int
    stored: StoredTensor

    @property
    def box(self) -> Box:
        return Box(self.stored.item.offsets, self.stored.item.sizes)


class Part(NamedTuple):
    """A box of a saved shard. Its elements in row-major order are its string."""

    shard: SavedShard
    box: Box  # in global coordinates

    @property
    def is_whole(self) -> bool:
        return self.box.sizes == self.shard.stored.item.sizes

    @property
    def offsets(self) -> plan.Ints:
        """Where the box starts in the shard."""
        return tuple(a - b for a, b in zip(self.box.offsets, self.shard.stored.item.offsets, strict=True))


def view_of(tensor: torch.Tensor, wanted: Box, part: Box) -> torch.Tensor:
    """The view of `tensor`, which holds `wanted`, that holds `part`."""
    for dimension, (start, base, size) in enumerate(zip(part.offsets, wanted.offsets, part.sizes, strict=True)):
        tensor = tensor.narrow(dimension, start - base, size)
    return tensor


def packed_strides(sizes: plan.Ints, item_bytes: int) -> tuple[int, ...]:
    """Of row-major memory, in bytes."""
    strides = []
    for size in reversed(sizes):
        strides.append(item_bytes)
        item_bytes *= max(size, 1)
    return tuple(reversed(strides))


@dataclass(slots=True)
class Reads:
    """`rows` and `boxes` are the arguments of `LoadJob`, with tables as the reader numbers them."""

    rows: list[tuple[int, ...]] = field(default_factory=list)
    boxes: list[Any] = field(default_factory=list)
    row_devices: list[int] = field(default_factory=list)  # ordinals of CUDA devices, or HOST
    box_devices: list[int] = field(default_factory=list)
    converted: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)  # (target, buffer read instead)
    masters: dict[tuple[str, Box], torch.Tensor] = field(default_factory=dict)  # what is read of them into one memory

    def add_whole(self, shard: SavedShard, data_ptr: int, window: Window = EVERY_CHUNK, device: int = HOST) -> None:
        self.rows.append((shard.table, *shard.stored.place, shard.stored.item.nbytes, data_ptr, *window))
        self.row_devices.append(device)

    def add(self, part: Part, memory: Memory, window: Window = EVERY_CHUNK) -> None:
        """With a window `memory` is where the whole part would go."""
        shard = part.shard
        if memory.stride_bytes is None and part.is_whole:
            self.add_whole(shard, memory.data_ptr, window, memory.device)
            return
        stored = (shard.table, *shard.stored.place, shard.stored.item.nbytes)
        strides = memory.stride_bytes or packed_strides(memory.sizes, memory.item_bytes)
        sizes = shard.stored.item.sizes
        self.boxes.append(
            (stored, memory.item_bytes, sizes, part.offsets, part.box.sizes, memory.data_ptr, strides, window)
        )
        self.box_devices.append(memory.device)

    def tables(self) -> list[int]:
        return sorted({row[0] for row in self.rows} | {box[0][0] for box in self.boxes})

    def arguments(self, tables: list[int]) -> tuple[Any, list[Any], Any]:
        """Rows and boxes in which tables are numbered by their place in `tables`, and the devices of both."""
        number = {table: position for position, table in enumerate(tables)}
        rows = np.array(self.rows, dtype=np.uint64).reshape(-1, 8)
        if len(rows):
            rows[:, 0] = np.searchsorted(tables, rows[:, 0])
        boxes = [((number[box[0][0]], *box[0][1:]), *box[1:]) for box in self.boxes]
        if all(device == HOST for devices in (self.row_devices, self.box_devices) for device in devices):
            return rows, boxes, None
        return rows, boxes, (np.array(self.row_devices, np.int32), np.array(self.box_devices, np.int32))

    def finish(self) -> None:
        """Every byte is read: converts what was read into buffers."""
        for target, buffer in self.converted:
            target.copy_(buffer)
