"""Every contender of a row in turn, again and again: one slow minute of the machine hits them all."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from drop_in.rank import NOT_IN_THIS_VERSION

__all__ = ["Entry", "interleave"]

REASON_LENGTH_MAX = 300
ROUNDS_MIN = 2


@dataclass(slots=True)
class Entry:
    """One contender's line of the result. `bytes_counted_by` names the sample that tells what it read from storage."""

    label: str
    storage: str
    role: str
    bytes_counted_by: str | None
    skipped: str | None = None
    unavailable: bool = False  # left out because this version does not have it
    verified: bool = False
    samples: dict[str, list[float]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__slots__}


class Contender(Protocol):
    @property
    def name(self) -> str: ...

    @property
    def label(self) -> str: ...


def interleave(
    title: str,
    contenders: Sequence[Contender],
    entries: Mapping[str, Entry],
    rounds: int,
    *,
    warm_up: Callable[[Any], object],
    step: Callable[[Any], Mapping[str, float]],
    scrub: Mapping[str, str],
    seconds_max: float = math.inf,
) -> None:
    """A warm-up of each contender, which checks its bits and is not counted, then `rounds` of `step`, the order rotated
    every round. A contender that fails is out, with the reason in its entry; the others go on. `scrub`: paths that a
    reason may quote, and what is recorded instead. After `seconds_max`, the warm-ups included, no third round begins.
    """
    begin = time.monotonic()
    active: list[Contender] = []

    def attempt(contender: Contender, work: Callable[[Contender], Any]) -> Any:
        entry = entries[contender.name]
        try:
            return work(contender)
        except Exception as error:
            entry.skipped = _reason(error, scrub)
            entry.unavailable = NOT_IN_THIS_VERSION in entry.skipped
            _say(title, f"{contender.label} left out: {entry.skipped}")
            return None

    for contender in contenders:
        _say(title, f"warm-up of {contender.label}")
        attempt(contender, warm_up)
        if entries[contender.name].skipped is None:
            entries[contender.name].verified = True
            active.append(contender)
    for number in range(rounds):
        if number >= ROUNDS_MIN and time.monotonic() - begin > seconds_max:
            _say(title, f"{number} rounds only, to keep the run short")
            break
        _say(title, f"round {number + 1} of {rounds}")
        turn = number % max(len(active), 1)
        for contender in active[turn:] + active[:turn]:
            if entries[contender.name].skipped is None:
                for name, value in (attempt(contender, step) or {}).items():
                    entries[contender.name].samples.setdefault(name, []).append(value)


def _reason(error: Exception, scrub: Mapping[str, str]) -> str:
    reason = " ".join(str(error).split())
    for path, word in scrub.items():
        reason = reason.replace(path, word)
    return reason[:REASON_LENGTH_MAX]


def _say(title: str, text: str) -> None:
    print(f"{title}: {text}", file=sys.stderr, flush=True)
