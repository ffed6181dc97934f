"""The checkpoints of a run that a trainer keeps as step-N in one folder, whoever wrote them.

What counts as a checkpoint here is finished: in the engine's format, which is there completely or not at all, or with
the file that torch's own writers leave last. Whatever else has such a name neither counts nor is ever removed, and one
that was found damaged does not count either.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import shutil
import stat
import uuid
from contextlib import suppress

from .. import Checkpoint, _native, manifest
from ..errors import CorruptCheckpointError, IncompleteCheckpointError

__all__ = ["StepFolder"]

_STEP = re.compile(r"step-(0|[1-9]\d*)", re.ASCII)
_HF_MARK = "model.safetensors.index.json"
_REPLACED = ".replaced-"
_log = logging.getLogger("snapstone")


class StepFolder:
    """`newest` for resuming, `make_room` and `settle` around a save, `prune` for retention. Called on one rank."""

    def __init__(self, path: str) -> None:
        self.path = os.path.abspath(path)
        self._damaged: dict[str, str] = {}  # path: what is wrong

    def newest(self) -> int:
        """The highest step from which a run can be resumed, -1 if there is none.

        Of checkpoints in the engine's format manifest, indexes and the sizes of all files are checked; one that is
        damaged is passed over, with a warning.

        Raises:
            CorruptCheckpointError: there are checkpoints, and all are damaged. A new run would replace them.
            CheckpointError, OSError: one cannot be read at all now, by this version or from this place, which does not
                say that it is damaged.
        """
        self.put_back()
        self._damaged = {}
        for step, path in reversed(self.committed()):
            problem = _problem(path)
            if problem is None:
                return step
            _log.warning("%s is passed over: %s", path, problem)
            self._damaged[path] = problem
        for path, problem in self._damaged.items():
            raise CorruptCheckpointError(
                f"every checkpoint of {self.path} is damaged; move them away to begin anew. The newest: {problem}",
                path=path,
            )
        return -1

    def committed(self) -> list[tuple[int, str]]:
        """(step, path) of all finished checkpoints, lowest step first. OSError: of one it cannot be told."""
        found = []
        for name in self._names():
            match = _STEP.fullmatch(name)
            path = os.path.join(self.path, name)
            if match and _is_finished(path):
                found.append((int(match.group(1)), path))
        return sorted(found)

    def make_room(self, name: str, *, for_others: bool = False) -> None:
        """Moves aside what an engine's save would refuse to replace: what torch's writer left there, whole or not.

        It stays until `settle`; `newest` puts it back where the save never came to its end. With `for_others`, who
        write file by file into a directory, a checkpoint of the engine's moves too.
        """
        self.put_back()  # what was replaced in vain
        path, aside = os.path.join(self.path, name), os.path.join(self.path, _REPLACED + name)
        if os.path.islink(path) or not os.path.isdir(path) or (_is_whole(path) and not for_others):
            return
        if os.path.lexists(aside):  # and what came in its place is no worse
            shutil.rmtree(aside)
        os.rename(path, aside)

    def settle(self, name: str) -> list[str]:
        """After the save of `name` has become durable: what was moved aside for it, for somebody to remove."""
        aside = _REPLACED + name
        if not os.path.lexists(os.path.join(self.path, aside)):
            return []
        return self._out_of_sight([self._to_trash(aside)])

    def prune(self, keep_latest: int, durable: int) -> list[str]:
        """Takes all but the `keep_latest` highest steps out of sight, each in one rename, once step `durable` is: what
        is left of them, for somebody to remove. What a crash leaves of that the engine's next save removes.
        """
        self._damaged.pop(os.path.join(self.path, f"step-{durable}"), None)
        old = [(step, path) for step, path in self.committed() if path not in self._damaged][:-keep_latest]
        trash = []
        for step, path in old:
            if step != durable:
                with suppress(FileNotFoundError):  # another job prunes the same run
                    trash.append(self._to_trash(os.path.basename(path)))
        return self._out_of_sight(trash)

    def _names(self) -> list[str]:
        try:
            return sorted(os.listdir(self.path))
        except FileNotFoundError:
            return []

    def _to_trash(self, name: str) -> str:
        trash = os.path.join(self.path, f".trash-{uuid.uuid4().hex}")
        os.rename(os.path.join(self.path, name), trash)
        return trash

    def _out_of_sight(self, trash: list[str]) -> list[str]:
        """Once the renames are durable: a power cut would bring back what somebody has removed in part."""
        if trash:
            _native.sync_directory(self.path, "pruned")
        return trash

    def put_back(self) -> None:
        """What `make_room` moved for a save that never came to its end gets its name again."""
        for name in self._names():
            aside, path = os.path.join(self.path, name), os.path.join(self.path, name.removeprefix(_REPLACED))
            if not name.startswith(_REPLACED):
                continue
            if _is_finished(aside) and os.path.lexists(path) and not _is_finished(path):
                self._to_trash(os.path.basename(path))  # the part of a save that wrote file by file
            if not os.path.lexists(path):
                os.rename(aside, path)
            elif _is_whole(path):
                self._to_trash(name)  # the save did come to its end, and the job died before `settle`


def _is_whole(path: str) -> bool:
    return _is_file(os.path.join(path, manifest.MANIFEST_NAME))


def _is_file(path: str) -> bool:
    """As os.path.isfile, which takes what cannot be looked at now for what is not there."""
    try:
        return stat.S_ISREG(os.stat(path).st_mode)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
            return False
        raise


def _is_finished(path: str) -> bool:
    return _is_whole(path) or _is_stock(path)


def _is_stock(path: str) -> bool:
    marker = os.path.join(path, manifest.DCP_MARKER_NAME)
    if _is_whole(path):
        return False
    if not _is_file(marker):
        return _is_file(os.path.join(path, _HF_MARK))
    with open(marker, "rb") as file:  # or what a copy left of one of ours
        return file.read(len(manifest.DCP_MARKER)) != manifest.DCP_MARKER


def _problem(path: str) -> str | None:
    """What is damaged of a checkpoint of the engine's, as far as that can be told without reading its data."""
    if not _is_whole(path):
        return None
    try:
        document = Checkpoint.open(path).manifest
        for entry in (*document.shared, *(one for writer in document.writers for one in writer.data)):
            nbytes = os.stat(os.path.join(path, entry.name)).st_size
            if nbytes != entry.nbytes:
                return f"{entry.name} has {nbytes} bytes instead of {entry.nbytes}"
    except (CorruptCheckpointError, IncompleteCheckpointError, FileNotFoundError) as error:
        return str(error)
    return None
