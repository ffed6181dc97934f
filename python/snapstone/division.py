"""Who reads what when ranks load together: chunks that several of them need are divided over readers, in rounds.

Pure functions of what is stored and which parts of it each rank wants; every rank computes the same division.

1. Each chunk gets the set of ranks that want bytes of it. What one rank alone wants it reads alone, outside of the
   rounds (not in a broadcast, where one rank reads everything).
2. Neighbouring chunks with the same set are cut into runs, and each run gets a reader: of the ranks in its set the one
   with the least to read so far.
3. Runs go into rounds, each reader's in the order of the file, so that no node has to hold more than a bucket.
4. A node holds in a round the pieces that its ranks read or want, in an order that makes what one rank sends to one set
   of nodes contiguous on all of them.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from . import _native
from .reads import Part, Window

__all__ = ["Division", "Parcel", "Piece", "divide"]

PIECE_BYTES_MAX = 8 << 20  # so many requests of one reader are in flight at once
_ALIGNMENT = 64


class Piece(NamedTuple):
    """Bytes [begin, end) of the string of a wanted part, which rank `reader` reads from the chunks of `window`."""

    part: int
    begin: int
    end: int
    window: Window
    reader: int
    nodes: tuple[int, ...]  # of the ranks that want it; none when only the reader does

    @property
    def nbytes(self) -> int:
        return self.end - self.begin


class Parcel(NamedTuple):
    """What `reader` has for the nodes of one set: bytes that lie together in the region of each of them."""

    reader: int
    nodes: tuple[int, ...]
    at: dict[int, int]  # node -> place in its region
    nbytes: int


@dataclass(slots=True)
class Round:
    pieces: list[Piece] = field(default_factory=list)
    places: dict[int, dict[int, int]] = field(
        default_factory=dict
    )  # node -> position of a piece -> place in its region
    parcels: list[Parcel] = field(default_factory=list)
    region_bytes: int = 0  # of the fullest node


@dataclass(slots=True)
class Division:
    rounds: list[Round]
    alone: list[list[Window]]  # for each part the chunks that no round covers, for the rank that wants it

    @property
    def region_bytes(self) -> int:
        return max((one.region_bytes for one in self.rounds), default=0)


class _Run(NamedTuple):
    first_chunk: int
    chunk_count: int
    reader: int

    @property
    def end(self) -> int:
        return self.first_chunk + self.chunk_count


def divide(
    parts: Sequence[Part],
    wanted_by: Sequence[frozenset[int]],
    raw_bytes: Callable[[int], Any],
    item_bytes: Sequence[int],
    nodes: Sequence[int],
    *,
    broadcast: bool,
    bucket_bytes: int,
) -> Division:
    """`wanted_by[i]` are the ranks that want `parts[i]`, `item_bytes[i]` its dtype's, `raw_bytes(table)` the sizes of a
    table's chunks, `nodes[rank]` the node of a rank.
    """
    cuts = [_cut(part, raw_bytes(part.shard.table), size) for part, size in zip(parts, item_bytes, strict=True)]
    sets = _RankSets()
    tables: dict[int, Any] = {}
    for part, ranks, cut in zip(parts, wanted_by, cuts, strict=True):
        table = part.shard.table
        wanting = tables.setdefault(table, np.zeros(len(raw_bytes(table)), np.int64))
        first = part.shard.stored.place.first_chunk
        chunks = first + np.flatnonzero(np.diff(cut))
        for number in np.unique(wanting[chunks]).tolist():
            wanting[chunks[wanting[chunks] == number]] = sets.joined(number, ranks)
    readers = _Readers(sets, len(nodes), broadcast)
    for table in sorted(tables):
        readers.count_alone(tables[table], raw_bytes(table))
    piece_bytes = min(PIECE_BYTES_MAX, bucket_bytes)
    runs = {table: readers.runs(tables[table], raw_bytes(table), piece_bytes) for table in sorted(tables)}
    pieces: dict[tuple[int, int], list[Piece]] = {}
    alone: list[list[Window]] = []
    for position, (part, ranks, cut) in enumerate(zip(parts, wanted_by, cuts, strict=True)):
        found, rest = _pieces_of(position, part, cut, runs[part.shard.table])
        alone.append(rest)
        wanted_on = tuple(sorted({nodes[rank] for rank in ranks}))
        for run, piece in found:
            whose = () if ranks == {run.reader} else wanted_on
            pieces.setdefault((part.shard.table, run.first_chunk), []).append(piece._replace(nodes=whose))
    return Division(_rounds(runs, pieces, nodes, bucket_bytes), alone)


def _cut(part: Part, raw_bytes: Any, item_bytes: int) -> Any:
    """Where the chunks of a part's shard cut the part's string: for each chunk where it begins, and the end."""
    stored = part.shard.stored
    first, count, at = stored.place
    ends = np.cumsum(raw_bytes[first : first + count].astype(np.int64)) - at
    positions = np.concatenate(([0], np.minimum(ends, stored.item.nbytes)))
    if part.is_whole:
        return positions
    return _native.bytes_before(item_bytes, stored.item.sizes, part.offsets, part.box.sizes, positions)


class _RankSets:
    """Sets of ranks by number; 0 is the empty one."""

    def __init__(self) -> None:
        self.of: list[frozenset[int]] = [frozenset()]
        self._numbers: dict[frozenset[int], int] = {frozenset(): 0}

    def joined(self, number: int, ranks: frozenset[int]) -> int:
        union = self.of[number] | ranks
        if union not in self._numbers:
            self._numbers[union] = len(self.of)
            self.of.append(union)
        return self._numbers[union]


class _Readers:
    def __init__(self, sets: _RankSets, world_size: int, broadcast: bool) -> None:
        self._sets = sets
        self._broadcast = broadcast
        self._load = [0] * world_size  # bytes to read, by rank

    def count_alone(self, wanting: Any, raw_bytes: Any) -> None:
        for number in np.unique(wanting).tolist():
            if not self._is_shared(number) and number:
                (rank,) = self._sets.of[number]
                self._load[rank] += int(raw_bytes[wanting == number].sum(dtype=np.int64))

    def runs(self, wanting: Any, raw_bytes: Any, piece_bytes: int) -> list[_Run]:
        """In the order of chunks."""
        borders = np.concatenate(([0], np.flatnonzero(np.diff(wanting)) + 1, [len(wanting)])).tolist()
        before = np.concatenate(([0], np.cumsum(raw_bytes, dtype=np.int64)))
        runs = []
        for begin, end in pairwise(borders):
            number = int(wanting[begin]) if end > begin else 0
            if not self._is_shared(number):
                continue
            while begin < end:
                reach = int(np.searchsorted(before, before[begin] + piece_bytes, side="right")) - 1
                stop = min(end, max(begin + 1, reach))
                runs.append(_Run(begin, stop - begin, self._take(number, int(before[stop] - before[begin]))))
                begin = stop
        return runs

    def _is_shared(self, number: int) -> bool:
        return len(self._sets.of[number]) > 1 or (self._broadcast and number != 0)

    def _take(self, number: int, nbytes: int) -> int:
        reader = 0 if self._broadcast else min(self._sets.of[number], key=lambda rank: (self._load[rank], rank))
        self._load[reader] += nbytes
        return reader


def _pieces_of(position: int, part: Part, cut: Any, runs: list[_Run]) -> tuple[list[tuple[_Run, Piece]], list[Window]]:
    """The part's pieces in the runs of its table, and its chunks in between."""
    first = part.shard.stored.place.first_chunk
    last = first + len(cut) - 1
    found = []
    rest: list[Window] = []
    at = first
    for position_of_run in range(bisect_right(runs, first, key=lambda run: run.end), len(runs)):
        run = runs[position_of_run]
        if run.first_chunk >= last:
            break
        begin, end = max(run.first_chunk, first), min(run.end, last)
        if begin > at:
            rest.append((at, begin - at))
        at = end
        if cut[end - first] > cut[begin - first]:
            place = int(cut[begin - first]), int(cut[end - first])
            found.append((run, Piece(position, *place, (begin, end - begin), run.reader, ())))
    if at < last:
        rest.append((at, last - at))
    return found, rest


def _rounds(
    runs: dict[int, list[_Run]], pieces: dict[tuple[int, int], list[Piece]], nodes: Sequence[int], bucket_bytes: int
) -> list[Round]:
    turns = [0] * len(nodes)
    order = []
    for table, of_table in runs.items():
        for run in of_table:
            order.append((turns[run.reader], run.reader, table, run.first_chunk))
            turns[run.reader] += 1
    rounds: list[Round] = []
    used: dict[int, int] = {}
    for _, _, table, first in sorted(order):
        wanted = pieces.get((table, first), [])
        cost: dict[int, int] = {}
        for piece in wanted:
            for node in _holders(piece, nodes):
                cost[node] = cost.get(node, 0) + _aligned(piece.nbytes)
        if not rounds or any(used.get(node, 0) + nbytes > bucket_bytes for node, nbytes in cost.items()):
            rounds.append(Round())
            used = {}
        for node, nbytes in cost.items():
            used[node] = used.get(node, 0) + nbytes
        rounds[-1].pieces += wanted
    for one in rounds:
        _lay_out(one, nodes)
    return rounds


def _lay_out(one: Round, nodes: Sequence[int]) -> None:
    one.pieces.sort(key=lambda piece: (piece.reader, piece.nodes))
    used: dict[int, int] = {}
    key: tuple[int, tuple[int, ...]] | None = None
    for position, piece in enumerate(one.pieces):
        holders = _holders(piece, nodes)
        if not holders:
            continue
        nbytes = _aligned(piece.nbytes)
        if key != (piece.reader, piece.nodes):
            key = piece.reader, piece.nodes
            one.parcels.append(Parcel(*key, {node: used.get(node, 0) for node in holders}, 0))
        one.parcels[-1] = one.parcels[-1]._replace(nbytes=one.parcels[-1].nbytes + nbytes)
        for node in holders:
            one.places.setdefault(node, {})[position] = used.get(node, 0)
            used[node] = used.get(node, 0) + nbytes
    one.region_bytes = max(used.values(), default=0)


def _holders(piece: Piece, nodes: Sequence[int]) -> list[int]:
    """The nodes in whose regions a piece has a place."""
    return sorted({nodes[piece.reader], *piece.nodes}) if piece.nodes else []


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT
