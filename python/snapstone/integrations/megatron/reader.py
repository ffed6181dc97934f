"""What Megatron-core's loading reads through: the engine's reader for the engine's checkpoints, its own for others.

Megatron-core takes its reader from a function of its module of strategies. `engine_readers` puts another one in its
place, for as long as a LoadStrategy works, or for good under `install`.
"""

from __future__ import annotations

import io
import os
import pickle
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from megatron.core.dist_checkpointing.strategies import torch as torch_strategies
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner

from ... import Checkpoint, dcp
from ...errors import IncompatibleCheckpointError
from ..patches import Patches
from .layout import check_one_of_both, engine_path, holds_checkpoint
from .sharded import OBJECTS

__all__ = ["StorageReader", "allowing_pickle", "engine_readers", "get_filesystem_reader"]

_PREFIX = OBJECTS + "."
_allow_pickle: ContextVar[bool] = ContextVar("allow_pickle", default=False)
_lock = threading.Lock()
_patches = Patches()
_users = 0
_stock = torch_strategies._get_filesystem_reader


class StorageReader(dcp.StorageReader):
    """As Megatron's planner wants it: sharded objects are streams of `torch.save` under their unique keys."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        metadata = super().read_metadata(*args, **kwargs)
        entries = metadata.state_dict_metadata
        for name, path in dict(metadata.planner_data or {}).items():
            if tuple(path) == (OBJECTS, name.removeprefix(_PREFIX)):
                del entries[name]
                entries[name.removeprefix(_PREFIX)] = BytesStorageMetadata()
        metadata.planner_data = None  # Megatron flattens no further than keys
        return metadata

    def _read_values(self, reader: Any, plan: LoadPlan, planner: LoadPlanner) -> None:
        items = [item for item in plan.items if item.type is LoadItemType.BYTE_IO]
        names = dict.fromkeys(_PREFIX + item.storage_index.fqn for item in items)
        streams = Checkpoint(reader).load_tensors([*names])
        for item in items:
            key = item.storage_index.fqn
            planner.load_bytes(item, _checked(key, streams[_PREFIX + key], self.allow_pickle))


def _checked(key: str, data: torch.Tensor, allow_pickle: bool) -> io.BytesIO:
    """The stream, once it is known to load without running what is in it: Megatron's planner runs it."""
    stream = io.BytesIO(data.numpy().tobytes())
    if not allow_pickle:
        try:
            torch.load(stream, weights_only=True, map_location="cpu")
        except pickle.UnpicklingError as error:
            raise IncompatibleCheckpointError(
                f"{key}: holds a Python object that torch.load refuses with weights_only=True; if you trust this "
                f"checkpoint, use LoadStrategy(allow_pickle=True) or install(allow_pickle=True): {error!s:.300}"
            ) from None
        stream.seek(0)
    return stream


def get_filesystem_reader(checkpoint_dir: str | os.PathLike[str], *args: Any, **kwargs: Any) -> Any:
    """In the place of Megatron-core's function of that name."""
    check_one_of_both(checkpoint_dir)
    if holds_checkpoint(checkpoint_dir):
        return StorageReader(engine_path(checkpoint_dir), allow_pickle=_allow_pickle.get())
    return _stock(checkpoint_dir, *args, **kwargs)


@contextmanager
def engine_readers() -> Iterator[None]:
    global _users
    with _lock:
        if _users == 0:
            _patches.set(torch_strategies, "_get_filesystem_reader", get_filesystem_reader)
        _users += 1
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if _users == 0:
                _patches.undo()


@contextmanager
def allowing_pickle(allowed: bool) -> Iterator[None]:
    token = _allow_pickle.set(allowed)
    try:
        yield
    finally:
        _allow_pickle.reset(token)
