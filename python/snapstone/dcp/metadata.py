"""DCP's `Metadata` from a checkpoint's manifest and indexes, and the values that DCP passes as byte streams."""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from .. import state, tensors, values
from ..catalog import Catalog, Listing
from ..reader import Reader

__all__ = ["OPAQUE", "EngineMetadata", "Stored", "metadata_of", "pickled", "stream_of", "value_of_stream"]

VERSION = "1.0.0"  # of DCP's metadata, as stock writes it
OPAQUE = "$torch"  # a value that only torch.save can store: {OPAQUE: bytes}


class EngineMetadata(Metadata):
    """Of a checkpoint in the engine's format, which takes requests for any box of a tensor."""


def metadata_of(reader: Reader, rank: int, meta: StorageMeta | None) -> EngineMetadata:
    """What `read_metadata` of the stock reader gives, without reading a pickle. `rank`: whose Python values count where
    ranks saved different ones.
    """
    entries: dict[str, Any] = {}
    planner_data: dict[str, tuple[Any, ...]] = {}
    storage_data: dict[MetadataIndex, Any] = {}
    for name in reader.shards:
        item = reader.describe(name)
        entries[name] = TensorStorageMetadata(
            properties=TensorProperties(dtype=tensors.dtype_named(item.dtype)),
            size=torch.Size(item.shape),
            chunks=_Chunks(reader.shards, name),  # type: ignore[arg-type]
        )
        planner_data[name] = _path(name, reader.shards.paths[name])
        for shard in reader.shards[name] if not reader.is_shared else ():  # nobody looks, and it would cost seconds
            file = reader.file_of(shard)
            index = MetadataIndex(name, torch.Size(shard.box.offsets))
            storage_data[index] = _StorageInfo(file, 0, shard.stored.item.nbytes)
    for name, (path, _) in reader.objects(rank).items():
        entries[name] = BytesStorageMetadata()
        planner_data[name] = _path(name, path)
    return EngineMetadata(
        state_dict_metadata=entries,
        planner_data=planner_data,
        storage_data=storage_data,
        storage_meta=meta,
        version=VERSION,
    )


class _Chunks(Sequence[ChunkStorageMetadata]):
    """The distinct boxes of a tensor's shards, made when a planner asks: the engine's own does not."""

    def __init__(self, shards: Catalog | Listing, name: str) -> None:
        self._shards = shards
        self._name = name

    @cached_property
    def _made(self) -> list[ChunkStorageMetadata]:
        boxes = dict.fromkeys(shard.box for shard in self._shards[self._name])
        return [ChunkStorageMetadata(torch.Size(box.offsets), torch.Size(box.sizes)) for box in boxes]

    def __getitem__(self, index: Any) -> Any:
        return self._made[index]

    def __len__(self) -> int:
        return len(self._made)

    def __eq__(self, other: object) -> bool:
        return self._made == (other._made if isinstance(other, _Chunks) else other)

    def __repr__(self) -> str:
        return repr(self._made)

    def __reduce__(self) -> Any:
        return list, (self._made,)


def _path(name: str, encoded: Any) -> tuple[Any, ...]:
    """DCP's paths hold str and int only."""
    path = (name,) if encoded is None else state.decode_path(encoded)
    return tuple(str(part) if isinstance(part, state.Key) else part for part in path)


@dataclass(frozen=True, slots=True)
class Stored:
    """What a rank wrote, as stock metadata has it. `dtypes`: of tensors that a cached plan has with an older dtype."""

    storage_data: dict[MetadataIndex, _StorageInfo]
    dtypes: dict[str, torch.dtype]


def pickled(metadata: Metadata, stored: Iterable[Stored], meta: StorageMeta) -> bytes:
    """The `.metadata` that the stock writer would leave. `metadata` itself, which DCP shares between saves, stays."""
    entries = dict(metadata.state_dict_metadata)
    storage_data: dict[MetadataIndex, _StorageInfo] = {}
    for of_rank in stored:
        storage_data |= of_rank.storage_data
        for name, dtype in of_rank.dtypes.items():
            entry = entries[name]
            assert isinstance(entry, TensorStorageMetadata)
            entries[name] = replace(entry, properties=replace(entry.properties, dtype=dtype))
    return pickle.dumps(Metadata(entries, metadata.planner_data, storage_data, meta, VERSION))


def value_of_stream(stream: io.BytesIO) -> Any:
    """What stands for a value of which only the bytes of `torch.save` are known."""
    return {OPAQUE: bytes(stream.getbuffer())}


def stream_of(encoded: Any, *, allow_pickle: bool) -> io.BytesIO:
    """The stream from which DCP's planners load a value: always one that `torch.save` wrote just now from a decoded
    value, unless the value itself is such a stream; that one must load with `weights_only=True` or be allowed.
    """
    value = values.decode(encoded, allow_pickle=allow_pickle)
    if type(value) is dict and value.keys() == {OPAQUE} and type(value[OPAQUE]) is bytes:
        stream = io.BytesIO(value[OPAQUE])
        if not allow_pickle:
            torch.load(stream, weights_only=True)
            stream.seek(0)
        return stream
    stream = io.BytesIO()
    torch.save(value, stream)
    stream.seek(0)
    return stream
