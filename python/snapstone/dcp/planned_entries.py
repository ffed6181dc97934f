"""The entries of DCP's `Metadata` as a planner makes them: a dictionary whose values are built when they are looked at.

A checkpoint of 1,024 ranks has millions of chunks. DCP pickles and broadcasts them at the end of every save, which as
objects takes longer than the planning did, and nearly nobody looks at them.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator, MutableMapping
from dataclasses import fields
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.distributed.checkpoint.metadata import (
    STORAGE_TYPES,
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    TensorStorageMetadata,
)

from ..plan import Ints
from .plan_columns import PropertyFields, deflate, properties_of

__all__ = ["EntryTable", "PlannedEntries", "PlannedMetadata"]


class EntryTable:
    """What the entries are built from, compressed, filled once, then shared by the Metadata of many saves."""

    def __init__(self) -> None:
        self._rows: list[tuple[str, PropertyFields | None, Ints, int]] = []
        self._compressor = zlib.compressobj(1)
        self._parts: list[bytes] = []

    def add_value(self, name: str) -> None:
        self._rows.append((name, None, (), 0))

    def add_tensor(self, name: str, properties: PropertyFields, shape: Ints, boxes: npt.NDArray[np.int64]) -> None:
        """`boxes`: a row per chunk, its offsets, then its sizes."""
        self._rows.append((name, properties, shape, len(boxes)))
        self._parts.append(self._compressor.compress(np.ascontiguousarray(boxes).tobytes()))

    def finish(self) -> tuple[bytes, bytes]:
        """Rows and boxes, for `PlannedEntries`."""
        self._parts.append(self._compressor.flush())
        return deflate(json.dumps(self._rows, separators=(",", ":")).encode("ascii")), b"".join(self._parts)


class PlannedEntries(MutableMapping[str, STORAGE_TYPES]):
    """`Metadata.state_dict_metadata`. Belongs to one Metadata: what its holder changes, no other save sees.

    It pickles as a plain dictionary. A storage writer that keeps no pickle of it sets `compact`, and the compressed
    table is broadcast instead.
    """

    def __init__(self, rows: bytes, boxes: bytes) -> None:
        self.compact = False
        self._rows = rows
        self._boxes = boxes
        self._places: dict[str, tuple[PropertyFields | None, Ints, int, int]] = {}
        self._numbers: npt.NDArray[np.int64] | None = None
        self._entries: dict[str, STORAGE_TYPES | None] | None = None  # a value of None is not built yet

    def _opened(self) -> dict[str, STORAGE_TYPES | None]:
        if self._entries is None:
            at = 0
            for name, properties, shape, count in json.loads(zlib.decompress(self._rows)):
                self._places[name] = (None if properties is None else tuple(properties), tuple(shape), count, at)
                at += count * 2 * len(shape)
            self._numbers = np.frombuffer(zlib.decompress(self._boxes), np.int64)
            self._entries = dict.fromkeys(self._places)
        return self._entries

    def _build(self, name: str) -> STORAGE_TYPES:
        assert self._numbers is not None
        properties, shape, count, at = self._places[name]
        if properties is None:
            return BytesStorageMetadata()
        dimensions = len(shape)
        rows = self._numbers[at : at + count * 2 * dimensions].reshape(count, 2 * dimensions).tolist()
        chunks = [ChunkStorageMetadata(torch.Size(row[:dimensions]), torch.Size(row[dimensions:])) for row in rows]
        return TensorStorageMetadata(properties_of(properties), torch.Size(shape), chunks)

    def __getitem__(self, name: str) -> STORAGE_TYPES:
        entries = self._opened()
        entry = entries[name]
        if entry is None:
            entry = entries[name] = self._build(name)
        return entry

    def __setitem__(self, name: str, entry: STORAGE_TYPES) -> None:
        self._opened()[name] = entry

    def __delitem__(self, name: str) -> None:
        del self._opened()[name]

    def __contains__(self, name: object) -> bool:
        return name in self._opened()

    def __iter__(self) -> Iterator[str]:
        return iter(self._opened())

    def __len__(self) -> int:
        return len(self._opened())

    def __repr__(self) -> str:
        return repr(dict(self))

    def __reduce__(self) -> tuple[Any, ...]:
        if self.compact and self._entries is None:
            return PlannedEntries, (self._rows, self._boxes)
        return dict, (dict(self),)


class PlannedMetadata(Metadata):
    """Metadata with `PlannedEntries`. It pickles as what stock's `.metadata` holds, where no other class has a place;
    it is equal to that, too.
    """

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Metadata) and self._fields() == [getattr(other, field.name) for field in fields(other)]

    __hash__ = None  # type: ignore[assignment]

    def _fields(self) -> list[Any]:
        return [getattr(self, field.name) for field in fields(self)]

    def __reduce__(self) -> tuple[Any, ...]:
        entries, *others = self._fields()
        if isinstance(entries, PlannedEntries) and not entries.compact:
            return Metadata, (dict(entries), *others)
        return PlannedMetadata, (entries, *others)
