"""What stands at the names of DeepSpeed's files: small files that give, to who reads them, what is in the engine's.

A stub is a file of torch.save whose one pickled call is `opened`. So `zero_to_fp32.py`, `ds_to_universal.py` and stock
DeepSpeed, all of which read with weights_only=False, get the verified content where snapstone is installed, and an
ImportError that names it where it is not. torch.load(weights_only=True) refuses a stub. The engine itself never
unpickles one: `is_stub` looks for its mark.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable
from contextlib import suppress
from typing import Any, BinaryIO

import torch

from ... import _native
from ...errors import IncompatibleCheckpointError
from .files import Files

__all__ = ["is_stub", "opened", "write_latest", "write_stubs"]

_MARK = "snapstone: stands for the file of this name; the content is in the directory beside it"
_BYTES_MAX = 1 << 16


class _Stub:
    def __init__(self, directory: str, name: str, save_id: str) -> None:
        self._arguments = (directory, name, save_id, _MARK)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str, ...]]:
        return opened, self._arguments


def opened(directory: str, name: str, save_id: str, _mark: str = "") -> dict[str, Any]:
    """What a stub stands for; `torch.load(stub, weights_only=False)` calls it.

    Raises:
        CheckpointError: it is not there (any more), or damaged. IncompatibleCheckpointError: another save has taken its
            place.
    """
    files = Files(directory)
    if files.save_id != save_id:
        raise IncompatibleCheckpointError(
            f"{name} stands for save {save_id}, and {directory} holds save {files.save_id}", path=directory
        )
    return files.load(name, weights_only=False)  # as whoever unpickles the stub has asked for


def is_stub(path: str | os.PathLike[str]) -> bool:
    """Whether there is a stub at `path`. Unpickles nothing."""
    try:
        if not 0 < os.path.getsize(path) <= _BYTES_MAX:
            return False
        with open(path, "rb") as file:
            return _MARK.encode() in file.read(_BYTES_MAX)
    except (FileNotFoundError, IsADirectoryError):
        return False


def write_stubs(directory: str) -> None:
    """Puts stubs at the names of all files of the checkpoint in `directory`, durably. Replaces what is there."""
    files = Files(directory)
    folders = {directory}
    for name in files.names():
        stub = _Stub(files.directory, name, files.save_id)
        path = os.path.join(directory, name)
        folders.add(os.path.dirname(path))
        _replace(path, lambda file, stub=stub: torch.save(stub, file))  # type: ignore[misc]
    for folder in folders:
        _native.sync_directory(folder)


def write_latest(save_dir: str, tag: str) -> None:
    """Makes `tag` the one that DeepSpeed loads when it is told none, durably and in one step."""
    _replace(os.path.join(save_dir, "latest"), lambda file: file.write(tag.encode()))
    _native.sync_directory(save_dir)


def _replace(path: str, write: Callable[[BinaryIO], object]) -> None:
    fresh = os.path.join(os.path.dirname(path), f".fresh-{uuid.uuid4().hex}")
    try:
        with open(fresh, "xb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(fresh, path)
    except BaseException:
        with suppress(FileNotFoundError):
            os.unlink(fresh)
        raise
