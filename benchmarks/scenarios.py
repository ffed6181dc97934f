"""What a run measures: which state, where, which engines, how often."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from machine import memory_available_bytes

__all__ = ["EVERYTHING", "Scenario", "rounds_of", "scenarios"]

MIB, GIB = 1 << 20, 1 << 30
EVERYTHING = (
    "limit",
    "fio",
    "snapstone",
    "snapstone-async",
    "dcp",
    "dcp-2",
    "dcp-async",
    "torch",
    "safetensors",
    "torch-checkpointing",
)
# On tmpfs there is no disk to overlap with and no limit to measure: blocking calls show the engines' own cost.
IN_MEMORY = ("snapstone", "dcp", "dcp-2", "torch", "safetensors")
# No target rests on these, so they go down to this many rounds when a scenario would take longer than it may.
EXPENDABLE = ("fio", "dcp-2", "safetensors", "torch-checkpointing")
ROUNDS_OF_SLOW_PEERS = 3
# The 2gb state, a second copy of it to load into, two staging copies (ours and a peer's) and the page cache.
MEMORY_FOR_2GB_BYTES = 13 * GIB


@dataclass(frozen=True, slots=True)
class Scenario:
    state: str  # "2gb" or "small"
    place: str  # "disk" or "tmpfs"
    size: int  # see states.build
    rounds: int
    engines: tuple[str, ...]
    host_memory_budget: int  # bytes, of the async saves: holds the whole state
    seconds_max: float  # where EXPENDABLE engines start losing rounds
    fence_parameters: int = 0  # parameters of the optimizer whose fenced saves are timed; 0: not timed
    drop_caches: bool = True  # of the whole machine, where this user may

    @property
    def title(self) -> str:
        return f"{self.state} on {self.place}"


def scenarios(*, states: Sequence[str], engines: Sequence[str] | None, rounds: int, quick: bool) -> list[Scenario]:
    """In the order they run. `quick` gives sizes that prove nothing but that everything works."""
    large = 1536 if memory_available_bytes() >= MEMORY_FOR_2GB_BYTES else 1024
    found = [
        Scenario("2gb", "disk", large, rounds, EVERYTHING, 3 * GIB, 210),
        Scenario("small", "disk", 10_000, rounds, EVERYTHING, 256 * MIB, 80, fence_parameters=2500),
        Scenario("2gb", "tmpfs", large, rounds, IN_MEMORY, 3 * GIB, 70),
        Scenario("small", "tmpfs", 10_000, rounds, IN_MEMORY, 256 * MIB, 50),
    ]
    if quick:
        found = [_quick(one) for one in found if one.title != "small on tmpfs"]
    return [
        dataclasses.replace(one, engines=tuple(name for name in one.engines if engines is None or name in engines))
        for one in found
        if one.state in states
    ]


def _quick(scenario: Scenario) -> Scenario:
    return dataclasses.replace(
        scenario,
        size=64 if scenario.state == "2gb" else 60,
        rounds=1,
        host_memory_budget=16 * MIB,
        fence_parameters=min(scenario.fence_parameters, 25),
        drop_caches=False,  # every other process of the machine would pay for it
    )


def rounds_of(seconds_of: Mapping[str, float], scenario: Scenario) -> dict[str, int]:
    """Rounds per engine, from the seconds that each took in the warm-up.

    All rounds for everybody; if that would take longer than `seconds_max`, fewer for the slowest engines that no target
    needs, one after another until it fits.
    """
    rounds = dict.fromkeys(seconds_of, scenario.rounds)
    for name in sorted(set(EXPENDABLE) & set(rounds), key=lambda name: -seconds_of[name]):
        if sum(seconds * (1 + rounds[one]) for one, seconds in seconds_of.items()) <= scenario.seconds_max:
            break
        rounds[name] = min(scenario.rounds, ROUNDS_OF_SLOW_PEERS)
    return rounds
