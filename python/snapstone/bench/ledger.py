"""From the steps of all ranks to a stall and its ledger: pure functions.

    wall   = sum over steps of the slowest rank's seconds, the drain being the last step
    stall  = (wall with k saves - wall without) / k

Ranks wait for each other in every step, so the delay of one shows as waiting on the others. The parts of a step are
therefore those of the rank that spent most time in parts; what the step took beyond them and beyond the median step
without saves is inflation while a save is in flight. What is left over is "unexplained": noise of the steps without a
save in flight, and anything the ledger has no row for. The rows of a pair add up to its stall.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from .loop import Block
from .results import LEDGER_ROWS, Cadence, Ledger, Spread, Step

__all__ = ["Pair", "cadence_of", "pair_of", "spread_of", "strip_of", "walls_of"]

_PARTS = ("call", "wait_previous", "fence", "finalize")


@dataclass(frozen=True, slots=True)
class Pair:
    """One A/B pair; seconds per save."""

    stall: float
    rows: dict[str, float]  # by the names of LEDGER_ROWS
    durable_seconds: list[float]  # of each save, on the rank that was last
    skipped: int


def walls_of(ranks: Sequence[Block]) -> list[float]:
    """Seconds of each step on its slowest rank."""
    return [max(step.total for step in steps) for steps in zip(*(block.steps for block in ranks), strict=True)]


def pair_of(without: Sequence[Block], saving: Sequence[Block], saves: int) -> Pair:
    """The blocks of all ranks without saves and with `saves` of them. ValueError when ranks differ in steps."""
    baseline = statistics.median(walls_of(without))
    totals = dict.fromkeys((*_PARTS, "inflation"), 0.0)
    for steps in zip(*(block.steps for block in saving), strict=True):
        wall = max(step.total for step in steps)
        blamed = max(steps, key=lambda step: step.parts)
        for name in _PARTS:
            totals[name] += getattr(blamed, name)
        if blamed.drain:
            totals["finalize"] += wall - blamed.parts
        elif any(step.in_flight for step in steps):
            totals["inflation"] += wall - blamed.parts - baseline
    stall = (sum(walls_of(saving)) - sum(walls_of(without))) / saves
    rows = {name: total / saves for name, total in totals.items()}
    rows["unexplained"] = stall - sum(rows.values())
    durable = [max(times) for times in zip(*(block.durable_seconds for block in saving), strict=True)]
    return Pair(stall, rows, durable, max(block.skipped for block in saving))


def cadence_of(name: str, interval: int, pairs: Sequence[Pair]) -> Cadence:
    """The entry of a result document."""
    columns = {row: [pair.rows[row] for pair in pairs] for row in LEDGER_ROWS}
    ledger: Ledger = {
        "call": columns["call"],
        "wait_previous": columns["wait_previous"],
        "fence": columns["fence"],
        "finalize": columns["finalize"],
        "inflation": columns["inflation"],
        "unexplained": columns["unexplained"],
    }
    return {
        "name": "tight" if name == "tight" else "relaxed",
        "interval_steps": interval,
        "stall_seconds": [pair.stall for pair in pairs],
        "ledger": ledger,
        "durable_seconds": [seconds for pair in pairs for seconds in pair.durable_seconds],
        "skipped": sum(pair.skipped for pair in pairs),
    }


def strip_of(without: Sequence[Block], saving: Sequence[Block]) -> list[Step]:
    """The steps of one pair in the order they ran, for a chart."""
    strip: list[Step] = []
    for ranks in (without, saving):
        strip.extend(
            {
                "seconds": max(step.total for step in steps),
                "saving": any(step.saving for step in steps),
                "in_flight": any(step.in_flight or step.drain for step in steps),
            }
            for steps in zip(*(block.steps for block in ranks), strict=True)
        )
    return strip


def spread_of(samples: Sequence[float]) -> Spread:
    return {"median": statistics.median(samples), "low": min(samples), "high": max(samples)}
