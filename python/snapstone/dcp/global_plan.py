"""Who writes what, from the plans of all ranks: every shard once, bytes spread evenly, every tensor covered.

Works tensor by tensor on arrays with a row per rank. Three million shards (1,024 ranks of 3,000 tensors) take seconds.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import cast

import numpy as np
import numpy.typing as npt
from torch.distributed.checkpoint.metadata import STORAGE_TYPES

from .. import plan
from ..errors import IncompatibleCheckpointError
from ..plan import Ints, TensorItem
from .plan_columns import Description, ItemRow, PlanColumns, PropertyFields, dtype_of
from .planned_entries import EntryTable, PlannedEntries, PlannedMetadata

__all__ = ["GlobalPlan", "PlanKey"]

Array = npt.NDArray[np.int64]
PlanKey = tuple[tuple[bytes, ...], bool]  # the digest of each rank's plan, in rank order; `lowest_rank`

# Up to this size an item costs its entry, not its bytes: those that the same ranks hold stay together, in groups that
# are small beside what a rank writes.
TINY_BYTES = 1 << 10
GROUP_BYTES = 64 << 10


@dataclass(frozen=True, slots=True)
class GlobalPlan:
    """The decision for one set of local plans, which it is a function of: any coordinator comes to the same."""

    key: PlanKey
    columns: dict[bytes, PlanColumns]  # by digest
    masks: list[bytes | None]  # for each rank the items that it writes, a bit each; None for all
    entries: tuple[bytes, bytes]
    paths: dict[str, tuple[str | int, ...]] | None

    @classmethod
    def of(cls, ranks: Sequence[PlanColumns], *, lowest_rank: bool) -> GlobalPlan:
        """`lowest_rank`: the lowest rank that holds a shard writes it, instead of the one with the fewest bytes.

        Raises:
            IncompatibleCheckpointError: ranks disagree on a name, or shards overlap or leave a hole. Of a rank that
                saves alone holes are no error, since others may save what is missing.
        """
        planning = _Planning(ranks, lowest_rank)
        for name, places in planning.places.items():
            planning.take(name, places)
        planning.spread_shared()
        key = (tuple(columns.digest for columns in ranks), lowest_rank)
        return cls(
            key, {one.digest: one for one in ranks}, planning.masks(), planning.table.finish(), planning.merged_paths()
        )

    def metadata(self) -> PlannedMetadata:
        """A new one for each save: storage writers and callers change it."""
        entries = cast(dict[str, STORAGE_TYPES], PlannedEntries(*self.entries))  # DCP reads it as a mapping only
        return PlannedMetadata(entries, planner_data=None if self.paths is None else dict(self.paths))


@dataclass(frozen=True, slots=True)
class _Stage:
    """Ranks with the same description. `boxes` has a row per rank, `first` the number of its first item."""

    description: Description
    ranks: Array
    first: Array
    boxes: Array


@dataclass(frozen=True, slots=True)
class _Place:
    """An item of a stage."""

    stage: _Stage
    row: ItemRow
    position: int

    @property
    def items(self) -> Array:
        """The item's number on each rank of the stage, counted through the items of all ranks."""
        return self.stage.first + self.position

    @property
    def boxes(self) -> Array:
        return self.stage.boxes[:, self.row.column : self.row.column + 2 * len(self.row.shape)]


@dataclass(slots=True)
class _Planning:
    """The work on one `GlobalPlan`."""

    columns: Sequence[PlanColumns]
    lowest_rank: bool
    stages: list[_Stage] = field(init=False)
    places: dict[str, list[_Place]] = field(init=False)
    starts: Array = field(init=False)  # number of each rank's first item, and of all
    written: npt.NDArray[np.bool_] = field(init=False)  # of all ranks' items
    load: Array = field(init=False)  # bytes that each rank writes because no other holds them
    shared: list[tuple[int, Array, Array]] = field(default_factory=list)  # nbytes, ranks ascending, their item numbers
    table: EntryTable = field(default_factory=EntryTable)

    def __post_init__(self) -> None:
        members: dict[bytes, list[int]] = {}
        for rank, columns in enumerate(self.columns):
            members.setdefault(columns.description, []).append(rank)
        descriptions = {encoded: Description.of(encoded) for encoded in members}
        counts = [len(descriptions[columns.description].rows) for columns in self.columns]
        self.starts = np.concatenate(([0], np.cumsum(counts, dtype=np.int64)))
        self.written = np.ones(int(self.starts[-1]), bool)
        self.load = np.zeros(len(self.columns), np.int64)
        self.stages = []
        self.places = {}
        for encoded, ranks in members.items():
            description = descriptions[encoded]
            boxes = np.empty((len(ranks), description.width), np.int64)
            for row, rank in enumerate(ranks):
                boxes[row] = self.columns[rank].read_boxes()
            stage = _Stage(description, np.array(ranks), self.starts[ranks], boxes)
            self.stages.append(stage)
            for position, item in enumerate(description.rows):
                self.places.setdefault(item.name, []).append(_Place(stage, item, position))

    def take(self, name: str, places: list[_Place]) -> None:
        first = places[0]
        for place in places:
            self._agree(first, place)
        ranks = np.concatenate([place.stage.ranks for place in places])
        items = np.concatenate([place.items for place in places])
        order = np.argsort(ranks, kind="stable")
        ranks, items = ranks[order], items[order]
        fields = first.row.properties
        if fields is None:  # what it would store differs from rank to rank, perhaps
            self.written[items[1:]] = False
            self.table.add_value(name)
            return
        boxes = np.concatenate([place.boxes for place in places])[order]
        boxes = self._take_shards(name, first.row.shape, dtype_of(fields).itemsize, ranks, items, boxes)
        _check_cover(name, fields, first.row.shape, boxes, holes=len(self.columns) == 1)
        self.table.add_tensor(name, fields, first.row.shape, boxes)

    def _agree(self, first: _Place, place: _Place) -> None:
        expected, found = _kind(first.row), _kind(place.row)
        if expected != found:
            raise IncompatibleCheckpointError(
                f"ranks {first.stage.ranks[0]} and {place.stage.ranks[0]} disagree: {expected} and {found}; give "
                "rank-local values rank-specific names",
                tensor=place.row.name,
                rank=int(place.stage.ranks[0]),
            )

    def _take_shards(self, name: str, shape: Ints, item_bytes: int, ranks: Array, items: Array, boxes: Array) -> Array:
        """Decides on the shards of one tensor; returns the distinct boxes, in order of their offsets."""
        dimensions = len(shape)
        if dimensions:
            order = np.lexsort(boxes.T[::-1])  # stable: ranks stay ascending among equal boxes
            ranks, items, boxes = ranks[order], items[order], boxes[order]
        differs = boxes[1:] != boxes[:-1]
        is_first = np.concatenate(([True], differs.any(axis=1)))
        # Storage knows a shard by its offsets. An empty one, as uneven sharding leaves it, must not take the place of
        # one with bytes; it sorts before them. Two that have bytes overlap, which is found later.
        same_offsets = is_first[1:] & ~differs[:, :dimensions].any(axis=1)
        begins = np.flatnonzero(is_first)
        nbytes = boxes[begins, dimensions:].prod(axis=1) * item_bytes
        dropped = np.zeros(len(begins), bool)
        if same_offsets.any():
            runs = np.flatnonzero(np.concatenate(([True], ~same_offsets[begins[1:] - 1])))
            for begin, end in zip(runs, [*runs[1:], len(begins)], strict=True):
                keep = np.flatnonzero(nbytes[begin:end]) if nbytes[begin:end].any() else np.array([0])
                dropped[begin:end] = True
                dropped[begin + keep] = False
        ends = np.append(begins[1:], len(items))
        alone = (ends - begins == 1) & ~dropped
        np.add.at(self.load, ranks[begins[alone]], nbytes[alone])
        for index in np.flatnonzero(~alone).tolist():
            holders = slice(begins[index], ends[index])
            self.written[items[holders]] = False
            if not dropped[index]:
                self.shared.append((int(nbytes[index]), ranks[holders], items[holders]))
        kept: Array = boxes[begins[~dropped]]
        return kept

    def spread_shared(self) -> None:
        """Decides who writes what several ranks hold."""
        if self.lowest_rank:
            for _, _, items in self.shared:
                self.written[items[0]] = True
            return
        units = _grouped(self.shared)
        load = self.load.tolist()
        writers = plan.spread([(nbytes, shards[0][0].tolist()) for nbytes, shards in units], load)
        for writer, (_, shards) in zip(writers, units, strict=True):
            for ranks, items in shards:
                self.written[items[np.searchsorted(ranks, writer)]] = True

    def masks(self) -> list[bytes | None]:
        parts = [self.written[begin:end] for begin, end in zip(self.starts[:-1], self.starts[1:], strict=True)]
        return [None if part.all() else np.packbits(part).tobytes() for part in parts]

    def merged_paths(self) -> dict[str, tuple[str | int, ...]] | None:
        known = [stage.description.paths for stage in self.stages if stage.description.paths is not None]
        return {name: path for paths in reversed(known) for name, path in paths.items()} if known else None


def _kind(row: ItemRow) -> str:
    return "a Python value" if row.properties is None else f"{row.properties[0]}{list(row.shape)}"


def _grouped(shared: list[tuple[int, Array, Array]]) -> list[tuple[int, list[tuple[Array, Array]]]]:
    """What one rank writes as a whole: bytes, and the shards (ranks that hold it, item numbers)."""
    units: list[tuple[int, list[tuple[Array, Array]]]] = []
    tiny: defaultdict[bytes, list[tuple[int, Array, Array]]] = defaultdict(list)
    for nbytes, ranks, items in shared:
        if nbytes > TINY_BYTES:
            units.append((nbytes, [(ranks, items)]))
        else:
            tiny[ranks.tobytes()].append((nbytes, ranks, items))
    for group in tiny.values():
        total, shards = 0, list[tuple[Array, Array]]()
        for nbytes, ranks, items in group:
            if total + nbytes > GROUP_BYTES:
                units.append((total, shards))
                total, shards = 0, []
            total += nbytes
            shards.append((ranks, items))
        units.append((total, shards))
    return units


def _check_cover(name: str, fields: PropertyFields, shape: Ints, boxes: Array, *, holes: bool) -> None:
    boxes = boxes[boxes[:, len(shape) :].all(axis=1)]
    if not _is_grid(shape, boxes):
        dimensions = len(shape)
        rows = boxes.tolist()
        plan.check_tiling(
            [TensorItem(name, fields[0], shape, tuple(row[:dimensions]), tuple(row[dimensions:]), 0) for row in rows]
            or [TensorItem(name, fields[0], shape, (0,) * dimensions, (0,) * dimensions, 0)],
            holes=holes,
        )


def _is_grid(shape: Ints, boxes: Array) -> bool:
    """Whether distinct boxes are all the cells of a grid on the tensor, as a mesh cuts it: those tile."""
    cells = 1
    for dimension, extent in enumerate(shape):
        offsets, firsts, cell = np.unique(boxes[:, dimension], return_index=True, return_inverse=True)
        lengths = boxes[:, len(shape) + dimension]
        sizes = lengths[firsts]
        ends = offsets + sizes
        if not len(offsets) or offsets[0] != 0 or ends[-1] != extent:
            return False
        if (offsets[1:] != ends[:-1]).any() or (sizes[cell] != lengths).any():
            return False
        cells *= len(offsets)
    return len(boxes) == cells
