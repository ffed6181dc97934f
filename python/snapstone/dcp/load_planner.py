"""LoadPlanner: what a rank asks of a checkpoint, as the boxes that its tensors hold."""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, ReadItem
from torch.distributed.checkpoint.planner_helpers import _create_read_items
from torch.distributed.tensor import DTensor

from .. import tensors
from ..errors import IncompatibleCheckpointError
from .metadata import EngineMetadata

__all__ = ["LoadPlanner"]


class LoadPlanner(DefaultLoadPlanner):
    """Plans a `dcp.load` in time proportional to what this rank holds, whatever the number of saved shards.

    Fills any sharding from any other, uneven and strided ones included, in place: parameters, views and tensors that
    are not contiguous keep their memory. From a checkpoint that torch's own writer wrote it plans as torch does.

    Args:
        flatten_state_dict, flatten_sharded_tensors: as in DefaultLoadPlanner.
        allow_partial_load: leave tensors and values as they are for which nothing was saved.
        cast: convert where the saved dtype differs from the target's, as torch does silently. False refuses.

    Raises:
        IncompatibleCheckpointError: from the load, inside DCP's CheckpointException: missing keys, other shapes, other
            dtypes. One error lists them all.
    """

    def __init__(
        self,
        flatten_state_dict: bool = True,
        flatten_sharded_tensors: bool = True,
        allow_partial_load: bool = False,
        *,
        cast: bool = False,
    ) -> None:
        super().__init__(flatten_state_dict, flatten_sharded_tensors, allow_partial_load)
        self.cast = cast
        self._views: dict[tuple[str, tuple[int, ...]], torch.Tensor] = {}

    def create_local_plan(self) -> LoadPlan:
        assert self.metadata is not None
        # For the keys of torch before 2.4, which may replace `self.state_dict`; what is missing is told below.
        allow_partial_load, self.allow_partial_load = self.allow_partial_load, True
        try:
            plan = super().create_local_plan() if not isinstance(self.metadata, EngineMetadata) else LoadPlan([])
        finally:
            self.allow_partial_load = allow_partial_load
        self._refuse_what_does_not_fit(self.metadata)
        if isinstance(self.metadata, EngineMetadata):
            self._views = {}
            plan.items = [
                item
                for name, value in self.state_dict.items()
                if name in self.metadata.state_dict_metadata
                for item in self._items(name, value, self.metadata.state_dict_metadata[name])
            ]
        return plan

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        index = read_item.dest_index
        view = self._views.get((index.fqn, tuple(index.offset or ())))
        return super().resolve_tensor(read_item) if view is None else view

    def _items(self, name: str, value: Any, entry: Any) -> list[ReadItem]:
        plain = isinstance(value, torch.Tensor) and (not isinstance(value, DTensor) or _is_plain(value))
        if isinstance(entry, BytesStorageMetadata) or not plain:
            items: list[ReadItem] = _create_read_items(name, entry, value)
            return items
        found = []
        for item, view in tensors.describe(name, value):
            zeros = torch.Size([0] * len(item.sizes))
            index = MetadataIndex(name, torch.Size(item.offsets))
            # From the start of the tensor: which saved shards overlap is seen when they are read.
            storage = MetadataIndex(name)
            offsets, sizes = torch.Size(item.offsets), torch.Size(item.sizes)
            found.append(ReadItem(LoadItemType.TENSOR, index, zeros, storage, offsets, sizes))
            self._views[name, item.offsets] = view.detach()
        return found

    def _refuse_what_does_not_fit(self, metadata: Metadata) -> None:
        problems = []
        for name, value in self.state_dict.items():
            entry = metadata.state_dict_metadata.get(name)
            if entry is None:
                if not self.allow_partial_load:
                    problems.append(f"Missing key in checkpoint state_dict: {name}")
                continue
            if isinstance(entry, TensorStorageMetadata) != isinstance(value, torch.Tensor):
                kinds = ("a tensor", "a value") if isinstance(entry, TensorStorageMetadata) else ("a value", "a tensor")
                problems.append(f"{name}: saved as {kinds[0]}, wanted as {kinds[1]}")
            elif isinstance(entry, TensorStorageMetadata):
                if entry.size != value.size():
                    problems.append(f"{name}: saved with shape {list(entry.size)}, wanted {list(value.size())}")
                if entry.properties.dtype != value.dtype and not self.cast:
                    problems.append(f"{name}: saved as {entry.properties.dtype}, wanted as {value.dtype} (cast=True)")
        if problems:
            raise IncompatibleCheckpointError(f"{len(problems)} keys do not fit:\n  " + "\n  ".join(problems))


def _is_plain(tensor: DTensor) -> bool:
    """Whether the local part is a tensor, and not a container of shards with a protocol of its own."""
    return not hasattr(tensor._local_tensor, "__create_chunk_list__")
