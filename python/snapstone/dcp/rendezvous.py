"""How the ranks of one `dcp.save` find the staging directory that its coordinator made.

DCP gives a storage writer no process group, and with plan caching what the coordinator adds to a plan does not arrive:
ranks replay the plan of an earlier save. So the coordinator leaves a note beside the target, `.saving-<name>`, before
DCP hands out the plans. It holds no state of the checkpoint; a note that a crash leaves is overwritten by the next save
to the same target.
"""

from __future__ import annotations

import json
import os
import re
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

_NOTE_BYTES_MAX = 64 << 10
_SAVE_ID = re.compile(r"[0-9a-f]{32}")
_POLL_SECONDS = 0.05


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
    return os.path.join(target.parent, f".saving-{target.name}")


def _read(target: Target) -> Note | None:
    data = _native.read_file(target.parent, f".saving-{target.name}", _NOTE_BYTES_MAX)
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
