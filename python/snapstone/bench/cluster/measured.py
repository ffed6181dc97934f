"""What result documents say of a machine and of engines, as figures and stall models."""

from __future__ import annotations

import os
import statistics
from dataclasses import dataclass, field
from pathlib import Path

from ..results import Document, EngineResult, read_all
from .stall_models import Measured

__all__ = ["Findings", "findings"]


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

    Raises:
        OSError: the directory cannot be read. ValueError: none of its documents can be used.
    """
    documents, problems = read_all(directory)
    found = Findings(problems=problems)
    rates: dict[str, float] = {}
    for path, document in sorted(documents, key=lambda entry: entry[1]["date"]):
        if document["kind"] == "disk":
            _take_disk(found, path, document)
        elif document["kind"] == "stall":
            _take_stall(found, path, document)
        elif document["kind"] == "load":
            rates.update(_load_rates(document))
    for name, engine in found.engines.items():
        if name in rates:
            found.engines[name] = Measured(
                name, engine.stall_seconds_per_byte, engine.write_bytes_per_second, rates[name]
            )
    if not found.figures and not found.engines:
        reasons = "; ".join(found.problems) or "no document of bench disk or bench stall"
        raise ValueError(f"{os.fspath(directory)}: nothing to model with: {reasons}")
    return found


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


def _take_stall(found: Findings, path: Path, document: Document) -> None:
    workload, world = document["workload"], document["environment"]["world"]
    if workload["step_seconds"] is not None and workload["step_seconds"]["median"] > 0:
        found._set("step_seconds", workload["step_seconds"]["median"], path)
    # What a rank saves, not what it holds: the same where each byte is on one rank.
    rank_bytes = workload["nbytes"] / max(1, world["ranks"])
    if rank_bytes <= 0:
        found.problems.append(f"{path}: the state has no bytes, its engines are left out")
        return
    found._set("state_bytes_per_gpu", rank_bytes, path)
    for engine in document["engines"]:
        stall, durable, problem = _times(engine)
        if problem:
            found.problems.append(f"{path}: {engine['name']}: {problem}")
            continue
        found.engines[engine["name"]] = Measured(
            engine["name"],
            stall_seconds_per_byte=stall / rank_bytes,
            write_bytes_per_second=workload["nbytes"] / max(1, world["nodes"]) / durable,
        )


def _times(engine: EngineResult) -> tuple[float, float, str]:
    """Medians of stall and time to durable at the relaxed cadence, or why there are none.

    At the tight cadence saves wait for each other; the model adds that wait itself.
    """
    if engine["status"] in ("absent", "failed"):
        return 0.0, 0.0, f"{engine['status']}: {engine['reason'] or 'no reason given'}"
    for cadence in engine["cadences"]:
        if cadence["name"] == "relaxed" and cadence["stall_seconds"] and cadence["durable_seconds"]:
            durable = statistics.median(cadence["durable_seconds"])
            if durable <= 0:
                return 0.0, 0.0, "a time to durable of 0 s"
            # Noise can make a loop with saves the faster one; a stall below 0 is none.
            return max(0.0, statistics.median(cadence["stall_seconds"])), durable, ""
    return 0.0, 0.0, "no stall was measured at the relaxed cadence"


def _load_rates(document: Document) -> dict[str, float]:
    """Bytes per second of one host, by engine, with its fastest strategy."""
    nodes = max(1, document["environment"]["world"]["nodes"])
    rates: dict[str, float] = {}
    for load in document["loads"]:
        if load["status"] == "measured" and load["seconds"] and min(load["seconds"]) > 0:
            rate = load["nbytes"] / nodes / statistics.median(load["seconds"])
            rates[load["engine"]] = max(rate, rates.get(load["engine"], 0.0))
    return rates
