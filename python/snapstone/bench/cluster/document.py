"""A plan as a result document of kind "model": inputs with their sources, rows, what could not be used."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any, cast

from ..results import Document, Environment, ModelRow, new_document
from .figures import Cluster
from .measured import Findings
from .planner import Row, plan
from .stall_models import KINDS, Given, Measured, Modelled, described

__all__ = ["Engine", "engines_of", "figures_of", "model_document"]

Engine = Modelled | Measured | Given

_EXTRAPOLATION_MAX = 10.0


def figures_of(given: Mapping[str, Any], found: Findings) -> tuple[Cluster, dict[str, str]]:
    """The cluster, and the source of each figure that is not a default: an option wins over a measurement.

    Raises:
        ValueError: a figure is out of range.
    """
    options = {name: value for name, value in given.items() if value is not None}
    sources = {**found.sources, **dict.fromkeys(options, "option")}
    return Cluster(**{**found.figures, **options}), sources


def engines_of(names: Sequence[str], found: Findings, fixed_seconds: float = 0.0) -> list[Engine]:
    """Engines by name: one of the measured ones, a kind, or NAME=STALL/DURABLE in seconds.

    No names: all that were measured, or one of each kind where none was.

    Raises:
        ValueError: a name is unknown or given twice, or its seconds are no numbers.
    """
    if not names:
        measured: list[Engine] = list(found.engines.values())
        return measured or [Modelled(kind, kind, fixed_seconds) for kind in KINDS]
    engines = [_engine(name, found, fixed_seconds) for name in names]
    if len({engine.name for engine in engines}) < len(engines):
        raise ValueError(f"engines {', '.join(names)}: each name once")
    return engines


def _engine(name: str, found: Findings, fixed_seconds: float) -> Engine:
    title, equals, times = name.partition("=")
    if equals:
        try:
            stall, durable = (float(number) for number in times.split("/"))
        except ValueError:
            title = ""
        if not title:
            raise ValueError(f"engine {name!r}: NAME=STALL/DURABLE, both in seconds, such as mine=2.5/40")
        return Given(title, stall, durable)
    if name in found.engines:
        return found.engines[name]
    for kind in KINDS:
        if name == kind:
            return Modelled(name, kind, fixed_seconds)
    known = [*found.engines, *KINDS]
    raise ValueError(f"unknown engine {name!r}: one of {', '.join(known)}, or NAME=STALL/DURABLE in seconds")


def model_document(
    cluster: Cluster,
    sources: Mapping[str, str],
    engines: Sequence[Engine],
    sizes: Sequence[int],
    *,
    command: Sequence[str],
    environment: Environment,
    problems: Sequence[str] = (),
    interval_steps: int | None = None,
    runs: int = 0,
    seed: int = 0,
) -> tuple[Document, list[Row]]:
    """Plans, and says what the plan was made from. `environment` is that of the machine that computed it.

    Raises:
        ValueError: a size, `interval_steps` or `runs` is out of range. ImportError: `runs` without simpy.
    """
    begin = time.monotonic()
    document = new_document("model", command, environment)
    rows = plan(cluster, engines, sizes, interval_steps=interval_steps, runs=runs, seed=seed)
    document["inputs"] = {
        **cluster.values(),
        "sources": cluster.sources(sources),
        "engines": [described(engine) for engine in engines],
        "gpus": list(sizes),
        "interval_steps": interval_steps,
        "simulated_runs": runs,
        "seed": seed,
    }
    document["rows"] = cast("list[ModelRow]", rows)
    document["problems"] = [*problems, *_extrapolations(cluster, engines, sizes)]
    document["seconds"] = time.monotonic() - begin
    document["complete"] = True
    return document, rows


def _extrapolations(cluster: Cluster, engines: Sequence[Engine], sizes: Sequence[int]) -> list[str]:
    """Engines that were measured with far fewer bytes than they are planned for."""
    found: list[str] = []
    for engine in engines:
        if isinstance(engine, Measured):
            factor = max(engine.extrapolation(cluster, gpus) for gpus in sizes)
            if factor > _EXTRAPOLATION_MAX:
                found.append(
                    f"{engine.name}: planned for {factor:.3g} times the bytes of a GPU that it was measured with; "
                    "measure it with more"
                )
    return found
