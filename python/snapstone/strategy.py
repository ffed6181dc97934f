"""Which ranks read what of a load: `direct`, `scatter`, `broadcast`, or what `auto` makes of needs and speeds."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

__all__ = ["Need", "Rates", "choose", "is_measured", "union_bytes"]

_log = logging.getLogger("snapstone")

SMALL_BYTES = 64 << 20  # a state that is not worth many readers, nor a measurement
OVERLAP_MIN = 1.1  # bytes that ranks need, over the bytes that are there: below this reading alone is as good


class Need(NamedTuple):
    """What one rank says of its own: a digest of all boxes that it wants, their bytes, its node."""

    digest: str
    nbytes: int
    node: str


@dataclass(frozen=True, slots=True)
class Rates:
    """Bytes per second that one rank measured while all others did the same."""

    storage: float
    fabric: float  # infinite between ranks of one node
    memory: float


def union_bytes(needs: Sequence[Need], payload_bytes: int) -> int:
    """At most how many bytes of the checkpoint the group needs."""
    distinct = {need.digest: need.nbytes for need in needs}
    return min(payload_bytes, sum(distinct.values()))


def is_measured(strategy: str, needs: Sequence[Need], payload_bytes: int) -> bool:
    """Whether `choose` asks for rates."""
    union = union_bytes(needs, payload_bytes)
    total = sum(need.nbytes for need in needs)
    return strategy == "auto" and union > SMALL_BYTES and total >= OVERLAP_MIN * union


def choose(strategy: str, needs: Sequence[Need], payload_bytes: int, rates: Sequence[Rates]) -> str:
    """The same on every rank. Says why in the log of rank 0's process and all others at level INFO."""
    if strategy != "auto":
        return strategy
    union = union_bytes(needs, payload_bytes)
    total = sum(need.nbytes for need in needs)
    nodes = len({need.node for need in needs})
    facts = f"{len(needs)} ranks on {nodes} nodes need {total} bytes of which {union} are distinct"
    if total < OVERLAP_MIN * union or total == 0:
        return _chosen("direct", f"{facts}: hardly any is needed twice")
    if union <= SMALL_BYTES:
        return _chosen("broadcast", f"{facts}: little enough for one reader")
    speed: dict[str, float] = {}  # ranks of a node share its way to storage, whether or not they measured at one time
    wanted: dict[str, int] = {}
    for need, rate in zip(needs, rates, strict=True):
        speed[need.node] = max(speed.get(need.node, 0.0), rate.storage)
        wanted[need.node] = wanted.get(need.node, 0) + need.nbytes
    alone = max(nbytes / speed[node] for node, nbytes in wanted.items())
    read = union / sum(speed.values())
    # What a rank gets crosses the network once per node, and memory once per rank.
    arrive = union / min(rate.fabric for rate in rates) if nodes > 1 else 0.0
    copy = max(need.nbytes / rate.memory for need, rate in zip(needs, rates, strict=True))
    together = max(read, arrive, copy)
    estimate = f"{facts}: each for itself takes {alone:.2f} s, read once and exchanged {together:.2f} s"
    return _chosen("scatter" if together < alone else "direct", estimate)


def _chosen(strategy: str, reason: str) -> str:
    _log.info("load: strategy %s: %s", strategy, reason)
    return strategy
