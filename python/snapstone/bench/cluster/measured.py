"""What result documents say of a machine and of engines, as figures and stall models."""

from __future__ import annotations

import os
import statistics
from dataclasses import dataclass, field
from pathlib import Path

from ..results import Document, EngineResult, read_all
from .stall_models import Measured

__all__ = ["Findings", "findings"]


@dataclass(frozen=True, slots=True)
class _Point:
    """One engine at one size."""

    rank_bytes: float
    host_bytes: float
    stall_seconds: float
    durable_seconds: float


@dataclass(slots=True)
class Findings:
    """Figures of `Cluster` by name with the file each is from, engines, and what could not be used."""

    figures: dict[str, float] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)
    engines: dict[str, Measured] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def _set(self, name: str, value: float, path: Path) -> None:
        self.figures[name] = value
        self.sources[name] = f"measured: {path.name}"


def findings(directory: str | os.PathLike[str]) -> Findings:
    """What the documents in `directory` say. Where several say the same, the newest does.

    An engine that was measured at several sizes has a line through them, with a fixed part; at one size its times are
    in proportion to the bytes.

    Raises:
        OSError: the directory cannot be read. ValueError: none of its documents can be used.
    """
    documents, problems = read_all(directory)
    found = Findings(problems=problems)
    points: dict[str, dict[float, _Point]] = {}
    rates: dict[str, float] = {}
    for path, document in sorted(documents, key=lambda entry: entry[1]["date"]):
        if document["kind"] == "disk":
            _take_disk(found, path, document)
        elif document["kind"] == "stall":
            for name, point in _take_stall(found, path, document).items():
                points.setdefault(name, {})[point.rank_bytes] = point
        elif document["kind"] == "load":
            rates.update(_load_rates(document))
    found.engines = {name: _engine(name, sizes, rates.get(name)) for name, sizes in points.items()}
    if not found.figures and not found.engines:
        reasons = "; ".join(found.problems) or "no document of bench disk or bench stall"
        raise ValueError(f"{os.fspath(directory)}: nothing to model with: {reasons}")
    return found


def _engine(name: str, sizes: dict[float, _Point], load_bytes_per_second: float | None) -> Measured:
    points = [sizes[size] for size in sorted(sizes)]
    fixed_stall, stall_per_byte = _line([(point.rank_bytes, point.stall_seconds) for point in points])
    fixed_durable, durable_per_byte = _line([(point.host_bytes, point.durable_seconds) for point in points])
    return Measured(
        name,
        stall_seconds_per_byte=stall_per_byte,
        write_bytes_per_second=1 / durable_per_byte,
        load_bytes_per_second=load_bytes_per_second,
        fixed_stall_seconds=fixed_stall,
        fixed_durable_seconds=fixed_durable,
        largest_bytes=points[-1].rank_bytes,
    )


def _line(points: list[tuple[float, float]]) -> tuple[float, float]:
    """Seconds at no bytes, and per byte. Through the last point and 0 where a line would make no sense."""
    if len({nbytes for nbytes, _ in points}) > 1:
        slope, intercept = statistics.linear_regression(*zip(*points, strict=True))
        if slope > 0 and intercept >= 0:
            return intercept, slope
    nbytes, seconds = points[-1]
    return 0.0, seconds / nbytes


def _take_disk(found: Findings, path: Path, document: Document) -> None:
    """The fastest probe of each direction: what the disk can do, by whichever way."""
    for operation, figure in (("write", "disk_write_bytes_per_second"), ("read", "disk_read_bytes_per_second")):
        rates = [
            statistics.median(probe["bytes_per_second"])
            for probe in document["probes"]
            if probe["operation"] == operation and probe["bytes_per_second"]
        ]
        if rates and max(rates) > 0:
            found._set(figure, max(rates), path)


def _take_stall(found: Findings, path: Path, document: Document) -> dict[str, _Point]:
    workload, world = document["workload"], document["environment"]["world"]
    if workload["step_seconds"] is not None and workload["step_seconds"]["median"] > 0:
        found._set("step_seconds", workload["step_seconds"]["median"], path)
    # What a rank saves, not what it holds: the same where each byte is on one rank.
    rank_bytes, host_bytes = (workload["nbytes"] / max(1, world[unit]) for unit in ("ranks", "nodes"))
    if rank_bytes <= 0:
        found.problems.append(f"{path}: the state has no bytes, its engines are left out")
        return {}
    found._set("state_bytes_per_gpu", rank_bytes, path)
    points: dict[str, _Point] = {}
    for engine in document["engines"]:
        times = _times(engine)
        if isinstance(times, str):
            found.problems.append(f"{path}: {engine['name']}: left out: {times}")
            continue
        stall, durable = times
        if stall < 0:
            found.problems.append(f"{path}: {engine['name']}: a stall of {stall:.3g} s is noise, taken for 0")
        points[engine["name"]] = _Point(rank_bytes, host_bytes, max(0.0, stall), durable)
    return points


def _times(engine: EngineResult) -> tuple[float, float] | str:
    """Medians of stall and time to durable at the relaxed cadence, or why there are none.

    At the tight cadence saves wait for each other; the model adds that wait itself.
    """
    if engine["status"] in ("absent", "failed"):
        return f"{engine['status']}: {engine['reason'] or 'no reason given'}"
    for cadence in engine["cadences"]:
        if cadence["name"] == "relaxed" and cadence["stall_seconds"] and cadence["durable_seconds"]:
            durable = statistics.median(cadence["durable_seconds"])
            if durable <= 0:
                return "a time to durable of 0 s"
            return statistics.median(cadence["stall_seconds"]), durable
    return "no stall was measured at the relaxed cadence"


def _load_rates(document: Document) -> dict[str, float]:
    """Bytes per second of one host into the memory of its ranks, by engine, with its fastest strategy."""
    world = document["environment"]["world"]
    copies = world["ranks"] if document["checkpoint"].get("layout") == "replicated" else 1
    rates: dict[str, float] = {}
    for load in document["loads"]:
        if load["status"] == "measured" and load["seconds"] and min(load["seconds"]) > 0:
            rate = load["nbytes"] * copies / max(1, world["nodes"]) / statistics.median(load["seconds"])
            rates[load["engine"]] = max(rate, rates.get(load["engine"], 0.0))
    return rates
