"""Counts and failures of a run of seeds; a module of its own, so that worker processes find it."""

from __future__ import annotations

import os
from collections import Counter
from typing import Any

os.environ.setdefault("SNAPSTONE_STATUS_DIR", "")  # no page of saves that never were

from simulation.history import play

__all__ = ["batch", "nothing"]


def nothing() -> dict[str, Any]:
    return {"failed": {}, **{name: Counter() for name in ("operations", "faults", "ranks", "ends")}}


def batch(first: int, count: int) -> dict[str, Any]:
    found = nothing()
    for seed in range(first, first + count):
        played = play(seed)
        scenario = played.scenario
        found["operations"][scenario.operation] += 1
        found["ranks"][str(scenario.world_size)] += 1
        found["faults"].update(fault.kind for fault in scenario.faults if fault.fired)
        for ended in played.ended.values():
            found["ends"]["success" if ended.error is None else type(ended.error).__name__] += 1
        if played.problems:
            found["failed"][seed] = [str(scenario), *played.problems]
    return found
