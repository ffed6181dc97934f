"""Target: where a checkpoint goes, and what makes a place fit for one."""

from __future__ import annotations

import errno
import operator
import os
import re
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from . import _native, manifest, values
from .collective import Deadline

__all__ = ["STEPS", "Target"]

STEPS = range(-(1 << 63), 1 << 63)

_NAME = re.compile(r"(?!\.)[A-Za-z0-9._=+,@-]{1,128}")  # a trainer's "epoch=3-step=1000.ckpt" too
_JOIN_PATIENCE_SECONDS = 90.0  # network file systems cache missing directory entries for a minute


@dataclass(frozen=True, slots=True)
class Target:
    """Where a checkpoint goes and what its manifest says beside the tensors."""

    path: str
    step: int | None
    metadata: Mapping[str, Any]  # typed JSON

    @classmethod
    def of(cls, checkpoint_id: str | os.PathLike[str], step: int | None, metadata: Mapping[str, Any] | None) -> Target:
        """Checks what a caller gave: TypeError, ValueError for what no manifest can hold."""
        if isinstance(step, bool):
            raise TypeError(f"step={step!r}: must be an integer")
        number = None if step is None else operator.index(step)
        if number is not None and number not in STEPS:
            raise ValueError(f"step={number}: must fit into 64 bits")
        encoded = {}
        if not isinstance(metadata, Mapping | None):
            raise TypeError(f"metadata must be a mapping, not a {type(metadata).__name__}")
        for key, value in (metadata or {}).items():
            if type(key) is not str:
                raise TypeError(f"metadata has the key {key!r}: keys must be strings")
            encoded[key] = values.encode(value, name=f"metadata[{key!r}]")
        return cls(os.path.abspath(os.fspath(checkpoint_id)), number, encoded)

    @property
    def parent(self) -> str:
        return os.path.dirname(self.path)

    @property
    def name(self) -> str:
        return os.path.basename(self.path)

    def check(self, *, overwrite: bool) -> None:
        """Raises ValueError for a name that no checkpoint can have, FileExistsError for a place that is taken."""
        if not _NAME.fullmatch(self.name):
            raise ValueError(
                f"checkpoint_id={self.path!r}: the last component must be 1 to 128 of "
                "A-Z a-z 0-9 . _ - = + , @ and not start with '.'"
            )
        if manifest.is_checkpoint(self.parent):
            raise ValueError(f"checkpoint_id={self.path!r}: {self.parent} is a checkpoint, which holds nothing else")
        # A link to a checkpoint is not one: replacing the link is not what was asked for.
        if os.path.lexists(self.path) and not (overwrite and self._is_replaceable()):
            remedy = (
                "it is not a checkpoint, or holds other things too, so it is not replaced"
                if overwrite
                else "pass overwrite=True to replace it"
            )
            raise FileExistsError(errno.EEXIST, f"target exists; {remedy}", self.path)

    def _is_replaceable(self) -> bool:
        """A checkpoint, damaged or not, and nothing else: what is replaced is deleted."""
        while True:
            looked_at = _identity(self.path)
            try:
                if looked_at is None or self._holds_a_checkpoint_alone():
                    return True
            except FileNotFoundError:
                pass
            if _identity(self.path) == looked_at:  # and no save or compaction has taken its place meanwhile
                return False

    def _holds_a_checkpoint_alone(self) -> bool:
        if not manifest.is_checkpoint(self.path) or os.path.islink(self.path):
            return False
        names = set(os.listdir(self.path))
        if manifest.BASE_NAME in names and not _holds_shared_files(os.path.join(self.path, manifest.BASE_NAME)):
            return False
        return all(map(manifest.is_file_of_checkpoint, names - {manifest.BASE_NAME}))

    def remove_empty(self) -> None:
        """Removes an empty directory that stands there."""
        with suppress(OSError):
            os.rmdir(self.path)

    def make_parents(self) -> None:
        """Makes what is missing above the checkpoint, each entry durable, so that it cannot lose its parents."""
        missing = []
        path = self.parent
        while not os.path.isdir(path):
            missing.append(path)
            path = os.path.dirname(path)
        for directory in reversed(missing):
            parent, name = os.path.split(directory)
            with suppress(FileExistsError):
                _native.make_directory(parent, name)
            _native.sync_directory(parent, "parents")

    def join_staging(self, save_id: str, deadline: Deadline, check: Callable[[], None]) -> Any:
        """Opens rank 0's staging directory, waiting until a network file system shows it. `check` raises when there is
        nothing to wait for any more.
        """
        patience = Deadline(min(_JOIN_PATIENCE_SECONDS, deadline.remaining()))
        while True:
            try:
                return _native.Staging.join(self.parent, save_id)
            except FileNotFoundError:
                check()
                if patience.expired:
                    raise
                time.sleep(0.05)


def _identity(path: str) -> tuple[int, int] | None:
    try:
        facts = os.lstat(path)
    except FileNotFoundError:
        return None
    return facts.st_dev, facts.st_ino


def _holds_shared_files(directory: str) -> bool:
    """And nothing else; false for a link or a file in the place of the directory."""
    if os.path.islink(directory) or not os.path.isdir(directory):
        return False
    with os.scandir(directory) as entries:
        return all(manifest.is_shared_file(one.name) and one.is_file(follow_symlinks=False) for one in entries)
