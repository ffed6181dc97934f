"""Checkpoints that torch's own FileSystemWriter wrote, read without running what is in their pickles."""

from __future__ import annotations

import io
import os
import pickle
import pickletools
from typing import Any, cast

import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.futures import Future

from ..errors import CorruptCheckpointError

__all__ = ["StockReader", "is_stock"]

_METADATA_NAME = ".metadata"
_METADATA_MODULE = "torch.distributed.checkpoint.metadata"
_SHARDED_MODULE = "torch.distributed._shard.sharded_tensor.metadata"
# Every global in a `.metadata` that torch 2.0 to 2.13 wrote.
_ALLOWED = {
    *((_METADATA_MODULE, name) for name in ("Metadata", "MetadataIndex", "StorageMeta", "TensorStorageMetadata")),
    *((_METADATA_MODULE, name) for name in ("ChunkStorageMetadata", "BytesStorageMetadata", "TensorProperties")),
    (_METADATA_MODULE, "_MEM_FORMAT_ENCODING"),
    (_SHARDED_MODULE, "TensorProperties"),
    (_SHARDED_MODULE, "MEM_FORMAT_ENCODING"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("pathlib", "PosixPath"),
    ("pathlib", "PurePosixPath"),
    ("collections", "OrderedDict"),
}


def is_stock(path: str, rank: int | None = None) -> bool:
    """Whether a finished checkpoint of the stock writer stands at `path`, saved by all ranks together or by `rank`
    alone.
    """
    names = [_METADATA_NAME] if rank is None else [_METADATA_NAME, f"__{rank}{_METADATA_NAME}"]
    return any(os.path.isfile(os.path.join(path, name)) for name in names)


_ARGUMENT_BYTES = {ord(op.code): 0 if op.arg is None else op.arg.n for op in pickletools.opcodes}
_LENGTH_BYTES = {
    pickletools.TAKEN_FROM_ARGUMENT1: 1,
    pickletools.TAKEN_FROM_ARGUMENT4: 4,
    pickletools.TAKEN_FROM_ARGUMENT4U: 4,
    pickletools.TAKEN_FROM_ARGUMENT8U: 8,
}
_STOP, _PUT, _LONG_BINPUT = b"."[0], b"p"[0], b"r"[0]
_TWO_LINES = b"ci"  # GLOBAL and INST


def check_claims(data: bytes) -> None:
    """Raises UnpicklingError for a pickle with a length, or a place in the memo, beyond its own size: the unpickler
    takes memory for either before it looks at what is there.
    """
    at = 0
    while at < len(data) and data[at] != _STOP:
        opcode, argument_bytes = data[at], _ARGUMENT_BYTES.get(data[at])
        at += 1
        claimed = 0
        if argument_bytes is None:
            raise pickle.UnpicklingError(f"invalid opcode {opcode:#04x}")
        if argument_bytes >= 0:
            if opcode == _LONG_BINPUT:
                claimed = int.from_bytes(data[at : at + 4], "little")
            at += argument_bytes
        elif argument_bytes == pickletools.UP_TO_NEWLINE:
            for _ in range(2 if opcode in _TWO_LINES else 1):
                line = data[at : (data.find(b"\n", at) + 1) or len(data)]
                at += len(line)
            if opcode == _PUT:
                claimed = int(line[:20] or b"0")
        else:
            at += (width := _LENGTH_BYTES[argument_bytes])
            claimed = int.from_bytes(data[at - width : at], "little")
            at += claimed
        if claimed > len(data):
            raise pickle.UnpicklingError(f"a pickle of {len(data)} bytes claims {claimed}")


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if (module, name) in _ALLOWED:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} has no place in the metadata of a checkpoint")


class _CheckedBytes:
    """A load planner that sees only streams which `torch.load` accepts with `weights_only=True`."""

    def __init__(self, planner: LoadPlanner) -> None:
        self._planner = planner

    def load_bytes(self, request: ReadItem, stream: io.BytesIO) -> None:
        torch.load(stream, weights_only=True, map_location="cpu")
        stream.seek(0)
        self._planner.load_bytes(request, stream)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._planner, name)


class StockReader(FileSystemReader):
    """The stock reader with an allow-list in the place of its unpickler. `allow_pickle` lets Python values, not the
    metadata, load with `weights_only=False`.
    """

    def __init__(self, path: str | os.PathLike[str], *, allow_pickle: bool = False) -> None:
        super().__init__(path)
        self._allow_pickle = allow_pickle

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        path = self._get_metadata_path(kwargs.get("rank"))
        if not os.path.exists(path):
            path = self._get_metadata_path()
        with open(path, "rb") as file:
            data = file.read()
        try:
            check_claims(data)
            metadata = _Unpickler(io.BytesIO(data)).load()
        except Exception as error:  # of the classes allowed, too: what they are given is anything
            raise CorruptCheckpointError(f"not the metadata of a checkpoint: {error}", path=str(path)) from None
        if not isinstance(metadata, Metadata):
            raise CorruptCheckpointError("not the metadata of a checkpoint", path=str(path))
        metadata.storage_meta = getattr(metadata, "storage_meta", None) or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        checked = planner if self._allow_pickle else cast(LoadPlanner, _CheckedBytes(planner))
        return super().read_data(plan, checked)
