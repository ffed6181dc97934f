"""What happens in one history, drawn from its seed: how many ranks do what, over which network, what befalls them."""

from __future__ import annotations

import errno
import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from simulation.world import Process

__all__ = ["Fault", "Scenario", "draw"]

Operation = Literal["save", "overwrite", "delta", "load"]
FOREVER = math.inf
STEPS_OF_RANK = 45  # of one operation, about
EARLY_S = 0.4  # by when an undisturbed one has ended, about

SAVE_STEPS = ("share", "start", "write_file", "sync", "look", "withdraw")
LEAD_STEPS = ("reap", "create", "keep_shared", "commit", "committed", "discard", "set outcome/broadcast")
SAVE_VOTES = ("plan", "assign", "open", "written")
LOAD_STEPS = ("messages", "all_gather", "post 1", "post 2", "fail")
LOAD_VOTES = ("open", "indexes", "plan", "needs", "boxes", "segment", "mapped", "round-0", "sent-0", "round-1", "read")
# Where a rank of a load fails by itself: before these votes; before and after it reads, "joint" and "filled", for the
# vote "read"; as it waits for its bytes.
READ_STEPS = (
    "open",
    "indexes",
    "plan",
    "needs",
    "boxes",
    "segment",
    "mapped",
    "segments",
    "rounds",
    "round-0",
    "round-1",
)
READ_STEPS += ("joint", "wait", "wait", "filled", "fill")

# Which calls of a commit fail, and whether it is visible then.
COMMIT_ERRORS = {
    "fsync:1:errno=EIO": False,
    "fsync:3:errno=ENOSPC": False,
    "renameat2:1:errno=EIO": False,
    "fsync:4:errno=EIO": True,
}


@dataclass
class Fault:
    """`when`: a number or name of a step of the rank, or seconds. `fired` once it has happened, at `fired_s`."""

    kind: str
    rank: int
    when: int | str | float
    seconds: float = 0.0
    rules: str = ""
    fired: bool = False
    fired_s: float = 0.0

    def __str__(self) -> str:
        more = f" for {self.seconds:.2f} s" if self.seconds else f" ({self.rules})" if self.rules else ""
        at = f"at {self.when:.3f} s" if isinstance(self.when, float) else f"at step {self.when!r}"
        return f"{self.kind} rank {self.rank} {at}{more}"


@dataclass
class Scenario:
    seed: int
    world_size: int
    operation: Operation
    store: Literal["rank 0", "launcher", "file"]
    timeout_s: float
    latency_s: float
    slow: float
    strategy: str
    node_count: int
    writers: int
    faults: list[Fault] = field(default_factory=list)

    def __str__(self) -> str:
        what = self.operation + (f" ({self.strategy}, {self.node_count} nodes)" if self.operation == "load" else "")
        network = f"store of {self.store}, timeout {self.timeout_s:.1f} s, latency {self.latency_s * 1e3:.2f} ms"
        told = "; ".join(map(str, self.faults)) or "no fault"
        return f"seed {self.seed}: {what} on {self.world_size} ranks, {network}; {told}"


def draw(seed: int) -> Scenario:
    luck = random.Random(seed)
    size = luck.choices(
        [2, 3, 4, luck.randint(5, 8), luck.randint(9, 16), luck.randint(17, 64)], [30, 27, 20, 19, 3, 1]
    )[0]
    operation: Operation = luck.choices(["save", "overwrite", "delta", "load"], [45, 20, 10, 25])[0]  # type: ignore[assignment]
    scenario = Scenario(
        seed,
        size,
        operation,
        luck.choice(["rank 0", "rank 0", "launcher", "file"]),
        luck.uniform(0.7, 1.6),
        luck.choice([50e-6, 200e-6, 1e-3]),
        luck.choice([1.0, 50.0]),
        luck.choice(["scatter", "scatter", "broadcast", "auto"]),
        luck.randint(1, min(size, 4)),
        luck.choice([2, 8]),
    )
    for _ in range(luck.choices([0, 1, 2, 3], [3, 55, 30, 12])[0]):
        scenario.faults.append(_fault(luck, scenario))
    if seed % 16 in ((7, 15) if operation == "load" else (15,)):
        _add_read_error(scenario)
    return scenario


def _add_read_error(scenario: Scenario) -> None:
    """Drawn apart from all else, so that other seeds stay what they were before this fault came."""
    luck = random.Random(f"read error {scenario.seed}")
    if luck.random() < 0.5:
        scenario.faults.clear()
    rank, loads = luck.randrange(scenario.world_size), scenario.operation == "load"
    place = luck.choice(READ_STEPS) if loads else "state" if rank else luck.choice(("state", "assign"))
    scenario.faults.append(Fault("read error", rank, place))


def _fault(luck: random.Random, scenario: Scenario) -> Fault:
    rank = luck.choice([0, luck.randrange(scenario.world_size), scenario.world_size - 1])
    kinds = ["kill", "kill", "stop", "stop", "cut", "reset", "interrupt", "leave"]
    if scenario.operation != "load":
        kinds += ["write error", "slow write", "commit error", "commit dies"]
    kind = luck.choice(kinds)
    fault = Fault(kind, rank, _when(luck, scenario, rank))
    if kind in ("stop", "cut"):
        fault.seconds = luck.choice(
            [FOREVER, luck.uniform(0.0, 0.3), luck.uniform(0.5, 2.0) * scenario.timeout_s, scenario.timeout_s + 0.9]
        )
    elif kind == "slow write":
        fault.seconds = luck.uniform(0.3, 1.5) * scenario.timeout_s
    elif kind.startswith("commit"):
        fault.rank = 0
        fault.rules = luck.choice(list(COMMIT_ERRORS))
    return fault


def _when(luck: random.Random, scenario: Scenario, rank: int) -> int | str | float:
    loads = scenario.operation == "load"
    label = luck.choice(LOAD_VOTES if loads else SAVE_VOTES)
    names = [f"set {label}/vote/{rank}", f"set {label}/outcome/{rank}", f"claim {label}/decision"]
    names += LOAD_STEPS if loads else SAVE_STEPS
    if rank == 0 and not loads:
        names += LEAD_STEPS * 2
    return luck.choice(
        [
            luck.choice(names),
            luck.choice(names),
            luck.randint(1, STEPS_OF_RANK),
            luck.uniform(0.0, EARLY_S),
            scenario.timeout_s + luck.uniform(-0.1, 1.6),
        ]
    )


def arm(fault: Fault, process: Process) -> None:
    """Sees to it that the fault befalls the process."""
    befalls = _effect(fault, process)

    def fire() -> None:
        if process.alive and not process.facts.get("spared"):
            fault.fired, fault.fired_s = True, process.world.now
            befalls()

    if fault.kind in ("write error", "read error", "slow write", "leave") or fault.kind.startswith("commit"):
        fire()  # at its own place; who draws it has said so
    elif isinstance(fault.when, float):
        process.world.at(fault.when, fire)
    else:
        process.at_step[fault.when] = fire


def _effect(fault: Fault, process: Process) -> Callable[[], None]:
    facts = process.facts
    return {
        "kill": process.kill,
        "stop": lambda: process.stop(fault.seconds),
        "cut": lambda: process.cut(fault.seconds),
        "reset": lambda: [one.reset() for one in facts["connections"][1:]] and None,
        "interrupt": process.interrupt,
        "leave": lambda: facts.update(leaves=True),
        "write error": lambda: facts.update(write_error=OSError(errno.EIO, "write error of the simulation")),
        "read error": lambda: facts.update(read_error=(fault.when, OSError(errno.EIO, "read error of the simulation"))),
        "slow write": lambda: facts.update(slow_write=fault.seconds),
        "commit error": lambda: facts.update(commit=(fault.rules, False)),
        "commit dies": lambda: facts.update(commit=(fault.rules, True)),
    }[fault.kind]
