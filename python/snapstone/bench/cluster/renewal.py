"""Goodput of a run that fails at random, exactly: `docs/cluster-model.md` derives every formula.

The ends of recoveries are renewal points. Between two of them lies one period of uptime, exponential with mean MTBF, in
which saves begin after every `cadence` seconds of training, hold it for the stall, and are durable later; and one
recovery, which a failure begins anew. What is not durable when a failure comes is trained again.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

__all__ = ["Shares", "Timing", "best_cadence_seconds", "best_interval_steps", "goodput", "shares"]

_NEWTON_STEPS_MAX = 100


@dataclass(frozen=True, slots=True)
class Timing:
    """What the model knows of one engine on one cluster. All values are seconds.

    Raises:
        ValueError: a value is negative or not a number, or a save is durable before its stall ends.
    """

    stall_seconds: float  # training stands still, from the call
    durable_seconds: float  # from the call until a failure cannot take the save away
    recovery_seconds: float  # from a failure until training goes on: restart and load
    mtbf_seconds: float  # of the whole run; infinite where nothing fails

    def __post_init__(self) -> None:
        for name in ("stall_seconds", "durable_seconds", "recovery_seconds"):
            value = getattr(self, name)
            if not (0 <= value < math.inf):
                raise ValueError(f"{name}={value}: must be a number of seconds, 0 or more")
        if not self.mtbf_seconds > 0:
            raise ValueError(f"mtbf_seconds={self.mtbf_seconds}: must be more than 0")
        if self.durable_seconds < self.stall_seconds:
            raise ValueError(
                f"durable_seconds={self.durable_seconds} is less than stall_seconds={self.stall_seconds}: a save is "
                "durable when its stall ends, or later"
            )

    @property
    def shortest_cadence_seconds(self) -> float:
        """Seconds of training between two saves below which the second waits until the first is durable."""
        return self.durable_seconds - self.stall_seconds

    def cycle_seconds(self, cadence_seconds: float) -> float:
        """From save to save while nothing fails: training and stall, or the time to durable where that is longer."""
        return max(cadence_seconds + self.stall_seconds, self.durable_seconds)


@dataclass(frozen=True, slots=True)
class Shares:
    """Where the time of a run goes. The four add up to 1."""

    goodput: float  # training that was kept
    stall: float  # saves held training up, waits for the previous save included
    replay: float  # training that a failure took away
    recovery: float  # restart and load, tried until one succeeds


def goodput(timing: Timing, cadence_seconds: float) -> float:
    """The share of time that is training and is kept, for a save after every `cadence_seconds` of training.

    Raises:
        ValueError: the cadence is not positive.
    """
    if not 0 < cadence_seconds < math.inf:
        raise ValueError(f"cadence_seconds={cadence_seconds}: must be more than 0 and finite")
    cycle = timing.cycle_seconds(cadence_seconds)
    rate = 1 / timing.mtbf_seconds
    if rate * cycle == 0:
        return cadence_seconds / cycle
    survived = math.exp(-rate * (timing.recovery_seconds + cadence_seconds + timing.durable_seconds))
    return rate * cadence_seconds * survived / -math.expm1(-rate * cycle)


def shares(timing: Timing, cadence_seconds: float) -> Shares:
    """`goodput`, and where the rest of the time goes."""
    kept = goodput(timing, cadence_seconds)
    cycle = timing.cycle_seconds(cadence_seconds)
    rate = 1 / timing.mtbf_seconds
    if rate * cycle == 0:
        return Shares(kept, 1 - kept, 0.0, 0.0)
    recovery = -math.expm1(-rate * timing.recovery_seconds)
    # Stalls of a cycle, each until its end or a failure, then the wait at the cycle's end if there is one.
    worked = math.exp(-rate * cadence_seconds)
    stalled = -math.expm1(-rate * timing.stall_seconds)
    unblocked = timing.stall_seconds + cadence_seconds
    waited = math.exp(-rate * unblocked) * -math.expm1(-rate * (cycle - unblocked))
    stall = (1 - recovery) * worked * (stalled + waited) / -math.expm1(-rate * cycle)
    return Shares(kept, stall, max(0.0, 1 - kept - stall - recovery), recovery)


def best_cadence_seconds(timing: Timing) -> float:
    """The cadence with the highest goodput among those at which no save waits for the previous one.

    Infinite where nothing fails; 0 where neither a stall nor the time to durable is in the way.
    """
    if math.isinf(timing.mtbf_seconds):
        return math.inf
    unbounded = timing.mtbf_seconds * _best_share_of_mtbf(timing.stall_seconds / timing.mtbf_seconds)
    return max(unbounded, timing.shortest_cadence_seconds)


def _best_share_of_mtbf(stall: float) -> float:
    """x in [0, 1) with x = 1 - exp(-x - stall), which is 1 + W(-exp(-1 - stall)), W being Lambert's function.

    Solved as -log(1 - x) - x = stall: near 0 the argument of W comes so close to its branch point -1/e that its digits
    are gone. Newton's method from above the root stays above it, for the left side is convex. Where even its digits
    cancel out, the first terms of the series are exact.
    """
    if stall < 1e-8:
        root = math.sqrt(stall / 2)
        return 2 * root - 4 / 3 * root**2 + 2 / 9 * root**3
    x = min(math.sqrt(2 * stall), -math.expm1(-1 - stall))  # both are above the root
    if x == 1:
        return x
    for _ in range(_NEWTON_STEPS_MAX):
        step = (-math.log1p(-x) - x - stall) * (1 - x) / x
        x -= step
        if abs(step) <= 1e-13 * x:
            break
    return x


def best_interval_steps(timing: Timing, step_seconds: float) -> int:
    """The whole number of steps between saves with the highest goodput, at least one, at which no save waits.

    Raises:
        ValueError: nothing fails, so no save is ever worth its stall.
    """
    best = best_cadence_seconds(timing)
    if math.isinf(best):
        raise ValueError("mtbf_seconds is infinite: no cadence is best")
    shortest = max(1, math.ceil(timing.shortest_cadence_seconds / step_seconds * (1 - 1e-12)))
    below = max(shortest, math.floor(best / step_seconds))
    return max((below, below + 1), key=lambda steps: goodput(timing, steps * step_seconds))
