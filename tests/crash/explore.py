"""Every moment of a recorded scenario, cut: the states that a crash leaves there, judged; and the next start after some
of them, cut in its turn.
"""

from __future__ import annotations

import copy
import random
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import snapstone as ss
from crash import journal
from crash.choices import choices, state_of
from crash.journal import MARK, Op
from crash.judge import ENGINE, Expected, Judge, Reader, What, materialise
from crash.model import Tree, World
from durability import small
from durability.based import forget

__all__ = ["Explorer", "Found", "Recording"]

RECOVERED: What = 8
REPLACED: What = 9


@dataclass
class Recording:
    """What a scenario did, from the state that it found."""

    name: str
    world: World  # before the first of `ops`
    ops: list[Op]
    run: tuple[str, ...]  # of the run directory, below the world's root
    expected: Expected  # before the first
    whats: tuple[What, ...]
    reader: Reader = ENGINE


@dataclass
class Found:
    states: int = 0  # all different, from one recording
    cuts: int = 0
    drawn: int = 0
    recoveries: int = 0
    recovery_states: int = 0
    checkpoints_read: int = 0
    seconds: float = 0.0
    violations: list[str] = field(default_factory=list)  # "SCENARIO:CUT:STATE[/CUT:STATE]: what is wrong"

    def add(self, other: Found) -> None:
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)


class Explorer:
    """`draws` random states at each cut, and the next start after one state in `recover_every` (0: after none)."""

    def __init__(
        self, recording: Recording, scratch: Path, *, draws: int, seed: int, recover_every: int = 0, stop: int = 20
    ) -> None:
        self.recording = recording
        self._scratch = scratch
        self._draws, self._seed, self._stop = draws, seed, stop
        self._recover_every = recover_every if recording.reader == ENGINE else 0  # by the engine's own saves
        whats = (*recording.whats, RECOVERED, REPLACED)
        self._judge = Judge(scratch, recording.world.contents, whats, recording.reader)
        self._random = random.Random(seed)

    def run(self) -> Found:
        found, begin = Found(), time.monotonic()
        for cut, text, tree, expected in self._states(self.recording, found):
            place = f"{self.recording.name}:{cut}:{text}"
            if trouble := expected.trouble(self._judge.found(tree, self.recording.run)):
                found.violations.append(f"{place}: {trouble}")
            elif self._recover_every and self._random.randrange(self._recover_every) == 0:
                self._recover(place, tree, expected, found)
            if len(found.violations) >= self._stop:
                break
        found.checkpoints_read = self._judge.read
        found.seconds = time.monotonic() - begin
        return found

    def replay(self, cut: int, text: str) -> tuple[Tree, str]:
        """The state that `run` names so, and what is wrong with it."""
        world, expected = copy.deepcopy(self.recording.world), copy.deepcopy(self.recording.expected)
        for op in self.recording.ops[:cut]:
            _advance(world, expected, op)
        tree = state_of(world, text)
        return tree, expected.trouble(self._judge.found(tree, self.recording.run))

    def _states(self, recording: Recording, found: Found) -> Iterator[tuple[int, str, Tree, Expected]]:
        """Each state once, unless more is expected of it later."""
        world, expected = copy.deepcopy(recording.world), copy.deepcopy(recording.expected)
        seen: set[tuple[Tree, str]] = set()
        for cut in range(len(recording.ops) + 1):
            found.cuts += 1
            asked = f"{expected.reported}{expected.attempted}"
            for text in choices(world, self._draws, self._seed + 1000 * cut):
                found.drawn += 1
                tree = state_of(world, text)
                if (tree, asked) not in seen:
                    seen.add((tree, asked))
                    found.states += 1
                    yield cut, text, tree, expected
            if cut < len(recording.ops):
                _advance(world, expected, recording.ops[cut])

    def _recover(self, place: str, tree: Tree, expected: Expected, found: Found) -> None:
        """The next start: a save beside what is there, one in the place of it; then the same, cut at every moment."""
        found.recoveries += 1
        root = self._scratch / "recovery"
        materialise(tree, self.recording.world.contents, root)
        try:
            recording = self._restart(place, tree, root, expected)
        except (ss.CheckpointError, OSError) as error:
            found.violations.append(f"{place}/: the next save failed: {error}")
            return
        finally:
            shutil.rmtree(root)
        counts = Found()
        for cut, text, state, asked in self._states(recording, counts):
            if trouble := asked.trouble(self._judge.found(state, recording.run)):
                found.violations.append(f"{place}/{cut}:{text}: {trouble}")
                break
        found.recovery_states += counts.states

    def _restart(self, place: str, tree: Tree, root: Path, expected: Expected) -> Recording:
        run = root.joinpath(*self.recording.run)
        there = self._judge.found(tree, self.recording.run)
        known = Expected({name: what for name, what in there.items() if name not in expected.others})
        known.others = expected.others
        world = World.of(root, self.recording.world.contents, unsynced=lambda _: False)
        path = self._scratch / "recovery.journal"
        path.unlink(missing_ok=True)
        forget()
        with journal.recorded(path):
            save(run, "recovered", RECOVERED)
            for name in sorted(known.reported)[:1]:
                save(run, name, REPLACED, overwrite=True)
        after = World.of(root, self.recording.world.contents, unsynced=lambda _: False).live_tree()
        left = [name for name in small.leftovers(run) if name.startswith(".trash-")]
        recording = Recording(place, world, journal.read(path), self.recording.run, known, self.recording.whats)
        final = copy.deepcopy(known)
        for op in recording.ops:
            if op.kind == MARK:
                final.note(op.name)
        trouble = final.trouble(self._judge.found(after, self.recording.run))
        if trouble or left:
            raise ss.CheckpointError(trouble or f"left behind: {left}")
        return recording


def _advance(world: World, expected: Expected, op: Op) -> None:
    if op.kind == MARK:
        expected.note(op.name)
    else:
        world.apply(op)


def save(run: Path, name: str, what: What, **options: object) -> None:
    """A save whose beginning and success are in the journal."""
    journal.mark(f"begin {name} {what}")
    ss.save(small.make(what), checkpoint_id=run / name, **options)  # type: ignore[arg-type]
    journal.mark(f"done {name} {what}")
