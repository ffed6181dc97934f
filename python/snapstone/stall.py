"""How long a fence will hold, predicted from what this process's last save took."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from . import _native

__all__ = ["learn_rates", "predict_stall"]

_rates = {"stage": 0.0, "write": 0.0}  # bytes per second of this process's last save


def learn_rates(stats: Mapping[str, Any]) -> None:
    lanes = _native.ring_facts()["lanes"]
    for stage in _rates:
        entry = stats.get(stage)
        if entry and entry["seconds"] > 0 and entry["bytes"] >= 1 << 24:
            # Lanes copy side by side; a request's time includes its wait behind the others in the queue.
            parallel = lanes if stage == "stage" else lanes * min(_native.QUEUE_DEPTH, entry["count"] / lanes)
            _rates[stage] = entry["bytes"] / entry["seconds"] * parallel


def predict_stall(payload_bytes: int, ring_bytes: int) -> float | None:
    """Seconds until a fence="now" lets go: copying what fits into the ring, draining what does not. None before the
    first save.
    """
    if not all(_rates.values()):
        return None
    return min(payload_bytes, ring_bytes) / _rates["stage"] + max(0, payload_bytes - ring_bytes) / _rates["write"]
