"""How long a fence will hold, predicted from what this process's last save took."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from . import _native

__all__ = ["learn_copy_rate", "learn_rates", "predict_device_stall", "predict_stall"]

_STAGES = ("stage", "write")
_rates = dict.fromkeys((*_STAGES, "device_copy"), 0.0)  # bytes per second of this process's last save
_LEARNED_BYTES_MIN = 1 << 24


def learn_rates(stats: Mapping[str, Any]) -> None:
    lanes = _native.ring_facts()["lanes"]
    for stage in _STAGES:
        entry = stats.get(stage)
        if entry and entry["seconds"] > 0 and entry["bytes"] >= _LEARNED_BYTES_MIN:
            # Lanes copy side by side; a request's time includes its wait behind the others in the queue.
            parallel = lanes if stage == "stage" else lanes * min(_native.QUEUE_DEPTH, entry["count"] / lanes)
            _rates[stage] = entry["bytes"] / entry["seconds"] * parallel


def predict_stall(payload_bytes: int, ring_bytes: int) -> float | None:
    """Seconds until a fence="now" lets go: copying what fits into the ring, draining what does not. None before the
    first save.
    """
    if not (_rates["stage"] and _rates["write"]):
        return None
    return min(payload_bytes, ring_bytes) / _rates["stage"] + max(0, payload_bytes - ring_bytes) / _rates["write"]


def learn_copy_rate(nbytes: int, seconds: float) -> None:
    """`nbytes` left devices within `seconds`, none of which were spent on waiting for slots."""
    if nbytes >= _LEARNED_BYTES_MIN and seconds > 0:
        _rates["device_copy"] = nbytes / seconds


def predict_device_stall(enqueued_bytes: int, late_bytes: int) -> float | None:
    """Seconds until streams that wait for a snapshot of devices go on: copies that are enqueued come first, then what
    found no memory and waits for the file. Copies within a device take next to nothing. None before the first save.
    """
    if not _rates["device_copy"] or (late_bytes and not _rates["write"]):
        return None
    return enqueued_bytes / _rates["device_copy"] + (late_bytes / _rates["write"] if late_bytes else 0.0)
