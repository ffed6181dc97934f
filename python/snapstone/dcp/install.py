"""Bare `checkpoint_id=` calls of DCP through the engine.

DCP chooses the storage of a bare path from two names of one of its modules; there is no hook. `install` puts the
engine's classes under these names, with a reader that takes a stock checkpoint where one stands.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch.distributed.checkpoint import _storage_utils

from .storage_reader import StorageReader
from .storage_writer import StorageWriter

__all__ = ["install", "installed", "uninstall"]

_REPLACEMENTS: dict[str, type] = {"FileSystemWriter": StorageWriter, "FileSystemReader": StorageReader}
_lock = threading.Lock()
_stock: dict[str, Any] = {}


def install() -> None:
    """From now on `dcp.save(state, checkpoint_id=path)`, `dcp.async_save` and `dcp.load` use the engine, in this
    process. Again is nothing.
    """
    with _lock:
        if not _stock:
            for name, replacement in _REPLACEMENTS.items():
                _stock[name] = getattr(_storage_utils, name)
                setattr(_storage_utils, name, replacement)


def uninstall() -> None:
    """Undoes `install`."""
    with _lock:
        for name, value in _stock.items():
            setattr(_storage_utils, name, value)
        _stock.clear()


@contextmanager
def installed() -> Iterator[None]:
    """`install` for the length of a `with` block."""
    install()
    try:
        yield
    finally:
        uninstall()
