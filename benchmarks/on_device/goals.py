"""What a run on one H200 must show, and whether this one did."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

__all__ = ["Verdict", "judge", "table"]

_MS, _TB = 1e3, 1e-3  # of seconds, of 10^9 bytes


@dataclass(frozen=True, slots=True)
class Verdict:
    what: str
    wanted: str
    got: str
    verdict: Literal["met", "missed", "not measured"]

    def to_json(self) -> dict[str, str]:
        return {"what": self.what, "wanted": self.wanted, "got": self.got, "verdict": self.verdict}


def _found(parts: Mapping[str, Any], path: str) -> Any:
    """`part.step.key...` of the results, None where it is not there."""
    part, _, rest = path.partition(".")
    value: Any = parts.get(part, {}).get("results", {})
    for key in rest.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def _verdict(
    parts: Mapping[str, Any], what: str, path: str, limit: float, unit: str, scale: float, *, most: bool
) -> Verdict:
    found = _found(parts, path)
    wanted = f"{'<=' if most else '>='} {limit:g} {unit}"
    if not found:
        return Verdict(what, wanted, "", "not measured")
    value = found["median"] * scale
    low, high = found["low"] * scale, found["high"] * scale
    got = f"{value:.3g} {unit} ({low:.3g} to {high:.3g})"
    return Verdict(what, wanted, got, "met" if (value <= limit if most else value >= limit) else "missed")


def judge(parts: Mapping[str, Any], *, fake: bool = False) -> list[Verdict]:
    """By medians. `parts`: name to {"results": ...}; of the fake driver, on which nothing is met or missed."""

    def at_least(what: str, path: str, limit: float, unit: str, scale: float = 1.0) -> Verdict:
        return _verdict(parts, what, path, limit, unit, scale, most=False)

    def at_most(what: str, path: str, limit: float) -> Verdict:
        return _verdict(parts, what, path, limit, "ms", _MS, most=True)

    calls = [
        at_most(f"async_save call, {count} tensors, fence {title}", f"tensors.calls_{count}.{fence}.call_seconds", 1)
        for count in _call_counts(parts)
        for fence, title in (("now", "now"), ("optimizer", "optimizer"))
    ]
    verdicts = [
        at_least("D2H of the 10,000-tensor state", "tensors.engine.d2h_gbps", 50, "GB/s"),
        *calls,
        _stall(parts, at_most),
        at_least("digest kernel", "copies.digest.digest_gbps", 3, "TB/s", _TB),
        at_most("unchanged 8 GB known", "unchanged.saves.known_seconds", 5),
        at_least("load from the page cache to the device", "loads.load.load_gbps", 25, "GB/s"),
    ]
    return [replace(one, verdict="not measured") for one in verdicts] if fake else verdicts


def _call_counts(parts: Mapping[str, Any]) -> Sequence[int]:
    """Of tensors, as measured; as planned where nothing was."""
    names = [name for name in parts.get("tensors", {}).get("results", {}) if name.startswith("calls_")]
    return [int(name.removeprefix("calls_")) for name in names] or [100, 10_000]


COMPUTE_SECONDS_MIN = 0.16


def _stall(parts: Mapping[str, Any], at_most: Callable[[str, str, float], Verdict]) -> Verdict:
    what = "exposed stall at 8 GB, fence optimizer"
    found = at_most(what, "training_8gb.engines.snapstone.summary.exposed_stall", 2)
    seconds = _found(parts, "training_8gb.workload.compute_seconds")
    if seconds is not None and seconds < COMPUTE_SECONDS_MIN:
        got = f"{found.got}; forward and backward took {seconds:.3f} s, not {COMPUTE_SECONDS_MIN}"
        return Verdict(what, found.wanted, got, "not measured")
    whole = _found(parts, "training_8gb.engines.snapstone.summary.stall_of_all_steps_in_flight")
    if found.verdict == "not measured" or not whole:
        return found
    return Verdict(
        what, found.wanted, f"{found.got}; all steps in flight: {whole['median'] * _MS:.3g} ms", found.verdict
    )


def table(verdicts: Sequence[Verdict]) -> str:
    """For a terminal, one line each."""
    width = max(len(one.what) for one in verdicts)
    return "\n".join(f"{one.verdict:<13}{one.what:<{width}}  {one.wanted:<11}  {one.got}".rstrip() for one in verdicts)
