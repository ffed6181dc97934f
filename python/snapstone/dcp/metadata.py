"""DCP's `Metadata` from a checkpoint's manifest and indexes, and the values that DCP passes as byte streams."""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterable
from dataclasses import dataclass, replace
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
from ..reader import Reader

__all__ = ["OPAQUE", "Stored", "metadata_of", "pickled", "stream_of", "value_of_stream"]

VERSION = "1.0.0"  # of DCP's metadata, as stock writes it
OPAQUE = "$torch"  # a value that only torch.save can store: {OPAQUE: bytes}


def metadata_of(reader: Reader, rank: int, meta: StorageMeta | None) -> Metadata:
    """What `read_metadata` of the stock reader gives, without reading a pickle. `rank`: whose Python values count where
    ranks saved different ones.
    """
    entries: dict[str, Any] = {}
    planner_data: dict[str, tuple[Any, ...]] = {}
    storage_data: dict[MetadataIndex, Any] = {}
    for name, shards in reader.shards.items():
        first = shards[0].stored.item
        entries[name] = TensorStorageMetadata(
            properties=TensorProperties(dtype=tensors.dtype_named(first.dtype)),
            size=torch.Size(first.shape),
            chunks=[ChunkStorageMetadata(torch.Size(box.offsets), torch.Size(box.sizes)) for box in _boxes(shards)],
        )
        planner_data[name] = _path(name, reader.paths[name])
        for shard in shards:
            file = reader.manifest.writers[shard.table].data[0].name
            index = MetadataIndex(name, torch.Size(shard.box.offsets))
            storage_data[index] = _StorageInfo(file, 0, shard.stored.item.nbytes)
    for name, (path, _) in reader.objects(rank).items():
        entries[name] = BytesStorageMetadata()
        planner_data[name] = _path(name, path)
    return Metadata(
        state_dict_metadata=entries,
        planner_data=planner_data,
        storage_data=storage_data,
        storage_meta=meta,
        version=VERSION,
    )


def _boxes(shards: list[Any]) -> list[Any]:
    return list(dict.fromkeys(shard.box for shard in shards))


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
    return pickle.dumps(
        replace(metadata, state_dict_metadata=entries, storage_data=storage_data, storage_meta=meta, version=VERSION)
    )


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
