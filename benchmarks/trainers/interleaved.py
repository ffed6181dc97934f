"""Blocks of training steps, of which every contestant gets one per round in turns, and what they cost.

A block is `steps` steps, with one save after the first. Its stall is what it took longer than the block without saves
of the same round: the call, waits before later steps, and steps that a save slows down. Nothing of a save is left when
the next block begins.
"""

from __future__ import annotations

import datetime
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from machine import cpu_slug, facts, file_system, version_of

import snapstone

__all__ = ["BASELINE", "Block", "document", "order", "store", "table"]

BASELINE = "no saves"


@dataclass(slots=True)
class Block:
    """Seconds of one block. `call`: of the save's call, as the training thread sees it; `durable`: from the call until
    the checkpoint is on the disk.
    """

    steps: list[float] = field(default_factory=list)
    call: float = 0.0
    durable: float = 0.0


def order(names: Sequence[str], number: int) -> list[str]:
    """Who runs when in round `number`: each place is everybody's in turn."""
    at = number % len(names)
    return [*names[at:], *names[:at]]


def document(
    theme: str, rounds: Sequence[Mapping[str, Block]], trainer: str, directory: Path, **more: Any
) -> dict[str, Any]:
    """Samples by contestant and measure, with the machine they are from."""
    engines: dict[str, dict[str, list[Any]]] = {}
    for blocks in rounds:
        without = sum(blocks[BASELINE].steps)
        for name, block in blocks.items():
            samples = engines.setdefault(name, {"step": [], "block": [], "call": [], "stall": [], "durable": []})
            samples["step"].extend(block.steps)
            samples["block"].append(sum(block.steps))
            if name != BASELINE:
                samples["call"].append(block.call)
                samples["stall"].append(sum(block.steps) - without)
                samples["durable"].append(block.durable)
    return {
        "theme": theme,
        "date": f"{datetime.date.today():%Y-%m-%d}",
        "snapstone": snapstone.__version__,
        trainer: version_of(trainer),
        "machine": facts(),
        "file_system": file_system(directory),
        "rounds": len(rounds),
        **more,
        "engines": engines,
    }


def table(found: Mapping[str, Any]) -> str:
    """Markdown: medians, of stalls with the lowest and the highest."""
    lines = [
        "| checkpoints | step | save's call | stall of a block | until durable |",
        "|---|---|---|---|---|",
    ]
    for name, samples in found["engines"].items():
        cells = [name, _ms(statistics.median(samples["step"]))]
        cells.append(_ms(statistics.median(samples["call"])) if samples["call"] else "-")
        stall = samples["stall"]
        spread = f" ({_ms(min(stall))} to {_ms(max(stall))})" if stall else ""
        cells.append(_ms(statistics.median(stall)) + spread if stall else "-")
        cells.append(_ms(statistics.median(samples["durable"])) if samples["durable"] else "-")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def store(found: Mapping[str, Any], results: Path, *, full: bool) -> Path:
    """results/<theme>_<cpu>_<date>.json; other sizes than the defaults are called partial."""
    theme = found["theme"] if full else f"partial-{found['theme']}"
    path = results / f"{theme}_{cpu_slug()}_{found['date'].replace('-', '')}.json"
    results.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n")
    return path


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.1f} ms"
