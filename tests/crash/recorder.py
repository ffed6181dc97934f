"""How a scenario is run and what it changes on the disk recorded."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from crash import journal
from crash.explore import Recording
from crash.journal import Op
from crash.judge import ENGINE, Expected, Judge, Reader, What
from crash.model import Contents, Tree, World
from crash.python_calls import python_calls
from durability.based import forget
from durability.chain import CHUNK_BYTES
from snapstone import _native

__all__ = ["Act", "Recorder", "Scenario", "record"]

Act = Callable[[Path, "Recorder"], None]


@dataclass
class Recorder:
    """For a scenario: `path` of the journal, rules of faults that are armed in all that it does."""

    path: Path
    rules: str

    @contextmanager
    def faults(self, rules: str = "") -> Iterator[None]:
        _native.fault_arm(";".join(filter(None, (self.rules, rules))))
        try:
            yield
        finally:
            _native.fault_disarm()

    @contextmanager
    def python(self) -> Iterator[None]:
        """With what Python changes itself, in one thread."""
        with self(), python_calls(self.path):
            yield

    @contextmanager
    def __call__(self, rules: str = "") -> Iterator[None]:
        with journal.recorded(self.path), self.faults(rules):
            yield


@dataclass(frozen=True)
class Scenario:
    name: str
    prepare: Callable[[Path], None]  # is durable, but for what `unsynced` names
    act: Act
    reported: dict[str, What]  # after `prepare`
    whats: tuple[What, ...]
    run: tuple[str, ...] = ("run",)
    io: str = ""  # SNAPSTONE_IO
    unsynced: Callable[[Path], bool] = lambda _: False
    others: frozenset[str] = frozenset()
    damaged: frozenset[str] = frozenset()  # reported in the form that they have after `prepare`
    clients: bool = False
    reader: Reader = ENGINE


def record(scenario: Scenario, scratch: Path, skipped: str = "") -> Recording:
    """The scenario run, without the step `skipped` (sync/NAME)."""
    root = scratch / "recorded"
    root.mkdir()
    run = root.joinpath(*scenario.run)
    path = scratch / f"{scenario.name}.journal"
    path.unlink(missing_ok=True)
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("SNAPSTONE_CHUNK_BYTES", str(CHUNK_BYTES))
        if scenario.io and not _native.try_rung(str(root), scenario.io):
            patched.setenv("SNAPSTONE_IO", scenario.io)
        try:
            scenario.prepare(run)
            world = World.of(root, Contents(), unsynced=scenario.unsynced, clients=scenario.clients)
            forget()
            scenario.act(run, Recorder(path, f"{skipped}:1+:skip" if skipped else ""))
            expected = Expected(dict(scenario.reported), {}, scenario.others)
            if scenario.damaged:
                there = Judge(scratch, world.contents, scenario.whats).found(world.live_tree(), scenario.run)
                expected.reported |= {name: there[name] for name in scenario.damaged}
            ops = journal.read(path)
            assert replayed(world, ops) == World.of(root, world.contents, unsynced=scenario.unsynced).live_tree()
            return Recording(scenario.name, world, ops, scenario.run, expected, scenario.whats, scenario.reader)
        finally:
            _native.journal_stop()
            shutil.rmtree(root)


def replayed(world: World, ops: list[Op]) -> Tree:
    """What the scenario has left, if all that it did was recorded."""
    world = copy.deepcopy(world)
    for op in ops:
        world.apply(op)
    return world.live_tree()
