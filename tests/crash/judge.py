"""What a crash has left, judged by the package: what stands there that a reader takes for a checkpoint, whether it is
whole, and what it holds.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

import snapstone as ss
from crash.model import Contents, Tree
from durability import small
from snapstone import manifest

__all__ = ["Expected", "Judge", "materialise"]

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

    def note(self, mark: str) -> None:
        """`begin NAME WHAT`, `done NAME WHAT`."""
        verb, name, text = mark.split(" ")
        what = text if len(text) == len(small.ORIGIN) else int(text)
        {"begin": self.begin, "done": self.done}[verb](name, what)

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


class Judge:
    """Remembers what it has found in a directory: another with the same bytes is the same."""

    def __init__(self, scratch: Path, contents: Contents, whats: Sequence[What]) -> None:
        self._scratch = scratch
        self._contents = contents
        self._whats = whats
        self._known: dict[Tree, What | str] = {}
        self.read = 0  # checkpoints

    def found(self, tree: Tree, run: Sequence[str]) -> dict[str, What | str]:
        """By name what the checkpoints in the run directory hold, or what is wrong with them. `run`: its path."""
        for name in run:
            tree = dict(tree).get(name, ()) if isinstance(tree, tuple) else ()
        return {name: self._holds(node) for name, node in tree if not name.startswith(".")}

    def _holds(self, node: Tree) -> What | str:
        if node not in self._known:
            self._known[node] = self._read(node)
        return self._known[node]

    def _read(self, node: Tree) -> What | str:
        self.read += 1
        path = self._scratch / "judged"
        materialise(node, self._contents, path)
        try:
            report = ss.verify(path)
            if not report:
                return f"verify: {report.problems[0]}"
            marker = path / manifest.DCP_MARKER_NAME
            if marker.exists() and marker.read_bytes() != manifest.DCP_MARKER:
                return f"{marker.name} is not what was written"
            return next(what for what in self._whats if _is(path, what))
        except StopIteration:
            return "verified, but the bytes of no state that was saved"
        except (ss.CheckpointError, OSError) as error:
            return f"{type(error).__name__}: {error}"
        finally:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def _is(path: Path, what: What) -> bool:
    tensors = {name for name, value in small.make(what).items() if isinstance(value, torch.Tensor)}
    return set(ss.Checkpoint.open(path).keys()) == tensors and small.load(path, what) == small.bits(small.make(what))
