"""Snapshot: what a state dictionary holds, described at once and copied a little later.

`Snapshot.of` runs on the thread that trains. It copies every Python value and finds the tensors, which it neither
copies nor waits for. `take` copies the elements of each tensor into a buffer and returns the state with views of the
buffer in their places: the structure of the state is kept, whatever it is made of, and so are ties.

Layout: tensors in the order of the walk. One of 1 MiB or more starts at a page, a smaller one at 64 bytes. A dense
        tensor keeps its strides, any other becomes contiguous; either way it takes its own elements and none of the
        storage around them.
Types:  wrappers (DTensor, LocalShardsWrapper, ShardedTensor, and all with `__tensor_flatten__`) are rebuilt around
        copies of what they wrap. Tensors inside other objects are copied with the object, by `copy.deepcopy`, and not
        into the buffer.
"""

from __future__ import annotations

import copy
import mmap
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.distributed._shard.metadata import ShardMetadata
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.distributed._shard.sharded_tensor.shard import Shard
from torch.distributed.tensor._shards_wrapper import LocalShardsWrapper

from .. import tensors

__all__ = ["Snapshot"]

_LARGE_BYTES = 1 << 20
_SMALL_ALIGNMENT = 64


class _Place(Protocol):
    """Stands in a state where a tensor was."""

    def staged(self, storage: torch.UntypedStorage) -> torch.Tensor: ...


@dataclass(slots=True, eq=False)
class _Elements:
    """A tensor with memory of its own kind, and where in the buffer it goes."""

    name: str
    source: torch.Tensor
    offset: int  # bytes
    strides: tuple[int, ...]
    wrap: type[torch.Tensor] | None

    def view(self, storage: torch.UntypedStorage) -> torch.Tensor:
        dtype = self.source.dtype
        empty = torch.empty(0, dtype=dtype)
        return empty.set_(storage, self.offset // dtype.itemsize, self.source.shape, self.strides)

    def staged(self, storage: torch.UntypedStorage) -> torch.Tensor:
        view = self.view(storage)
        return view if self.wrap is None else view.as_subclass(self.wrap)


@dataclass(slots=True, eq=False)
class _Wrapper:
    parts: dict[Any, _Place]
    build: Callable[[dict[Any, torch.Tensor]], torch.Tensor]

    def staged(self, storage: torch.UntypedStorage) -> torch.Tensor:
        return self.build({key: part.staged(storage) for key, part in self.parts.items()})


class Snapshot:
    """One state, from `of` to `take`. Holds the caller's tensors, not the state."""

    def __init__(self, state: Mapping[str, Any], walk: _Walk) -> None:
        self.nbytes = walk.nbytes
        self._elements = list(walk.elements.values())
        self._places = [place for _, place in walk.places.values()]
        memo: dict[int, Any] = {key: place for key, (_, place) in walk.places.items()}
        self._skeleton = copy.deepcopy(state, memo)
        devices = {one.source.device for one in self._elements if one.source.is_cuda}
        # What the training has queued so far comes before the copies.
        self._queued = {device: torch.cuda.current_stream(device).record_event() for device in devices}

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> Snapshot:
        """
        Raises:
            TypeError, ValueError: a tensor without plain memory (sparse, meta, quantized, nested, fake), by name; a
                value that cannot be copied.
        """
        walk = _Walk()
        walk.visit("", state)
        return cls(state, walk)

    @property
    def on_cuda(self) -> bool:
        return bool(self._queued)

    def take(self, storage: torch.UntypedStorage) -> Any:
        """The state, its tensors copied into `storage`, of `nbytes` or more. Once."""
        with torch.no_grad():
            by_device: dict[torch.device, list[_Elements]] = defaultdict(list)
            for one in self._elements:
                by_device[one.source.device].append(one)
            for device, elements in by_device.items():
                with self._stream(device):
                    for one in elements:
                        self._copy(one, storage)
            staged = {id(place): place.staged(storage) for place in self._places}
            return copy.deepcopy(self._skeleton, staged)

    @staticmethod
    def _copy(one: _Elements, storage: torch.UntypedStorage) -> None:
        try:
            one.view(storage).copy_(one.source, non_blocking=True)
        except Exception as error:
            error.add_note(f"while {one.name} was staged")
            raise

    @contextmanager
    def _stream(self, device: torch.device) -> Iterator[None]:
        """Copies of a CUDA device run beside the training, and have ended when this has."""
        if device.type != "cuda":
            yield
            return
        stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        stream.wait_event(self._queued[device])
        try:
            with torch.cuda.stream(stream):
                yield
        finally:
            stream.synchronize()


class _Walk:
    """Finds the tensors of a state, and gives each its place in the buffer."""

    def __init__(self) -> None:
        self.nbytes = 0
        self.places: dict[int, tuple[torch.Tensor, _Place]] = {}  # by id of the tensor, which must live as long
        self.elements: dict[tuple[Any, ...], _Elements] = {}  # by memory: equal for ties
        self._seen: dict[int, Any] = {}  # containers

    def visit(self, name: str, value: Any) -> None:
        if isinstance(value, torch.Tensor):
            if id(value) not in self.places:
                place = self._place(name, value)
                if place is not None:
                    self.places[id(value)] = (value, place)
        elif isinstance(value, (Mapping, list, tuple)) and id(value) not in self._seen:
            self._seen[id(value)] = value
            items = value.items() if isinstance(value, Mapping) else enumerate(value)
            for key, item in items:
                self.visit(f"{name}.{key}" if name else str(key), item)

    def _place(self, name: str, tensor: torch.Tensor) -> _Place | None:
        kind = type(tensor)
        if kind in tensors.PLAIN_TYPES:
            return self._elements(name, tensor, None)
        if isinstance(tensor, ShardedTensor):
            shards = {index: shard.tensor for index, shard in enumerate(tensor.local_shards())}
            return self._wrapper(name, shards, lambda staged: _sharded_tensor(tensor, staged))
        if isinstance(tensor, LocalShardsWrapper):
            offsets = [tuple(chunk.offsets) for chunk in tensor.storage_metadata().chunks]
            parts = dict(enumerate(tensor.local_shards()))
            return self._wrapper(name, parts, lambda staged: LocalShardsWrapper(list(staged.values()), offsets))
        if hasattr(tensor, "wait"):  # AsyncCollectiveTensor: the values are still on their way
            return self._place(name, tensor.wait())
        if hasattr(tensor, "__tensor_flatten__") and not tensor.is_nested:
            return self._flattened(name, tensor)
        if hasattr(tensor, "__create_write_items__"):
            return None  # a wrapper that only knows itself how to copy itself
        return self._elements(name, tensor, kind)

    def _wrapper(
        self, name: str, parts: Mapping[Any, Any], build: Callable[[dict[Any, torch.Tensor]], torch.Tensor]
    ) -> _Wrapper:
        places: dict[Any, _Place] = {}
        for key, part in parts.items():
            place = self._place(f"{name}.{key}", part)
            if place is None:
                raise TypeError(f"{name}: cannot be staged, because it wraps a {type(part).__name__}")
            places[key] = place
        return _Wrapper(places, build)

    def _flattened(self, name: str, tensor: Any) -> _Wrapper:
        keys, context = tensor.__tensor_flatten__()
        kind, shape, strides = type(tensor), tensor.shape, tensor.stride()
        inner = {key: getattr(tensor, key) for key in keys}
        constant = {key: part for key, part in inner.items() if not isinstance(part, torch.Tensor)}
        parts = {key: part for key, part in inner.items() if key not in constant}

        def build(staged: dict[Any, torch.Tensor]) -> torch.Tensor:
            rebuilt: torch.Tensor = kind.__tensor_unflatten__({**constant, **staged}, context, shape, strides)
            return rebuilt

        return self._wrapper(name, parts, build)

    def _elements(self, name: str, tensor: torch.Tensor, wrap: type[torch.Tensor] | None) -> _Elements:
        tensors.check_plain(name, tensor)
        tensors.check_memory(name, tensor)
        key = (*tensors.memory_key(tensor), tensor.device, wrap)
        known = self.elements.get(key)
        if known is not None:
            return known
        tensor = tensor.detach()
        nbytes = tensor.numel() * tensor.dtype.itemsize
        alignment = mmap.PAGESIZE if nbytes >= _LARGE_BYTES else _SMALL_ALIGNMENT
        offset = -(-self.nbytes // alignment) * alignment
        self.nbytes = offset + nbytes
        elements = self.elements[key] = _Elements(name, tensor, offset, _dense_strides(tensor), wrap)
        return elements


def _dense_strides(tensor: torch.Tensor) -> tuple[int, ...]:
    if tensor.is_contiguous():
        return tensor.stride()
    described = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
    return torch.empty_like(described).stride()


def _sharded_tensor(like: ShardedTensor, local: dict[Any, torch.Tensor]) -> torch.Tensor:
    """Without the constructors, which talk to other ranks or insist on the device of the original."""
    metadata = like.metadata()
    properties = metadata.tensor_properties
    sharded: ShardedTensor = ShardedTensor.__new__(
        ShardedTensor,
        like.sharding_spec(),
        metadata.size,
        dtype=properties.dtype,
        layout=properties.layout,
        pin_memory=False,
        requires_grad=False,
    )
    sharded._metadata = metadata
    sharded._prepare_init(process_group=like._process_group)  # type: ignore[no-untyped-call]
    sharded._local_shards = [_on_host(shard, local[index]) for index, shard in enumerate(like.local_shards())]
    return sharded


def _on_host(shard: Shard, tensor: torch.Tensor) -> Shard:
    placement: Any = shard.metadata.placement
    where = f"rank:{placement.rank()}/cpu"
    return Shard(tensor, ShardMetadata(shard.metadata.shard_offsets, shard.metadata.shard_sizes, where))
