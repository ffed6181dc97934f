"""The approximations that are in use: Young's, Daly's two, and goodput to the first order.

Young: A first order approximation to the optimum checkpoint interval, CACM 17(9), 1974. Daly: A model for predicting
the optimum checkpoint interval for restart dumps, ICCS 2003; A higher order estimate of the optimum checkpoint interval
for restart dumps, FGCS 22(3), 2006. All count a save's stall, none its time to durable beyond that.
"""

from __future__ import annotations

import math

from .renewal import Timing

__all__ = ["daly_first_order_seconds", "daly_seconds", "first_order_goodput", "young_seconds"]


def young_seconds(timing: Timing) -> float:
    """Seconds of training between saves: sqrt(2 S M), for a stall S far below the mean time between failures M."""
    return math.sqrt(2 * timing.stall_seconds * timing.mtbf_seconds)


def daly_first_order_seconds(timing: Timing) -> float:
    """Daly, 2003: sqrt(2 S (M + R)), R being the time of a recovery."""
    return math.sqrt(2 * timing.stall_seconds * (timing.mtbf_seconds + timing.recovery_seconds))


def daly_seconds(timing: Timing) -> float:
    """Daly, 2006: the higher order. M itself from a stall of 2 M on."""
    stall, mtbf = timing.stall_seconds, timing.mtbf_seconds
    if math.isinf(mtbf):
        return math.inf if stall else 0.0
    if stall >= 2 * mtbf:
        return mtbf
    ratio = stall / (2 * mtbf)
    return math.sqrt(2 * stall * mtbf) * (1 + math.sqrt(ratio) / 3 + ratio / 9) - stall


def first_order_goodput(timing: Timing, cadence_seconds: float) -> float:
    """What `renewal.goodput` is to the first order in 1 / MTBF, for cadences at which no save waits.

    A failure costs its recovery, the time to durable and half a cycle, less half a stall on either side. Negative where
    failures come faster than that: then it means nothing.
    """
    lost = timing.recovery_seconds + timing.durable_seconds + (cadence_seconds - timing.stall_seconds) / 2
    return cadence_seconds / (cadence_seconds + timing.stall_seconds) * (1 - lost / timing.mtbf_seconds)
