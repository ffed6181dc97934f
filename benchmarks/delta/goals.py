"""What delta saves must show, by medians of one run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from results import spread_of

__all__ = ["Goal", "judge_deltas"]

MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Goal:
    """`passed` is None, and `got` "not measured", where the run did not measure it."""

    what: str
    wanted: str
    got: str
    passed: bool | None


def judge_deltas(rows: Sequence[Mapping[str, Any]]) -> list[Goal]:
    row_named = {row["row"]: row for row in rows}

    def seconds(row: str, engine: str, measure: str = "save_seconds") -> float | None:
        spread = spread_of(row_named.get(row), engine, measure)
        return spread.median if spread else None

    some, full, hashing = (seconds("some", engine) for engine in ("delta", "full", "hashing"))
    allowed = 0.15 * full + hashing if full and hashing else None
    return [
        _at_most(
            "delta save, nothing changed, of hashing alone",
            1.3,
            seconds("nothing", "delta"),
            seconds("nothing", "hashing"),
        ),
        _nothing_written(row_named.get("nothing")),
        _at_most("delta save, 5 % changed, of 0.15 full saves and hashing", 1, some, allowed),
        _at_most("delta save, all changed, of a full save", 1.05, seconds("all", "delta"), seconds("all", "full")),
        _at_most(
            "load 10 deltas deep, of a full checkpoint's",
            1 / 0.9,
            seconds("load", "delta", "load_seconds"),
            seconds("load", "full", "load_seconds"),
        ),
    ]


def _at_most(what: str, wanted: float, ours: float | None, reference: float | None) -> Goal:
    if ours is None or reference is None:
        return Goal(what, f"<= {wanted:.3g}x", "not measured", None)
    return Goal(what, f"<= {wanted:.3g}x", f"{ours / reference:.2f}x", ours / reference <= wanted)


def _nothing_written(row: Mapping[str, Any] | None) -> Goal:
    """No payload: the index, the manifest and their digests are all."""
    what, wanted = "delta save, nothing changed, bytes written", "<= 1 MiB"
    spread = spread_of(row, "delta", "written_bytes")
    if spread is None:
        return Goal(what, wanted, "not measured", None)
    return Goal(what, wanted, f"{spread.high / 1e3:.0f} kB", spread.high <= MIB)
