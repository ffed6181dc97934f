"""The committed checkpoints of a run, looked at again and again: a manifest is read once for each of its versions."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ..run_directory import committed_at, find_checkpoints

if TYPE_CHECKING:
    from .. import Checkpoint

__all__ = ["Durable", "DurableCheckpoints"]


@dataclass(frozen=True, slots=True)
class Durable:
    """One checkpoint. `committed_at`: seconds since the epoch. `stored_bytes`: what its own save wrote. All of these
    are None, and `problems` says why, when its manifest cannot be used.
    """

    path: str
    committed_at: float | None
    step: int | None = None
    nbytes: int | None = None
    stored_bytes: int | None = None
    world_size: int | None = None
    problems: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return os.path.basename(os.path.abspath(self.path))


_Version = tuple[tuple[int, int, int] | None, ...]


class DurableCheckpoints:
    """Looks at a run directory. Threads: one at a time."""

    def __init__(self, run: str) -> None:
        self._run = run
        self._known: dict[str, tuple[_Version, Durable, Checkpoint | None]] = {}

    def look(self) -> list[Durable]:
        """By the time of their commit, those without one first. Raises OSError when the run cannot be listed.

        The files that a manifest names are looked for when it is new, and for the newest checkpoint every time.
        """
        known = dict(self._entries())
        self._known = known
        found = sorted(known.values(), key=lambda entry: (entry[1].committed_at or 0.0, entry[1].path))
        durable = [entry[1] for entry in found]
        if found and found[-1][2] is not None:
            durable[-1] = replace(durable[-1], problems=tuple(_wrong_files(found[-1][2])))
        return durable

    def _entries(self) -> Iterator[tuple[str, tuple[_Version, Durable, Checkpoint | None]]]:
        for path in find_checkpoints(self._run):
            version = tuple(_version(os.path.join(path, name)) for name in ("MANIFEST.json", "MANIFEST.xxh128"))
            known = self._known.get(path)
            if known is not None and known[0] == version:
                yield path, known
                continue
            durable, checkpoint = _opened(path)
            if os.path.isdir(path):  # not removed meanwhile
                yield path, (version, durable, checkpoint)


def _version(path: str) -> tuple[int, int, int] | None:
    try:
        facts = os.lstat(path)
    except OSError:
        return None
    return facts.st_ino, facts.st_mtime_ns, facts.st_size


def _opened(path: str) -> tuple[Durable, Checkpoint | None]:
    from .. import Checkpoint, CheckpointError

    written = committed_at(path)
    try:
        checkpoint = Checkpoint(path)  # reads the manifest alone
    except CheckpointError as error:
        return Durable(path, written, problems=(str(error),)), None
    except OSError as error:
        return Durable(path, written, problems=(f"{error.filename or path}: {error.strerror or error}",)), None
    durable = Durable(
        path,
        written,
        checkpoint.step,
        checkpoint.nbytes,
        checkpoint.own_nbytes,
        checkpoint.world_size,
        tuple(_wrong_files(checkpoint)),
    )
    return durable, checkpoint


def _wrong_files(checkpoint: Checkpoint) -> Iterator[str]:
    """Files that the manifest names and that are not there, or not as long as it says."""
    manifest = checkpoint.manifest
    for entry in (*(file for writer in manifest.writers for file in (writer.index, *writer.data)), *manifest.shared):
        path = os.path.join(checkpoint.path, entry.name)
        try:
            nbytes = os.lstat(path).st_size
        except FileNotFoundError:
            if os.path.isdir(checkpoint.path):
                yield f"{path}: file is missing"
        except OSError as error:
            yield f"{path}: {error.strerror}"
        else:
            if nbytes != entry.nbytes:
                yield f"{path}: {nbytes} bytes instead of {entry.nbytes}"
