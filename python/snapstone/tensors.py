"""Torch tensors as the engine sees them: named shards of plain CPU memory.

The only module that knows torch tensors, DTensors and ShardedTensors. A shard is described by a `TensorItem` (global place) and a local
tensor whose memory holds it. DTensors of any sharding are cut into boxes that are contiguous in global coordinates.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch.distributed.tensor import DTensor, Replicate, Shard

from . import plan
from .plan import Box, TensorItem
from .values import STORED_DTYPES, dtype_name, dtype_named

__all__ = [
    "LocalShard",
    "Memory",
    "describe",
    "dtype_bytes",
    "dtype_name",
    "dtype_named",
    "is_floating",
    "memory_key",
    "memory_of",
    "on_host",
]

_PLAIN_TYPES = {torch.Tensor, torch.nn.Parameter, torch.nn.Buffer}


class LocalShard(NamedTuple):
    """A shard and the tensor that holds it on this rank (same sizes, any strides, any device)."""

    item: TensorItem
    tensor: torch.Tensor


class Memory(NamedTuple):
    """Where a CPU tensor's elements are. `stride_bytes` is None when they are contiguous in row-major order."""

    data_ptr: int
    item_bytes: int
    sizes: tuple[int, ...]
    stride_bytes: tuple[int, ...] | None


def dtype_bytes(name: str) -> int:
    return dtype_named(name).itemsize


def is_floating(name: str) -> bool:
    return dtype_named(name).is_floating_point


def describe(name: str, tensor: Any) -> list[LocalShard]:
    """The shards of `tensor` that live on this rank; empty if it has no part here.

    Raises:
        TypeError: a kind of tensor that has no plain memory (quantized, sparse, meta, wrapper subclasses, partial DTensors), with the remedy.
    """
    kind = type(tensor)
    if kind in _PLAIN_TYPES:
        return [_plain(name, tensor)]
    if isinstance(tensor, DTensor):
        return list(_dtensor_shards(name, tensor))
    if hasattr(tensor, "local_shards") and hasattr(tensor, "metadata"):
        return list(_sharded_tensor_shards(name, tensor))
    if hasattr(tensor, "__tensor_flatten__"):
        raise TypeError(
            f"{name}: {kind.__name__} wraps other tensors; save its parts (see __tensor_flatten__) under names of their own"
        )
    return [_plain(name, tensor)]


def _plain(name: str, tensor: torch.Tensor) -> LocalShard:
    sizes = tuple(tensor.shape)
    return _shard(name, tensor, sizes, (0,) * len(sizes))


def _shard(name: str, local: torch.Tensor, shape: tuple[int, ...], offsets: tuple[int, ...]) -> LocalShard:
    if local.layout is not torch.strided:
        raise TypeError(f"{name}: layout {local.layout} is not supported; save .indices() and .values() instead")
    if local.is_quantized:
        raise TypeError(f"{name}: quantized tensors are not supported; save .int_repr(), the scale and the zero point instead")
    if local.is_meta:
        raise TypeError(f"{name}: a meta tensor has no data; materialise it first (to_empty)")
    dtype = local.dtype
    item = TensorItem(
        name, dtype_name(dtype), shape, offsets, tuple(local.shape), local.numel() * dtype.itemsize
    )
    return LocalShard(item, local)


def _dtensor_shards(name: str, tensor: DTensor) -> Iterator[LocalShard]:
    local = tensor._local_tensor
    if hasattr(local, "wait"):  # AsyncCollectiveTensor: the values are still on their way
        local = local.wait()
    mesh = tensor.device_mesh
    coordinate = mesh.get_coordinate()
    if coordinate is None:
        return
    shape = tuple(tensor.shape)
    runs = _dimension_runs(name, shape, tensor.placements, tuple(mesh.shape), coordinate)
    parts = plan.boxes_of_runs(runs) if runs else [(Box((), ()), ())]
    for box, at in parts:
        view = local
        for dimension, (start, size) in enumerate(zip(at, box.sizes, strict=True)):
            if size != local.shape[dimension]:
                view = view.narrow(dimension, start, size)
        yield _shard(name, view, shape, box.offsets)


def _dimension_runs(
    name: str,
    shape: tuple[int, ...],
    placements: Sequence[Any],
    mesh_shape: Sequence[int],
    coordinate: Sequence[int],
) -> list[list[tuple[int, int, int]]]:
    """For each dimension the runs of global indices that this rank holds: (first, count, offset in the local tensor)."""
    ranges = [(0, size) for size in shape]
    scattered: dict[int, torch.Tensor] = {}
    for placement, parts, index in zip(placements, mesh_shape, coordinate, strict=True):
        if isinstance(placement, Replicate):
            continue
        dimension = getattr(placement, "dim", None)
        if dimension is None:
            raise TypeError(f"{name}: {placement} holds no final values; redistribute the DTensor to Shard or Replicate first")
        dimension %= len(shape)
        if type(placement) is Shard and dimension not in scattered:
            first, count = ranges[dimension]
            start, size = plan.shard_range(count, parts, index)
            ranges[dimension] = (first + start, size)
            continue
        # Strided sharding (FSDP over TP) is not a range: let the placement itself cut the list of indices.
        first, count = ranges[dimension]
        indices = scattered.get(dimension, torch.arange(first, first + count))
        scattered[dimension] = _cut(placement, indices, parts, index)
    return [
        plan.runs_of(scattered[d].tolist()) if d in scattered else [(first, count, 0)]
        for d, (first, count) in enumerate(ranges)
    ]


def _cut(placement: Any, indices: torch.Tensor, parts: int, index: int) -> torch.Tensor:
    arguments = {"split_factor": placement.split_factor} if hasattr(placement, "split_factor") else {}
    along_rows = type(placement)(0, **arguments)
    pieces, _ = along_rows._split_tensor(indices, parts, with_padding=False, contiguous=False)
    return pieces[index]


def _sharded_tensor_shards(name: str, tensor: Any) -> Iterator[LocalShard]:
    shape = tuple(tensor.metadata().size)
    for shard in tensor.local_shards():
        yield _shard(name, shard.tensor, shape, tuple(shard.metadata.shard_offsets))


def on_host(shard: LocalShard) -> LocalShard:
    """The same shard in CPU memory with plain bits: copies from other devices, resolves lazy conjugation and negation."""
    tensor = shard.tensor.detach()
    if tensor.device.type != "cpu":
        tensor = tensor.cpu()
    if tensor.is_conj():
        tensor = tensor.resolve_conj()
    if tensor.is_neg():
        tensor = tensor.resolve_neg()
    return LocalShard(shard.item, tensor)


def needs_copy(tensor: torch.Tensor) -> bool:
    """Whether the tensor's memory is not what is stored: another device, or lazy conjugation or negation."""
    return tensor.device.type != "cpu" or tensor.is_conj() or tensor.is_neg()


def memory_of(tensor: torch.Tensor) -> Memory:
    """The memory of a CPU tensor, which the caller keeps alive."""
    item_bytes = tensor.dtype.itemsize
    sizes = tuple(tensor.shape)
    if tensor.is_contiguous():
        return Memory(tensor.data_ptr(), item_bytes, sizes, None)
    return Memory(tensor.data_ptr(), item_bytes, sizes, tuple(stride * item_bytes for stride in tensor.stride()))


def memory_key(tensor: torch.Tensor) -> tuple[Any, ...]:
    """Equal for tensors that are the same view of the same memory: tied weights."""
    return (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())


def check_target(name: str, tensor: torch.Tensor) -> None:
    """Raises ValueError if elements of `tensor` share memory, so that it cannot be filled."""
    if any(stride == 0 and size > 1 for size, stride in zip(tensor.shape, tensor.stride(), strict=True)):
        raise ValueError(f"{name}: an expanded tensor cannot be loaded into; pass .contiguous() or the tensor it came from")


def dtype_names() -> list[str]:
    """Every dtype of the installed torch that can be stored."""
    return sorted(STORED_DTYPES)


def storage_key(tensor: torch.Tensor) -> int:
    """Equal for tensors that share a storage, DTensors by their local one."""
    local: torch.Tensor = getattr(tensor, "_local_tensor", tensor)
    return local.untyped_storage().data_ptr()
