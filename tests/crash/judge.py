"""What a crash has left, judged by the package: what stands there that a reader takes for a checkpoint, whether it is
whole, and what it holds.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

import snapstone as ss
from crash.model import Contents, Tree
from durability import small
from snapstone import manifest

__all__ = ["ENGINE", "Expected", "Judge", "Reader", "engine_holds", "materialise"]

What = int | str  # a state of durability/small.py
_LINKED_BYTES_MIN = 4096  # larger files with equal bytes are one file with several names


def materialise(tree: Tree, contents: Contents, path: Path) -> None:
    """Real files of a tree."""
    linked: dict[int, Path] = {}

    def make(node: Tree, at: Path) -> None:
        if isinstance(node, tuple):
            at.mkdir(mode=0o700)
            for name, child in node:
                make(child, at / name)
        elif node in linked:
            at.hardlink_to(linked[node])
        else:
            at.write_bytes(contents[node])
            if len(contents[node]) >= _LINKED_BYTES_MIN:
                linked[node] = at

    make(tree, path)


@dataclass
class Expected:
    """Of the moment of a crash, by the name of a checkpoint: what success was reported of, and what was being saved.
    Nothing is asked of `others`.
    """

    reported: dict[str, What] = field(default_factory=dict)
    attempted: dict[str, list[What]] = field(default_factory=dict)
    others: frozenset[str] = frozenset()

    def begin(self, name: str, what: What) -> None:
        self.attempted.setdefault(name, []).append(what)

    def done(self, name: str, what: What) -> None:
        self.reported[name] = what
        self.attempted[name] = []

    def prune(self, name: str, what: What) -> None:
        """It may go now, in one piece."""
        self.attempted.setdefault(name, []).append(self.reported.pop(name, what))

    def note(self, mark: str) -> None:
        """`begin NAME WHAT`, `done NAME WHAT`, `prune NAME WHAT`."""
        verb, name, text = mark.split(" ")
        what = text if len(text) == len(small.ORIGIN) else int(text)
        {"begin": self.begin, "done": self.done, "prune": self.prune}[verb](name, what)

    def trouble(self, found: Mapping[str, What | str]) -> str:
        """What is wrong with what stands there; empty if nothing is."""
        for name in self.reported.keys() - found.keys() - self.others:
            return f"{name} is gone, of which success was reported"
        for name, what in found.items():
            if name in self.others:
                continue
            allowed = [*self.attempted.get(name, []), *([self.reported[name]] if name in self.reported else [])]
            if what not in allowed:
                return f"{name}: {what!r}, expected one of {allowed}"
        return ""


@dataclass(frozen=True)
class Reader:
    """How the checkpoints of a run are read."""

    start: Callable[[Path], None] | None = None  # what the next start does first: it gives names, and takes them
    # Which of them a checkpoint is, what is wrong with it, or None: not there yet. No function: of the engine's own.
    holds: Callable[[Path, Sequence[What]], What | None] | None = None


ENGINE = Reader()


class Judge:
    """Remembers what it has found in a directory: another with the same bytes is the same."""

    def __init__(self, scratch: Path, contents: Contents, whats: Sequence[What], reader: Reader = ENGINE) -> None:
        self._scratch = scratch
        self._contents = contents
        self._whats = whats
        self._reader = reader
        self._known: dict[Tree, What | None] = {}
        self.read = 0  # checkpoints

    def found(self, tree: Tree, run: Sequence[str]) -> dict[str, What | str]:
        """By name what the checkpoints in the run directory hold, or what is wrong with them. `run`: its path."""
        for name in run:
            tree = dict(tree).get(name, ()) if isinstance(tree, tuple) else ()
        if self._reader.start is not None:
            tree = self._started(tree, self._reader.start)
        found = ((name, self._holds(node)) for name, node in tree if not name.startswith("."))
        return {name: what for name, what in found if what is not None}

    def _started(self, tree: Tree, start: Callable[[Path], None]) -> Tree:
        path = self._scratch / "started"
        materialise(tree, self._contents, path)
        try:
            nodes = {(path / name).stat().st_ino: node for name, node in tree}
            start(path)
            return tuple((one.name, nodes[one.stat().st_ino]) for one in sorted(path.iterdir()))
        finally:
            shutil.rmtree(path)

    def _holds(self, node: Tree) -> What | None:
        if node not in self._known:
            self._known[node] = self._read(node)
        return self._known[node]

    def _read(self, node: Tree) -> What | None:
        self.read += 1
        path = self._scratch / "judged"
        materialise(node, self._contents, path)
        try:
            return (self._reader.holds or engine_holds)(path, self._whats)
        except StopIteration:
            return "verified, but the bytes of no state that was saved"
        except (ss.CheckpointError, OSError) as error:
            return f"{type(error).__name__}: {error}"
        finally:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def engine_holds(path: Path, whats: Sequence[What]) -> What | str:
    """Which of them it is, or what is wrong. StopIteration: none of them."""
    report = ss.verify(path)
    if not report:
        return f"verify: {report.problems[0]}"
    marker = path / manifest.DCP_MARKER_NAME
    if marker.exists() and marker.read_bytes() != manifest.DCP_MARKER:
        return f"{marker.name} is not what was written"
    return next(what for what in whats if _is(path, what))


def _is(path: Path, what: What) -> bool:
    tensors = {name for name, value in small.make(what).items() if isinstance(value, torch.Tensor)}
    return set(ss.Checkpoint.open(path).keys()) == tensors and small.load(path, what) == small.bits(small.make(what))
