"""A run's JSON: its medians, and finding the newest one.

Its shape: theme, date, command, snapstone, machine{}, scenarios[{state, place, ..., engines{name: {label, skipped,
verified, samples{measure: [seconds]}}}}], dcp[{row, title, ..., engines{name: {as above, storage, role}}}],
delta[{like dcp}], micro[{}], targets[{what, wanted, got, passed}].
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["Spread", "newest", "scenario_of", "spread_of"]

THEME = "speed"
DIRECTORY = Path(__file__).resolve().parent / "results"


@dataclass(frozen=True, slots=True)
class Spread:
    median: float
    low: float
    high: float

    @classmethod
    def of(cls, samples: list[float]) -> Spread | None:
        return cls(statistics.median(samples), min(samples), max(samples)) if samples else None


def scenario_of(document: Mapping[str, Any], state: str, place: str) -> Mapping[str, Any] | None:
    for scenario in document["scenarios"]:
        if (scenario["state"], scenario["place"]) == (state, place):
            return dict(scenario)
    return None


def spread_of(scenario: Mapping[str, Any] | None, engine: str, measure: str) -> Spread | None:
    """None where the engine was not run, was left out or does not have the measure."""
    entry = scenario["engines"].get(engine) if scenario else None
    if entry is None or entry["skipped"] is not None:
        return None
    return Spread.of(entry["samples"].get(measure, []))


def newest(directory: Path = DIRECTORY) -> Path:
    """The latest full run; quick and partial ones have other themes."""
    found = sorted(directory.glob(f"{THEME}_*.json"), key=lambda path: json.loads(path.read_text())["date"])
    if not found:
        raise FileNotFoundError(f"no {THEME}_*.json in {directory.name}/: run `make bench` first")
    return found[-1]
