"""DCP's own calls through the engine, where code that cannot be changed makes them.

There is no hook. DCP chooses the storage of a bare path from two names of one of its modules; others construct
`FileSystemWriter` and `FileSystemReader` by their public names. `install` puts the engine's classes in both places,
with a reader that takes a stock checkpoint where one stands, and, if asked to, a `save` that returns early.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import _storage_utils, state_dict_saver

from . import stand_in
from .background import saves
from .storage_reader import StorageReader
from .storage_writer import StorageWriter

__all__ = ["install", "installed", "uninstall"]

_CLASSES: list[tuple[Any, str, Any]] = [
    (_storage_utils, "FileSystemWriter", StorageWriter),
    (_storage_utils, "FileSystemReader", StorageReader),
    (dcp, "FileSystemWriter", stand_in.FileSystemWriter),
    (dcp, "FileSystemReader", stand_in.FileSystemReader),
]
_lock = threading.RLock()
_stock: dict[tuple[Any, str], Any] = {}


def install(*, asynchronous: bool = False, in_flight: int = 2) -> None:
    """From now on `dcp.save(state, checkpoint_id=path)`, `dcp.async_save` and `dcp.load` use the engine, in this
    process, and so does whoever constructs `torch.distributed.checkpoint.FileSystemWriter` or `FileSystemReader` by
    these names. Again is nothing, but for the arguments, of which the last ones count.

    Args:
        asynchronous: let `torch.distributed.checkpoint.save` return a SaveHandle as soon as the state may change. The
            rest happens in the background: `snapstone.wait()` waits for it, and raises its errors. A load of the same
            path waits first, and so does the next save of it. Saves through other storage than the engine's stay as
            they are. The same on every rank.
        in_flight: how many such saves may be under way, each with a copy of its state in host memory; the next one
            waits for the oldest.

    Raises:
        ValueError: `in_flight` is not positive.
    """
    if in_flight < 1:
        raise ValueError(f"in_flight={in_flight}: must be at least 1")
    with _lock:
        for owner, name, replacement in _CLASSES:
            _replace(owner, name, replacement)
        if asynchronous:
            saves.in_flight_max = in_flight
            _replace(dcp, "save", _save)
        else:
            _restore(dcp, "save")


def uninstall() -> None:
    """Undoes `install`: every name is what it was. Saves that are under way end as they would have."""
    with _lock:
        for owner, name in list(_stock):
            _restore(owner, name)
        saves.free()


@contextmanager
def installed(*, asynchronous: bool = False, in_flight: int = 2) -> Iterator[None]:
    """`install` for the length of a `with` block; then it is as it was before, installed or not."""
    with _lock:
        before = bool(_stock)
        was_asynchronous, was_in_flight = (dcp, "save") in _stock, saves.in_flight_max
        install(asynchronous=asynchronous, in_flight=in_flight)
    try:
        yield
    finally:
        with _lock:
            saves.in_flight_max = was_in_flight
            if before:
                install(asynchronous=was_asynchronous, in_flight=was_in_flight)
            else:
                uninstall()


def _replace(owner: Any, name: str, replacement: Any) -> None:
    if (owner, name) not in _stock:
        _stock[owner, name] = getattr(owner, name)
        setattr(owner, name, replacement)


def _restore(owner: Any, name: str) -> None:
    if (owner, name) in _stock:
        setattr(owner, name, _stock.pop((owner, name)))


def _save(
    state_dict: Any,
    *,
    checkpoint_id: str | os.PathLike[str] | None = None,
    storage_writer: Any = None,
    planner: Any = None,
    process_group: Any = None,
    no_dist: bool = False,
    use_collectives: bool = True,
) -> Any:
    """In the place of `torch.distributed.checkpoint.save`."""
    writer = storage_writer
    if writer is None and checkpoint_id is not None and StorageWriter.validate_checkpoint_id(checkpoint_id):
        writer = StorageWriter(checkpoint_id)
    if isinstance(writer, StorageWriter):
        path = os.path.abspath(os.fspath(checkpoint_id or writer.path))
        return saves.save(state_dict, path, writer, planner, process_group, no_dist, use_collectives)
    return state_dict_saver.save(
        state_dict,
        checkpoint_id=checkpoint_id,
        storage_writer=storage_writer,
        planner=planner,
        process_group=process_group,
        no_dist=no_dist,
        use_collectives=use_collectives,
    )
