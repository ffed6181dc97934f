"""Which shards a checkpoint has, by tensor: as a listing of parsed indexes, or as a catalog of columns.

A `Listing` holds an object per shard. A `Catalog` is for checkpoints of many writers that ranks open together: writers
of the same tensors, as under FSDP, share one block of names, and the boxes and places of all their shards are one array
of integers. Ranks exchange columns instead of index files, and make objects only of the shards that they touch.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np

from . import tensors
from .errors import CorruptCheckpointError
from .index import MASTER_DTYPE, Index, Place, StoredTensor
from .plan import Box, Ints, TensorItem
from .reads import SavedShard

__all__ = ["KEY_BYTES", "Catalog", "Columns", "Listing"]

KEY_BYTES = 16
_PLACE_WIDTH = 3


class Listing(Mapping[str, list[SavedShard]]):
    """Of indexes that are parsed whole.

    Raises CorruptCheckpointError when indexes disagree on a tensor.
    """

    def __init__(self, path: str, indexes: Sequence[Index]) -> None:
        self._of: dict[str, list[SavedShard]] = {}
        self.paths: dict[str, Any] = {}  # as stored; None when it is just the name
        self._indexes = indexes
        for table, parsed in enumerate(indexes):
            for stored in parsed.tensors:
                item = stored.item
                others = self._of.setdefault(item.name, [])
                if others and (others[0].stored.item.dtype, others[0].stored.item.shape) != (item.dtype, item.shape):
                    raise _disagreement(path, item.name, parsed.rank)
                others.append(SavedShard(table, stored))
                self.paths.setdefault(item.name, stored.path)
        self.has_derived = False
        for parsed in indexes:
            for item, _, _, master, _ in parsed.tensors:
                if master is not None:
                    self.has_derived = True
                    found = self._of[master][0].stored.item if master in self._of else None
                    _check_master(path, item.name, item.shape, master, found)

    def __iter__(self) -> Iterator[str]:
        return iter(self._of)

    def __len__(self) -> int:
        return len(self._of)

    def __contains__(self, name: object) -> bool:
        return name in self._of

    def __getitem__(self, name: str) -> list[SavedShard]:
        return self._of[name]

    def first(self, name: str) -> SavedShard:
        return self._of[name][0]

    def describe(self, name: str) -> TensorItem:
        """dtype and global shape (offsets and sizes are those of some shard)."""
        return self._of[name][0].stored.item

    def near(self, name: str, wanted: Box) -> list[SavedShard]:
        """At least the shards that overlap a box."""
        return self._of[name]

    def tensor_of(self, table: int, chunk: int) -> str | None:
        for stored in self._indexes[table].tensors:
            if stored.place.first_chunk <= chunk < stored.place.first_chunk + stored.place.chunk_count:
                return stored.item.name
        return None


@dataclass(frozen=True, slots=True)
class Columns:
    """The tensors of one index. `block` is JSON of what writers of the same tensors have in common, name, dtype, shape,
    path and master of each; `key` is its digest. `numbers` (int64) has for each first_chunk, chunk_count, at, offsets,
    sizes.
    """

    key: bytes
    block: str
    numbers: Any

    @classmethod
    def of(cls, parsed: Index) -> Columns:
        rows = [(item.name, item.dtype, item.shape, path, master) for item, path, _, master, _ in parsed.tensors]
        numbers = [
            number
            for item, _, place, _, _ in parsed.tensors
            for part in (place, item.offsets, item.sizes)
            for number in part
        ]
        block = json.dumps(rows, separators=(",", ":"))
        key = hashlib.blake2b(block.encode(), digest_size=KEY_BYTES).digest()
        return cls(key, block, np.array(numbers, dtype=np.int64))


class _Block:
    """Writers with the same tensors: one row of numbers each."""

    def __init__(self, block: str, tables: Sequence[int], rows: Sequence[Any]) -> None:
        self.rows: list[Any] = json.loads(block)
        self.tables = list(tables)
        self.numbers = np.stack(rows) if rows else np.empty((0, 0), np.int64)
        widths = [_PLACE_WIDTH + 2 * len(shape) for _, _, shape, _, _ in self.rows]
        self.starts = [0, *accumulate(widths)]

    def overlapping(self, position: int, wanted: Box) -> list[SavedShard]:
        numbers, rank = self._columns(position)
        if not rank:
            return self.shards(position, range(len(self.tables)))
        offsets, sizes = numbers[:, _PLACE_WIDTH : _PLACE_WIDTH + rank], numbers[:, _PLACE_WIDTH + rank :]
        begin, end = np.array(wanted.offsets), np.add(wanted.offsets, wanted.sizes)
        overlap = (offsets < end) & (begin < offsets + sizes)
        return self.shards(position, np.flatnonzero(overlap.all(axis=1)).tolist())

    def shards(self, position: int, writers: Iterable[int]) -> list[SavedShard]:
        name, dtype, shape, path, master = self.rows[position]
        numbers, rank = self._columns(position)
        shards = []
        for writer in writers:
            row = numbers[writer].tolist()
            offsets, sizes = tuple(row[_PLACE_WIDTH : _PLACE_WIDTH + rank]), tuple(row[_PLACE_WIDTH + rank :])
            nbytes = math.prod(sizes) * tensors.dtype_bytes(dtype)
            item = TensorItem(name, dtype, tuple(shape), offsets, sizes, nbytes)
            place = Place(*row[:_PLACE_WIDTH])
            shards.append(SavedShard(self.tables[writer], StoredTensor(item, path, place, master)))
        return shards

    def _columns(self, position: int) -> tuple[Any, int]:
        """Numbers of one tensor, a row for each writer, and its number of dimensions."""
        numbers = self.numbers[:, self.starts[position] : self.starts[position + 1]]
        return numbers, len(self.rows[position][2])


class Catalog(Mapping[str, list[SavedShard]]):
    """The interface of a `Listing` over the columns of all indexes, in the order of the manifest's writers."""

    def __init__(self, path: str, columns: Sequence[Columns]) -> None:
        tables: dict[bytes, list[int]] = {}
        for table, one in enumerate(columns):
            tables.setdefault(one.key, []).append(table)
        self._blocks = [
            _Block(columns[of[0]].block, of, [columns[table].numbers for table in of]) for of in tables.values()
        ]
        self._of: dict[str, list[tuple[_Block, int]]] = {}
        self.paths: dict[str, Any] = {}
        for block in self._blocks:
            for position, (name, dtype, shape, stored_path, _) in enumerate(block.rows):
                others = self._of.setdefault(name, [])
                if others and others[0][0].rows[others[0][1]][1:3] != [dtype, shape]:
                    raise _disagreement(path, name, block.tables[0])
                others.append((block, position))
                self.paths.setdefault(name, stored_path)
        self.has_derived = False
        for block in self._blocks:
            for name, _, shape, _, master in block.rows:
                if master is not None:
                    self.has_derived = True
                    _check_master(path, name, tuple(shape), master, self.describe(master) if master in self else None)

    def __iter__(self) -> Iterator[str]:
        return iter(self._of)

    def __len__(self) -> int:
        return len(self._of)

    def __contains__(self, name: object) -> bool:
        return name in self._of

    def __getitem__(self, name: str) -> list[SavedShard]:
        every = ((block, position, range(len(block.tables))) for block, position in self._of[name])
        return [shard for block, position, writers in every for shard in block.shards(position, writers)]

    def first(self, name: str) -> SavedShard:
        block, position = self._of[name][0]
        return block.shards(position, [0])[0]

    def describe(self, name: str) -> TensorItem:
        block, position = self._of[name][0]
        _, dtype, shape, _, _ = block.rows[position]
        return TensorItem(name, dtype, tuple(shape), (0,) * len(shape), tuple(shape), 0)

    def near(self, name: str, wanted: Box) -> list[SavedShard]:
        return [shard for block, position in self._of[name] for shard in block.overlapping(position, wanted)]

    def tensor_of(self, table: int, chunk: int) -> str | None:
        for block in self._blocks:
            if table in block.tables:
                row = block.numbers[block.tables.index(table)]
                for (name, *_), start in zip(block.rows, block.starts, strict=False):
                    if row[start] <= chunk < row[start] + row[start + 1]:
                        return str(name)
        return None


def _disagreement(path: str, name: str, rank: int) -> CorruptCheckpointError:
    return CorruptCheckpointError("shards disagree on dtype or shape", path=path, tensor=name, rank=rank)


def _check_master(path: str, name: str, shape: Ints, master: str, found: TensorItem | None) -> None:
    """Raises CorruptCheckpointError unless the tensor that `name` is derived from can be it. No tensor of its dtype is
    derived itself.
    """
    if found is None or (found.dtype, found.shape) != (MASTER_DTYPE, shape):
        what = "not in the checkpoint" if found is None else f"{found.dtype}{list(found.shape)}"
        raise CorruptCheckpointError(
            f"derived from {master[:80]!r}, which is {what}, not {MASTER_DTYPE}{list(shape)}", path=path, tensor=name
        )
