"""Classes that stand in for torch's FileSystemWriter and FileSystemReader, for code that constructs these by name.

A call makes the engine's writer or reader. For everything else they are the stock classes: one may derive from them, as
libraries do that are imported while they are installed, and gets stock behaviour; `isinstance` is true of both.
"""

from __future__ import annotations

from typing import Any

from torch.distributed.checkpoint import filesystem

from .storage_reader import StorageReader
from .storage_writer import StorageWriter

__all__ = ["FileSystemReader", "FileSystemWriter"]


class _StandIn(type(filesystem.FileSystemWriter)):  # type: ignore[misc]  # whatever its metaclass is
    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        make = _MAKERS.get(cls)
        return super().__call__(*args, **kwargs) if make is None else make(*args, **kwargs)

    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, _ALIKE[cls]) if cls in _ALIKE else super().__instancecheck__(instance)


class FileSystemWriter(filesystem.FileSystemWriter, metaclass=_StandIn):
    pass


class FileSystemReader(filesystem.FileSystemReader, metaclass=_StandIn):
    pass


def _reader(path: Any, _extension_registry: Any = None) -> Any:
    if _extension_registry is not None:  # transforms of the bytes of stock checkpoints, which ours have not
        return filesystem.FileSystemReader(path, _extension_registry)
    return StorageReader(path)


_MAKERS: dict[type, Any] = {FileSystemWriter: StorageWriter, FileSystemReader: _reader}
_ALIKE: dict[type, tuple[type, ...]] = {
    FileSystemWriter: (filesystem.FileSystemWriter, StorageWriter),
    FileSystemReader: (filesystem.FileSystemReader, StorageReader),
}
