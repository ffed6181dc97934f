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

from ... import _native, manifest
from ...errors import IncompatibleCheckpointError
from ..directories import make_directories
from .files import FOLDER, Files

__all__ = ["is_stub", "mend", "opened", "write_latest", "write_stubs"]

_MARK = "snapstone: stands for the file of this name; the content is in the directory beside it"
PENDING_NAME = ".snapstone-pending"
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
    return _MARK.encode() in _head(path)


def write_stubs(directory: str) -> None:
    """Puts stubs at the names of all files of the checkpoint in `directory`, durably. Replaces what is there.

    1. A file PENDING_NAME says so, if there are stock files of those names.
    2. Those go, and stubs of names that this checkpoint does not have.
    3. Stubs come, each in one step. PENDING_NAME goes.

    So a crash leaves names that are missing, or stubs of the save before, which give nothing; never files of two saves
    that load together. `mend` does the rest.
    """
    files = Files(directory)
    names = list(files.names())
    pending = os.path.join(directory, PENDING_NAME)
    here = {name for name in {*os.listdir(directory), *names} if os.path.isfile(os.path.join(directory, name))}
    stubs = {name for name in here if is_stub(os.path.join(directory, name))}
    gone = sorted((here & set(names)) ^ stubs)
    if here.intersection(names) - stubs:
        _replace(pending, lambda file: file.write(files.save_id.encode()))
        _native.sync_directory(directory, "stubs_begun")
    for name in gone:
        os.unlink(os.path.join(directory, name))
    folders = {directory, *(os.path.dirname(os.path.join(directory, name)) for name in names)}
    for folder in folders:
        make_directories(folder)
        _native.sync_directory(folder, "stubs_gone")
    for name in names:
        stub = _Stub(files.directory, name, files.save_id)
        _replace(os.path.join(directory, name), lambda file, stub=stub: torch.save(stub, file))  # type: ignore[misc]
    for folder in folders:
        _native.sync_directory(folder, "stubs")
    with suppress(FileNotFoundError):
        os.unlink(pending)


def mend(directory: str) -> None:
    """Ends a `write_stubs` that a crash has interrupted, or kept from its beginning: a name is missing, or has the stub
    of another save. Stock files that it has not begun to replace may be of a later save, and stay.
    """
    if not manifest.is_checkpoint(os.path.join(directory, FOLDER)):
        return
    files = Files(directory)
    heads = [_head(os.path.join(directory, name)) for name in files.names()]
    are_stubs = [_MARK.encode() in head for head in heads]
    if all(is_one and files.save_id.encode() in head for head, is_one in zip(heads, are_stubs, strict=True)):
        return
    has_stock = any(head and not is_one for head, is_one in zip(heads, are_stubs, strict=True))
    begun = files.save_id.encode() in _head(os.path.join(directory, PENDING_NAME))
    if not has_stock or (begun and not all(heads)):
        write_stubs(directory)


def write_latest(save_dir: str, tag: str) -> None:
    """Makes `tag` the one that DeepSpeed loads when it is told none, durably and in one step."""
    _replace(os.path.join(save_dir, "latest"), lambda file: file.write(tag.encode()))
    _native.sync_directory(save_dir, "latest")


def _replace(path: str, write: Callable[[BinaryIO], object]) -> None:
    fresh = os.path.join(os.path.dirname(path), f".fresh-{uuid.uuid4().hex}")
    try:
        with open(fresh, "xb") as file:
            write(file)
            file.flush()
            _native.sync_file(file.fileno(), path, "stub")
        os.replace(fresh, path)
    except BaseException:
        with suppress(FileNotFoundError):
            os.unlink(fresh)
        raise


def _head(path: str | os.PathLike[str]) -> bytes:
    """The file, if it is as small as stubs are; else as much as tells that it is there. Empty if it is not."""
    try:
        with open(path, "rb") as file:
            data = file.read(_BYTES_MAX + 1)
    except (FileNotFoundError, IsADirectoryError):
        return b""
    return data if len(data) <= _BYTES_MAX else data[:1]
