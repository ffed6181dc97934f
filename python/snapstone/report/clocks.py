"""The clocks of ranks, aligned by votes.

Each rank stamps its events with the monotonic clock of its host, which counts from a moment of its own. Every operation
votes, and a vote ends on all ranks when the last one has voted, later only by the time that a rank needs to notice it.
So the ends of one vote on two ranks are the same moment, but for that time:

1. the ends of the votes of each rank are listed in order, and matched with those of the reference rank one by one;
   where one rank has more of them, for example because another died, the match that agrees best with itself is taken;
2. the offset of a rank is the median of the differences, and its spread half of what the middle half of them covers;
3. ranks whose offsets are closer together than that time can be have the same clock: one offset serves them all, so
   that nothing is lost between ranks of one host.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

__all__ = ["Alignment", "aligned"]

# Ranks ask for the outcome of a vote every 50 ms or more often, and less often where they are many, so two of them
# notice it at most this far apart. Clocks of two hosts differ by the time between their boots: seconds to months.
_SAME_CLOCK_US = 100_000.0
_SAME_CLOCK_US_PER_RANK = 200.0


@dataclass(frozen=True)
class Alignment:
    """Of one rank: what is added to its times, from how many votes, and how far these disagree. Microseconds."""

    offset: float
    votes: int
    spread: float


def aligned(vote_ends: Mapping[int, Sequence[float]]) -> dict[int, Alignment]:
    """Offsets of all ranks against the lowest rank that has votes. A rank without votes stays as it is, `votes` 0."""
    reference = next((rank for rank in sorted(vote_ends) if vote_ends[rank]), None)
    if reference is None:
        return {rank: Alignment(0.0, 0, 0.0) for rank in vote_ends}
    ends = sorted(vote_ends[reference])
    single = {rank: _offset(ends, sorted(found)) for rank, found in vote_ends.items()}
    shared = _shared({rank: one.offset for rank, one in single.items() if one.votes}, reference)
    return {rank: Alignment(shared[rank], one.votes, one.spread) if one.votes else one for rank, one in single.items()}


def _offset(reference: Sequence[float], ends: Sequence[float]) -> Alignment:
    if not ends:
        return Alignment(0.0, 0, 0.0)
    shorter = min(len(reference), len(ends))
    best: Alignment | None = None
    for shift in range(abs(len(reference) - len(ends)) + 1):
        first = shift if len(reference) > len(ends) else 0
        second = shift if len(ends) > len(reference) else 0
        pairs = zip(reference[first : first + shorter], ends[second : second + shorter], strict=True)
        differences = sorted(a - b for a, b in pairs)
        spread = (
            (differences[(3 * shorter) // 4 - (shorter == 1)] - differences[shorter // 4]) / 2 if shorter > 1 else 0.0
        )
        if best is None or spread < best.spread:
            best = Alignment(median(differences), shorter, spread)
    assert best is not None
    return best


def _shared(offsets: Mapping[int, float], reference: int) -> dict[int, float]:
    """One offset per host: neighbours in the order of their offsets that are close have the same clock."""
    same_clock = max(_SAME_CLOCK_US, _SAME_CLOCK_US_PER_RANK * len(offsets))
    found: dict[int, float] = {}
    host: list[int] = []
    for rank in [*sorted(offsets, key=lambda rank: offsets[rank]), -1]:
        if host and (rank == -1 or offsets[rank] - offsets[host[-1]] > same_clock):
            offset = 0.0 if reference in host else median(offsets[member] for member in host)
            found |= dict.fromkeys(host, offset)
            host = []
        host.append(rank)
    return found
