"""How the ranks of one `dcp.save` find the staging directory that its coordinator made.

DCP gives a storage writer no process group, and with plan caching what the coordinator adds to a plan does not arrive:
ranks replay the plan of an earlier save. So the coordinator leaves a note beside the target, `.saving-<name>`, before
DCP hands out the plans. It holds no state of the checkpoint; a note that a crash leaves is overwritten by the next save
to the same target, or removed by a later save to the same directory.
"""

from __future__ import annotations

import json
import os
import re
import stat
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from .. import _native
from ..collective import Deadline
from ..errors import CheckpointError
from ..manifest import Base, base_of
from ..target import Target

__all__ = ["Note"]

_PREFIX = ".saving-"
_NOTE_BYTES_MAX = 64 << 10
_SAVE_ID = re.compile(r"[0-9a-f]{32}")
_TEMPORARY = re.compile(r"\.saving-.+\.[0-9a-f]{32}", re.DOTALL)
_POLL_SECONDS = 0.05
_STALE_SECONDS = 600.0


@dataclass(frozen=True, slots=True)
class Note:
    save_id: str
    world_size: int
    base_path: str = ""
    base: Base | None = None

    def leave(self, target: Target) -> None:
        path = _path(target)
        temporary = f"{path}.{self.save_id}"
        with open(temporary, "w", encoding="ascii") as file:
            base = self.base and self.base.to_json()
            document = {"save_id": self.save_id, "world_size": self.world_size, "base_path": self.base_path}
            json.dump({**document, "base": base}, file)
        os.replace(temporary, path)

    def remove(self, target: Target) -> None:
        with suppress(OSError):
            if _read(target) == self:
                os.unlink(_path(target))

    @staticmethod
    def remove_stale(parent: str) -> None:
        """Removes this user's notes whose staging directory is gone, once they are ten minutes old: until then a save
        may be about to write one, or a network file system may not show the directory yet.
        """
        with suppress(OSError), os.scandir(parent) as entries:
            for entry in entries:
                if entry.name.startswith(_PREFIX):
                    with suppress(OSError, CheckpointError):
                        _remove_if_stale(parent, entry)

    @staticmethod
    def follow(target: Target, deadline: Deadline) -> tuple[Note, Any]:
        """The coordinator's note and its staging directory. A network file system may show an older note for a while,
        whose directory is gone.
        """
        while True:
            try:
                note = _read(target)
                if note is not None:
                    return note, _native.Staging.join(target.parent, note.save_id)
            except FileNotFoundError:
                pass
            if deadline.expired:
                raise CheckpointError("the coordinator's staging directory never appeared", path=target.path)
            time.sleep(_POLL_SECONDS)


def _path(target: Target) -> str:
    return os.path.join(target.parent, _PREFIX + target.name)


def _remove_if_stale(parent: str, entry: os.DirEntry[str]) -> None:
    facts = entry.stat(follow_symlinks=False)
    if not stat.S_ISREG(facts.st_mode) or facts.st_uid != os.geteuid():
        return
    if abs(time.time() - facts.st_mtime) <= _STALE_SECONDS:  # a time in the future is that of a wrong clock
        return
    note = _parsed(_native.read_file(parent, entry.name, _NOTE_BYTES_MAX))
    if note is None and facts.st_size and not _TEMPORARY.fullmatch(entry.name):
        return  # no note of ours
    if note is None or not os.path.lexists(os.path.join(parent, f".staging-{note.save_id}")):
        now = os.lstat(entry.path)
        if (now.st_ino, now.st_mtime_ns) == (facts.st_ino, facts.st_mtime_ns):  # and not that of a save begun since
            os.unlink(entry.path)


def _read(target: Target) -> Note | None:
    return _parsed(_native.read_file(target.parent, _PREFIX + target.name, _NOTE_BYTES_MAX))


def _parsed(data: bytes) -> Note | None:
    try:
        document = json.loads(data)
        base = document.get("base")
        if not _SAVE_ID.fullmatch(document["save_id"]):  # it becomes part of a path
            return None
        return Note(
            document["save_id"],
            int(document["world_size"]),
            str(document.get("base_path", "")),
            None if base is None else base_of(base),
        )
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError):
        return None
