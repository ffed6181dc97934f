"""What the rows must show: the fastest of snapstone's contenders against the fastest of the others, by medians."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from results import spread_of

__all__ = ["Comparison", "compare", "counted_bytes"]


class _Goal(NamedTuple):
    row: str
    what: str
    unit: Literal["seconds", "bytes"]
    sample: str  # by which the contenders are chosen
    wanted: float | None
    at_most: bool = False  # ours over theirs, instead of theirs over ours


_GOALS = (
    _Goal("save", "dcp.save", "seconds", "save_seconds", 1.8),
    _Goal("async-thread", "dcp.async_save in a thread, to durable", "seconds", "save_seconds", 2.5),
    _Goal("async-process", "dcp.async_save in a process, to durable", "seconds", "save_seconds", 2.5),
    _Goal("load-same", "dcp.load, 4 ranks, same shards", "seconds", "load_seconds", None),
    _Goal("load-rows", "dcp.load, 4 ranks to 2, row shards", "seconds", "load_seconds", 3),
    _Goal("load-columns", "dcp.load, 4 ranks to 2, rows to columns", "seconds", "load_seconds", 3),
    _Goal("load-columns", "dcp.load, rows to columns, bytes read", "bytes", "load_seconds", 2),
    _Goal("read-once", "4 ranks load a replica, of one alone", "seconds", "load_seconds", 1.5, at_most=True),
)


@dataclass(frozen=True, slots=True)
class Comparison:
    """`ours` and `theirs`: label and median of the contenders compared, None where there is none."""

    what: str
    unit: Literal["seconds", "bytes"]
    wanted: float | None
    at_most: bool
    ours: tuple[str, float] | None
    theirs: tuple[str, float] | None

    @property
    def ratio(self) -> float | None:
        if self.ours is None or self.theirs is None:
            return None
        return self.ours[1] / self.theirs[1] if self.at_most else self.theirs[1] / self.ours[1]

    @property
    def passed(self) -> bool | None:
        """None: nothing is wanted, or this run did not measure it."""
        if self.ratio is None or self.wanted is None:
            return None
        return self.ratio <= self.wanted if self.at_most else self.ratio >= self.wanted

    @property
    def wanted_text(self) -> str:
        return "-" if self.wanted is None else f"{'<=' if self.at_most else '>='} {self.wanted:g}x"

    @property
    def got_text(self) -> str:
        return "not measured" if self.ratio is None else f"{self.ratio:.2f}x"


def compare(rows: Sequence[Mapping[str, Any]]) -> list[Comparison]:
    """Every goal, of the rows of a result."""
    row_named = {row["row"]: row for row in rows}
    return [_comparison(goal, row_named.get(goal.row)) for goal in _GOALS]


def _comparison(goal: _Goal, row: Mapping[str, Any] | None) -> Comparison:
    ours, theirs = (_fastest(row, role, goal.sample) if row else None for role in ("ours", "reference"))
    sides = [_side(row, name, goal) if row and name else None for name in (ours, theirs)]
    return Comparison(goal.what, goal.unit, goal.wanted, goal.at_most, sides[0], sides[1])


def _side(row: Mapping[str, Any], name: str, goal: _Goal) -> tuple[str, float] | None:
    label = row["engines"][name]["label"]
    if goal.unit == "bytes":
        nbytes = counted_bytes(row, name)
        return (label, nbytes) if nbytes else None
    spread = spread_of(row, name, goal.sample)
    return (label, spread.median) if spread else None


def _fastest(row: Mapping[str, Any], role: str, sample: str) -> str | None:
    names: Iterable[str] = (name for name, entry in row["engines"].items() if entry["role"] == role)
    medians = {name: spread.median for name in names if (spread := spread_of(row, name, sample)) is not None}
    return min(medians, key=lambda name: medians[name]) if medians else None


def counted_bytes(row: Mapping[str, Any], name: str) -> float | None:
    """The median of what all ranks together read from storage in one load; None where it was not counted."""
    counter = row["engines"][name]["bytes_counted_by"]
    spread = spread_of(row, name, counter) if counter else None
    return spread.median if spread else None
