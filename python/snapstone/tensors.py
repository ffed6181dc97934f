"""Torch tensors as the engine sees them: named shards of plain CPU memory.

The only module that knows torch tensors, DTensors and ShardedTensors. A shard is described by a `TensorItem` (global
place) and a local tensor whose memory holds it. DTensors of any sharding are cut into boxes that are contiguous in
global coordinates.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch.distributed.tensor import DTensor, Replicate, Shard

from . import plan
from .plan import DIMENSIONS_MAX, Box, TensorItem
from .values import STORED_DTYPES, dtype_name, dtype_named

__all__ = [
    "HOST",
    "PLAIN_TYPES",
    "TENSOR_TYPES",
    "LocalShard",
    "Memory",
    "check_memory",
    "check_plain",
    "describe",
    "dtype_bytes",
    "dtype_name",
    "dtype_named",
    "is_floating",
    "is_lazy",
    "memory_key",
    "memory_of",
    "needs_copy",
    "on_host",
    "tie_positions",
]

TENSOR_TYPES = (torch.Tensor, torch.nn.Parameter, DTensor)
HOST = -1  # in place of the ordinal of a CUDA device

PLAIN_TYPES = {torch.Tensor, torch.nn.Parameter, torch.nn.Buffer}


# The last description of a plain tensor by name. Steady-state saves describe the same tensors again and again.
_described: dict[str, tuple[torch.dtype, torch.Size, TensorItem]] = {}
_DESCRIBED_MAX = 1 << 20


class LocalShard(NamedTuple):
    """A shard and the tensor that holds it on this rank (same sizes, any strides, any device)."""

    item: TensorItem
    tensor: torch.Tensor


class Memory(NamedTuple):
    """Where a tensor's elements are. `stride_bytes` is None when they are contiguous in row-major order; `device` is
    the ordinal of a CUDA device, or HOST.
    """

    data_ptr: int
    item_bytes: int
    sizes: tuple[int, ...]
    stride_bytes: tuple[int, ...] | None
    device: int = HOST


def dtype_bytes(name: str) -> int:
    return dtype_named(name).itemsize


def is_floating(name: str) -> bool:
    return dtype_named(name).is_floating_point


def describe(name: str, tensor: Any) -> list[LocalShard]:
    """The shards of `tensor` that live on this rank; empty if it has no part here.

    Raises:
        TypeError: a kind of tensor that has no plain memory (quantized, sparse, meta, wrapper subclasses, partial
            DTensors), with the remedy.
    """
    kind = type(tensor)
    if kind in PLAIN_TYPES:
        return [_plain(name, tensor)]
    if isinstance(tensor, DTensor):
        return list(_dtensor_shards(name, tensor))
    if hasattr(tensor, "local_shards") and hasattr(tensor, "metadata"):
        return list(_sharded_tensor_shards(name, tensor))
    if hasattr(tensor, "__tensor_flatten__"):
        raise TypeError(
            f"{name}: {kind.__name__} wraps other tensors; save its parts (see __tensor_flatten__) "
            "under names of their own"
        )
    if torch.nn.parameter.is_lazy(tensor):
        raise TypeError(f"{name}: an uninitialised parameter has no data; run the module once first")
    return [_plain(name, tensor)]


def _plain(name: str, tensor: torch.Tensor) -> LocalShard:
    if tensor.is_nested:
        check_plain(name, tensor)
    known = _described.get(name)
    usable = tensor.layout is torch.strided and not tensor.is_meta
    if usable and known is not None and known[0] is tensor.dtype and known[1] == tensor.shape:
        return LocalShard(known[2], tensor)
    shard = _shard(name, tensor, tuple(tensor.shape), (0,) * tensor.dim())
    if len(_described) >= _DESCRIBED_MAX:
        _described.clear()
    _described[name] = (tensor.dtype, tensor.shape, shard.item)
    return shard


def _shard(name: str, local: torch.Tensor, shape: tuple[int, ...], offsets: tuple[int, ...]) -> LocalShard:
    check_plain(name, local)
    if len(shape) > DIMENSIONS_MAX:
        raise ValueError(f"{name}: {len(shape)} dimensions, at most {DIMENSIONS_MAX} can be stored; reshape it first")
    dtype = local.dtype
    nbytes = local.numel() * dtype.itemsize
    return LocalShard(TensorItem(name, dtype_name(dtype, name), shape, offsets, tuple(local.shape), nbytes), local)


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
    """For each dimension the runs of global indices that this rank holds: (first, count, local offset)."""
    ranges = [(0, size) for size in shape]
    scattered: dict[int, torch.Tensor] = {}
    for placement, parts, index in zip(placements, mesh_shape, coordinate, strict=True):
        if isinstance(placement, Replicate):
            continue
        dimension = getattr(placement, "dim", None)
        if dimension is None:
            raise TypeError(
                f"{name}: {placement} holds no final values; redistribute the DTensor to Shard or Replicate first"
            )
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
    piece: torch.Tensor = pieces[index]
    return piece


def _sharded_tensor_shards(name: str, tensor: Any) -> Iterator[LocalShard]:
    shape = tuple(tensor.metadata().size)
    for shard in tensor.local_shards():
        yield _shard(name, shard.tensor, shape, tuple(shard.metadata.shard_offsets))


def is_lazy(tensor: torch.Tensor) -> bool:
    """Whether the tensor's elements are its memory's, conjugated or negated."""
    return tensor.is_conj() or tensor.is_neg()


def needs_copy(tensor: torch.Tensor) -> bool:
    """Whether the tensor's memory is not what is stored: another device, or lazy conjugation or negation."""
    return not tensor.is_cpu or is_lazy(tensor)


def on_host(shard: LocalShard) -> LocalShard:
    """The same shard in CPU memory with plain bits: copies from other devices, resolves lazy conjugation and
    negation.
    """
    if not needs_copy(shard.tensor):
        return shard
    return LocalShard(shard.item, shard.tensor.detach().cpu().resolve_conj().resolve_neg())


def memory_of(tensor: torch.Tensor) -> Memory:
    """The memory of a tensor, which the caller keeps alive."""
    item_bytes = tensor.dtype.itemsize
    stride_bytes = None
    if not tensor.is_contiguous():
        stride_bytes = tuple(stride * item_bytes for stride in tensor.stride())
    return Memory(tensor.data_ptr(), item_bytes, tuple(tensor.shape), stride_bytes, tensor.get_device())


def memory_key(tensor: torch.Tensor) -> tuple[Any, ...]:
    """Equal for tensors that are the same view of the same memory: tied weights."""
    return (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride(), tensor.is_conj(), tensor.is_neg())


def tie_positions(shards: Sequence[LocalShard]) -> list[int]:
    """For each shard the position of the first one that is the same view of the same memory (its own when there is
    none).
    """
    pointers = [shard.tensor.data_ptr() for shard in shards]
    ties = list(range(len(shards)))
    distinct = set(pointers)
    if 0 in distinct:
        for shard in shards:
            check_memory(shard.item.name, shard.tensor)
    if len(distinct) == len(pointers):
        return ties
    first: dict[Any, int] = {}
    counts = Counter(pointers)
    for position, (pointer, shard) in enumerate(zip(pointers, shards, strict=True)):
        if counts[pointer] > 1 and shard.item.nbytes:
            ties[position] = first.setdefault(memory_key(shard.tensor), position)
    return ties


def check_plain(name: str, tensor: torch.Tensor) -> None:
    """Raises TypeError, with the remedy, if `tensor` has no plain strided memory."""
    if tensor.is_nested:
        raise TypeError(f"{name}: nested tensors are not supported; save the tensors of .unbind() as a list instead")
    if tensor.layout is not torch.strided:
        raise TypeError(
            f"{name}: layout {tensor.layout} is not supported; save .to_dense(), or its indices and values, instead"
        )
    if tensor.is_quantized:
        raise TypeError(
            f"{name}: quantized tensors are not supported; save .int_repr(), the scale and the zero point instead"
        )
    if tensor.is_meta:
        raise TypeError(f"{name}: a meta tensor has no data; materialise it first (to_empty)")


def check_memory(name: str, tensor: torch.Tensor) -> None:
    """Raises ValueError if `tensor` has elements but no memory."""
    if tensor.numel() and not tensor.data_ptr():
        raise ValueError(
            f"{name}: a {type(tensor).__name__} without memory (a fake or wrapping tensor, or its storage was freed); "
            "materialise it first"
        )


def check_target(name: str, tensor: torch.Tensor) -> None:
    """Raises ValueError if `tensor` has no memory, or if its elements share memory, so that it cannot be filled."""
    check_memory(name, tensor)
    if any(stride == 0 and size > 1 for size, stride in zip(tensor.shape, tensor.stride(), strict=True)):
        raise ValueError(
            f"{name}: an expanded tensor cannot be loaded into; pass .contiguous() or the tensor it came from"
        )


def dtype_names() -> list[str]:
    """Every dtype of the installed torch that can be stored."""
    return sorted(STORED_DTYPES)
