"""The structure of a state: what does not change from save to save while names, shapes, dtypes and placements stay.

Layout and index rows are kept under a key of exactly those facts: a save of a known structure only looks up
addresses.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from . import _native, index, plan, state, tensors
from .derive import Derivation, find_derived
from .index import Place, StoredTensor
from .plan import TensorItem
from .tensors import LocalShard

__all__ = ["Structure", "StructureCache", "StructureKeys", "describe_all", "make_structure", "without_derived"]


@dataclass(slots=True)
class Structure:
    """What does not change from save to save while names, shapes, dtypes and placements stay: layout and index rows."""

    layout: Any
    written: list[int]  # positions in the rank's list of the shards that this rank's index has
    positions: list[int]  # those of them whose bytes are laid out: neither tied to another one nor derived
    contents: list[StoredTensor]  # of the data file: the index rows with chunks
    tensors_json: str
    payload_bytes: int  # of all ranks
    item_bytes: list[int]  # of each shard in the layout: of its dtype if that is floating, else 1
    is_floating: list[int]  # likewise
    owned_chunks: Any = None  # of the layout, bool: those that tell of an optimizer's state; found when first needed


class StructureCache:
    """The last few structures of this process, by the digest of all ranks' items and this rank's number in the group.

    What one rank still knows another may have dropped, having saved other things alone or with other ranks in between:
    a structure is used only when every rank says that it knows it.
    """

    _ENTRIES_MAX = 4

    def __init__(self) -> None:
        self._entries: dict[tuple[int, str], Structure] = {}
        self._lock = threading.Lock()  # saves in flight describe their states on threads of their own
        os.register_at_fork(after_in_child=self._unlock_in_child)

    def _unlock_in_child(self) -> None:
        self._lock = threading.Lock()

    def known(self, rank: int) -> dict[str, Structure]:
        with self._lock:
            return {key: structure for (of_rank, key), structure in self._entries.items() if of_rank == rank}

    def put(self, rank: int, key: str, structure: Structure) -> None:
        with self._lock:
            self._entries.pop((rank, key), None)
            self._entries[rank, key] = structure
            while len(self._entries) > self._ENTRIES_MAX:
                del self._entries[next(iter(self._entries))]


class StructureKeys:
    """The digest of a rank's items, paths and ties; computed again only when one of them differs from the last
    save's.
    """

    def __init__(self) -> None:
        self._last: tuple[Any, str] = ((), "")

    def of(
        self, shards: list[LocalShard], paths: Mapping[str, state.LeafPath], ties: list[int], chunk_bytes: int
    ) -> str:
        items = [shard.item for shard in shards]
        tensor_paths = [paths[item.name] for item in items]
        facts = (items, tensor_paths, ties, chunk_bytes)
        known, key = self._last
        if facts != known:
            key = plan.structure_digest(items, [state.encode_path(path) for path in tensor_paths], ties, chunk_bytes)
            self._last = (facts, key)
        return key


def describe_all(flattened: state.Flattened) -> list[LocalShard]:
    shards: list[LocalShard] = []
    for name, tensor in flattened.tensors.items():
        shards.extend(tensors.describe(name, tensor))
    return shards


def make_structure(
    items: list[TensorItem],
    paths: Mapping[str, state.LeafPath],
    ties: list[int],
    positions: list[int],
    payload_bytes: int,
    chunk_bytes: int,
    derived: Mapping[int, Derivation] | None = None,
) -> Structure:
    """Lays out what this rank writes. Tied shards share one place when the same rank writes both; those of `derived`
    have none.
    """
    derived = derived or {}
    chosen = set(positions) - derived.keys()
    owners = [p for p in positions if p in chosen and (ties[p] not in chosen or ties[p] == p)]
    layout = _native.Layout(np.array([items[position].nbytes for position in owners], dtype=np.uint64), chunk_bytes)
    first, count, at = (column.tolist() for column in layout.places())
    place_of = {position: Place(first[i], count[i], at[i]) for i, position in enumerate(owners)}
    stored = []
    for position in positions:
        item = items[position]
        path = paths[item.name]
        stored_path = None if path == (item.name,) else state.encode_path(path)
        if position in derived:
            stored.append(StoredTensor(item, stored_path, Place(0, 0, 0), *derived[position]))
            continue
        place = place_of.get(position) or place_of[ties[position]]
        stored.append(StoredTensor(item, stored_path, place))
    is_floating = [int(tensors.is_floating(items[position].dtype)) for position in owners]
    item_bytes = [
        tensors.dtype_bytes(items[position].dtype) if floating else 1
        for position, floating in zip(owners, is_floating, strict=True)
    ]
    contents = [one for one in stored if one.place.chunk_count]
    return Structure(
        layout, positions, owners, contents, index.encode_tensors(stored), payload_bytes, item_bytes, is_floating
    )


def without_derived(
    structure: Structure,
    shards: list[LocalShard],
    paths: Mapping[str, state.LeafPath],
    ties: list[int],
    chunk_bytes: int,
) -> tuple[Structure, int]:
    """The structure of the same shards in which those that are others rounded have no bytes, and how many bytes that
    is. The rank's own decision, which its index tells; the state must not change yet.
    """
    derived, nbytes = find_derived(shards, ties, structure.written)
    if not derived:
        return structure, 0
    items = [shard.item for shard in shards]
    positions, payload_bytes = structure.written, structure.payload_bytes
    return make_structure(items, paths, ties, positions, payload_bytes, chunk_bytes, derived), nbytes
