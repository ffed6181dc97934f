"""What a run must show, and whether this one did. Ratios are of medians of the same run."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from delta.goals import judge_deltas
from drop_in.comparisons import compare
from results import scenario_of, spread_of

__all__ = ["Verdict", "best_dcp", "judge", "speedup"]

BEST_DCP = ("dcp", "dcp-2")
FENCE_CALL_SECONDS_MAX = 1e-3
BUDGET_SLACK = 1.05


@dataclass(frozen=True, slots=True)
class Verdict:
    what: str
    wanted: str
    got: str
    passed: bool | None  # None: this run did not measure it

    def to_json(self) -> dict[str, Any]:
        return {"what": self.what, "wanted": self.wanted, "got": self.got, "passed": self.passed}


def best_dcp(scenario: Mapping[str, Any] | None, measure: str) -> float | None:
    """The median of the faster of DCP's thread counts."""
    medians = [spread.median for name in BEST_DCP if (spread := spread_of(scenario, name, measure)) is not None]
    return min(medians) if medians else None


def speedup(seconds: float | None, reference_seconds: float | None) -> float | None:
    return reference_seconds / seconds if seconds and reference_seconds else None


def _median(scenario: Mapping[str, Any] | None, engine: str, measure: str) -> float | None:
    spread = spread_of(scenario, engine, measure)
    return spread.median if spread else None


def _at_least(what: str, wanted: float, ratio: float | None) -> Verdict:
    got = "not measured" if ratio is None else f"{ratio:.2f}x"
    return Verdict(what, f">= {wanted:g}x", got, None if ratio is None else ratio >= wanted)


def _at_most(what: str, wanted: float, ratio: float | None) -> Verdict:
    got = "not measured" if ratio is None else f"{ratio:.2f}x"
    return Verdict(what, f"<= {wanted:g}x", got, None if ratio is None else ratio <= wanted)


def judge(document: Mapping[str, Any]) -> list[Verdict]:
    large, small = (scenario_of(document, state, "disk") for state in ("2gb", "small"))
    memory = scenario_of(document, "2gb", "tmpfs")
    stall, dcp_stall = (_median(large, name, "stall_seconds") for name in ("snapstone-async", "dcp-async"))

    def save(scenario: Mapping[str, Any] | None, than: float | None, engine: str = "snapstone") -> float | None:
        return speedup(_median(scenario, engine, "save_seconds"), than)

    def load(scenario: Mapping[str, Any] | None, than: float | None) -> float | None:
        return speedup(_median(scenario, "snapstone", "load_seconds"), than)

    async_gain = save(large, _median(large, "dcp-async", "save_seconds"), "snapstone-async")
    return [
        _at_least("2gb durable save, of the limit", 0.95, save(large, _median(large, "limit", "save_seconds"))),
        _at_least("2gb cold verified load, of the limit", 0.95, load(large, _median(large, "limit", "load_seconds"))),
        _at_least("2gb save, against the best DCP", 1.8, save(large, best_dcp(large, "save_seconds"))),
        _at_least("2gb async save to durable, against DCP's", 2.5, async_gain),
        _at_most("2gb async stall, of DCP's", 0.5, stall / dcp_stall if stall and dcp_stall else None),
        _at_least("2gb cold load, against DCP", 2, load(large, best_dcp(large, "load_seconds"))),
        _at_least("2gb cold load, against torch.load(mmap)", 1.3, load(large, _median(large, "torch", "load_seconds"))),
        _at_least("small save, against the best DCP", 20, save(small, best_dcp(small, "save_seconds"))),
        _at_least("small cold load, against DCP", 20, load(small, best_dcp(small, "load_seconds"))),
        _fence(small),
        _memory(large),
        _at_least("2gb save on tmpfs, against the best DCP", 3, save(memory, best_dcp(memory, "save_seconds"))),
        _at_least("2gb load on tmpfs, against DCP", 2, load(memory, best_dcp(memory, "load_seconds"))),
        *(Verdict(one.what, one.wanted_text, one.got_text, one.passed) for one in compare(document.get("dcp", []))),
        *(Verdict(one.what, one.wanted, one.got, one.passed) for one in judge_deltas(document.get("delta", []))),
    ]


def _fence(scenario: Mapping[str, Any] | None) -> Verdict:
    wanted = f"<= {FENCE_CALL_SECONDS_MAX * 1e3:g} ms"
    fence = (scenario or {}).get("fence", {})
    if "call_seconds" not in fence:
        return Verdict("call of a second async_save(fence=optimizer)", wanted, "not measured", None)
    seconds = statistics.median(fence["call_seconds"])
    what = f"call of a second async_save(fence=optimizer), {fence['tensors']} tensors"
    return Verdict(what, wanted, f"{seconds * 1e3:.2f} ms", seconds <= FENCE_CALL_SECONDS_MAX)


def _memory(scenario: Mapping[str, Any] | None) -> Verdict:
    """The worse of the blocking and the asynchronous save."""
    what, wanted = "2gb save: peak extra memory, of the budget", f"<= {BUDGET_SLACK:g}x"
    shares = [
        entry["save_peak_extra_bytes"] / entry["memory_budget"]
        for entry in (scenario["engines"].values() if scenario else ())
        if entry["memory_budget"] and entry["save_peak_extra_bytes"] is not None and entry["skipped"] is None
    ]
    if not shares:
        return Verdict(what, wanted, "not measured", None)
    return Verdict(what, wanted, f"{max(shares):.2f}x", max(shares) <= BUDGET_SLACK)
