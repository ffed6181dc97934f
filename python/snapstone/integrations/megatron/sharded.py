"""Megatron's sharded state dictionary as a state for the engine.

Tensors keep their keys as names. A ShardedObject becomes the bytes of `torch.save`, as in a stock checkpoint, in a
uint8 tensor "objects.KEY/shard_OFFSETS_SHAPE": an object can be a whole optimizer's state, which has no place in JSON.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping
from types import SimpleNamespace
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, is_main_replica
from megatron.core.fp8_utils import dequantize_fp8_tensor, is_float8tensor

__all__ = ["COMMON", "OBJECTS", "common_object", "engine_state", "object_key"]

OBJECTS = "objects"
COMMON = "common_state"  # the key under which Megatron-core 0.19 passes what is not sharded


class PlacedShards(torch.Tensor):
    """The shards of one tensor that this rank holds, at their places in it. The engine asks for nothing else, and
    nobody computes with it.
    """

    _shards: list[Any]

    @staticmethod
    def __new__(cls, shape: Iterable[int], shards: list[tuple[tuple[int, ...], torch.Tensor]]) -> PlacedShards:
        first = shards[0][1]
        made: PlacedShards = torch.Tensor._make_wrapper_subclass(
            cls, tuple(shape), dtype=first.dtype, device=first.device
        )
        made._shards = [
            SimpleNamespace(tensor=tensor, metadata=SimpleNamespace(shard_offsets=offsets))
            for offsets, tensor in shards
        ]
        return made

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        raise NotImplementedError(f"{function} of {cls.__name__}")

    def local_shards(self) -> list[Any]:
        return self._shards

    def metadata(self) -> Any:
        return SimpleNamespace(size=self.shape)


def engine_state(sharded_state_dict: Mapping[str, Any], *, keep_only_main_replica: bool = True) -> dict[str, Any]:
    """What this rank contributes.

    Args:
        sharded_state_dict: of ShardedTensors and ShardedObjects, their data on any device.
        keep_only_main_replica: leave out what another rank is to write. False passes all replicas of tensors to the
            engine, which spreads them over the ranks.

    Raises:
        ValueError: a ShardedTensor without data.
    """
    shards: dict[str, list[tuple[tuple[int, ...], torch.Tensor]]] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    objects: dict[str, list[Any]] = {}
    for one in nested_values(sharded_state_dict):
        main = is_main_replica(one.replica_id)
        if isinstance(one, ShardedObject) and main:
            objects.setdefault(one.unique_key, []).append(one.data)
        elif isinstance(one, ShardedTensor) and (main or not keep_only_main_replica):
            shards.setdefault(one.key, []).append((tuple(one.global_offset), _local(one)))
            shapes[one.key] = tuple(one.global_shape)
    state: dict[str, Any] = {key: PlacedShards(shapes[key], parts) for key, parts in shards.items()}
    if OBJECTS in state:
        raise ValueError(f"{OBJECTS!r} cannot be the key of a tensor: sharded objects are stored under that name")
    return state | {OBJECTS: {key: _stream(values) for key, values in objects.items()}}


def _local(sharded: ShardedTensor) -> torch.Tensor:
    """With the axes that the global tensor has and the local one has not."""
    data: torch.Tensor | None = sharded.data
    if data is None:
        raise ValueError(f"{sharded.key}: a ShardedTensor without data cannot be saved")
    data = data.detach()
    if is_float8tensor(data):
        data = dequantize_fp8_tensor(data)  # stock checkpoints hold the values, too
    return data[(None,) * sharded.prepend_axis_num] if sharded.prepend_axis_num else data


def _stream(values: list[Any]) -> torch.Tensor:
    stream = io.BytesIO()
    torch.save(values, stream)
    return torch.frombuffer(bytearray(stream.getbuffer()), dtype=torch.uint8)


def object_key(path: tuple[Any, ...]) -> str | None:
    """The unique key of the ShardedObject at a path of the engine's checkpoint; None for a tensor."""
    return path[1] if len(path) == 2 and path[0] == OBJECTS else None


def common_object(sharded_state_dict: Mapping[str, Any]) -> ShardedObject | None:
    """What is not sharded, where Megatron-core passes that to strategies (from 0.19 on)."""
    found = sharded_state_dict.get(COMMON)
    return found if isinstance(found, ShardedObject) and found.key == COMMON else None
