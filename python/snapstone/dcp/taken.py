"""What a `dcp.save` plan's items resolve to: tensors and values with their names and paths."""

from __future__ import annotations

import io
import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem, WriteItemType

from .. import manifest, state, tensors
from ..plan import TensorItem
from ..tensors import LocalShard
from .metadata import Stored, value_of_stream
from .recent import Recent

__all__ = ["Taken"]


@dataclass(frozen=True, slots=True)
class _Described:
    """What the items of a plan were found to be. A planner that remembers its plans passes the same objects again."""

    items: list[WriteItem]
    tensors: list[TensorItem | None]

    def is_of(self, items: list[WriteItem]) -> bool:
        return len(items) == len(self.items) and all(map(operator.is_, items, self.items))


_described: Recent[_Described] = Recent(4)


@dataclass(slots=True)
class Taken:
    """What a plan's items resolve to."""

    shards: list[LocalShard]
    objects: dict[str, Any]
    paths: dict[str, state.LeafPath]

    @classmethod
    def of(cls, plan: SavePlan, planner: SavePlanner) -> Taken:
        mappings: Mapping[str, tuple[Any, ...]] = getattr(planner, "mappings", None) or plan.planner_data or {}
        taken = cls([], {}, {})
        described = _described.find(lambda known: known.is_of(plan.items))
        known = described.tensors if described else [None] * len(plan.items)
        for item, before in zip(plan.items, known, strict=True):
            name = item.index.fqn
            taken.paths[name] = tuple(mappings.get(name, (name,)))
            if item.type is WriteItemType.BYTE_IO:
                taken.objects[name] = _value(item, planner)
            else:
                taken.shards.append(_shard(item, planner, before))
        if described is None:
            of_tensors = iter(taken.shards)
            tensors_of = [None if i.type is WriteItemType.BYTE_IO else next(of_tensors).item for i in plan.items]
            _described.put(_Described(list(plan.items), tensors_of))
        return taken

    def stored(self, plan: SavePlan, written: manifest.Writer) -> Stored:
        storage_data, dtypes = {}, {}
        shards = iter(self.shards)
        for item in plan.items:
            if item.type is WriteItemType.BYTE_IO:
                storage_data[item.index] = _StorageInfo(written.index.name, 0, 0)
                continue
            shard = next(shards).item
            storage_data[item.index] = _StorageInfo(written.data[0].name, 0, shard.nbytes)
            dtype = tensors.dtype_named(shard.dtype)
            assert item.tensor_data is not None
            if item.tensor_data.properties.dtype != dtype:
                dtypes[item.index.fqn] = dtype
        return Stored(storage_data, dtypes)


def _value(item: WriteItem, planner: SavePlanner) -> Any:
    look_up = getattr(planner, "lookup_object", None)
    if look_up is not None:
        value = look_up(item.index)
        if not isinstance(value, io.BytesIO):
            return value
    stream = planner.resolve_data(item)
    assert isinstance(stream, io.BytesIO)
    return value_of_stream(stream)


def _shard(item: WriteItem, planner: SavePlanner, before: TensorItem | None) -> LocalShard:
    tensor = planner.resolve_data(item)
    assert isinstance(tensor, torch.Tensor)
    assert item.tensor_data is not None
    chunk = item.tensor_data.chunk
    tensor = tensor.detach()
    if tensor.shape != tuple(chunk.sizes):
        raise ValueError(f"{item.index.fqn}: planned with sizes {list(chunk.sizes)}, is {list(tensor.shape)}")
    # Of the tensor, not of the plan: cached plans keep the dtype of an earlier save.
    dtype = tensors.dtype_name(tensor.dtype, item.index.fqn)
    if before is not None and before.dtype == dtype:
        return LocalShard(before, tensor)
    return LocalShard(
        TensorItem(
            item.index.fqn,
            dtype,
            tuple(item.tensor_data.size),
            tuple(chunk.offsets),
            tuple(chunk.sizes),
            tensor.numel() * tensor.dtype.itemsize,
        ),
        tensor,
    )
