"""Documents of `snapstone bench stall`, one per engine, made into one; and texts in it that name this machine."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from snapstone.bench.results import Document, EngineResult, Spread

__all__ = ["merged", "scrubbed"]


def merged(documents: Sequence[Document], engines: Sequence[EngineResult], problems: Sequence[str]) -> Document:
    """The documents' common facts, with `engines` and `problems`.

    Raises:
        ValueError: there is no document, or two of them differ in machine, workload or protocol.
    """
    if not documents:
        raise ValueError("no engine left a result")
    first = documents[0]
    for other in documents[1:]:
        for part in ("environment", "workload", "protocol"):
            if _fixed(first, part) != _fixed(other, part):
                raise ValueError(f"two runs differ in {part}: {_fixed(first, part)} and {_fixed(other, part)}")
    steps = [spread for one in documents if (spread := one["workload"]["step_seconds"])]
    return {
        **first,
        "complete": all(one["complete"] for one in documents),
        "problems": list(problems),
        "workload": {**first["workload"], "step_seconds": _spread(steps) if steps else None},
        "protocol": {
            **first["protocol"],
            "steps_per_block": max(one["protocol"]["steps_per_block"] for one in documents),
        },
        "engines": list(engines),
    }


def _fixed(document: Mapping[str, Any], part: str) -> dict[str, Any]:
    """What all engines of a table must have in common: not how long a step took, nor how many were needed."""
    return {name: value for name, value in document[part].items() if name not in ("step_seconds", "steps_per_block")}


def _spread(spreads: Sequence[Spread]) -> Spread:
    return {
        "median": statistics.median(one["median"] for one in spreads),
        "low": min(one["low"] for one in spreads),
        "high": max(one["high"] for one in spreads),
    }


def scrubbed(value: Any, words: Mapping[str, str]) -> Any:
    """`value` with the paths in its texts replaced, the longest first."""
    if isinstance(value, str):
        for path in sorted(words, key=len, reverse=True):
            if len(Path(path).parts) > 1:  # "/" is in every path
                value = value.replace(path, words[path])
        return value
    if isinstance(value, Mapping):
        return {name: scrubbed(member, words) for name, member in value.items()}
    return [scrubbed(member, words) for member in value] if isinstance(value, list) else value
