"""One rank's plan, and how a state is recognised as one that was planned before.

Recognising must cost less than planning, which asks every DTensor for the place of its shard (30 us each). So a state
is compared by its facts: names, paths, shapes, dtypes, placements and meshes, and what the planner was asked to do.
Facts hold no tensor and no process group.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.distributed.checkpoint.planner import WriteItem
from torch.distributed.checkpoint.planner_helpers import _create_write_items
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from .plan_columns import Paths, PlanColumns

__all__ = ["LocalPlan", "facts_of"]

Facts = tuple[Any, ...]


@dataclass(slots=True)
class LocalPlan:
    """What a rank holds: the items it could write, in order."""

    facts: Facts
    items: Sequence[WriteItem]
    columns: PlanColumns
    _last: tuple[bytes | None, list[WriteItem]] | None = field(default=None, init=False)

    def chosen(self, mask: bytes | None) -> list[WriteItem]:
        """The items whose bits are set, first item first; None sets all."""
        if self._last is None or self._last[0] != mask:
            items = list(self.items)
            if mask is not None:
                bits = np.unpackbits(np.frombuffer(mask, np.uint8), count=len(items))
                items = [items[position] for position in np.flatnonzero(bits).tolist()]
            self._last = (mask, items)
        return list(self._last[1])


def facts_of(state_dict: Mapping[str, Any], paths: Paths, *more: object) -> Facts:
    """Equal for two flattened states exactly if they get equal plans."""
    meshes: dict[int, tuple[int, DeviceMesh]] = {}
    facts: list[tuple[Any, ...]] = []
    for name, value in state_dict.items():
        if type(value) is DTensor and _is_plain(local := value._local_tensor):
            mesh = value.device_mesh
            number, _ = meshes.setdefault(id(mesh), (len(meshes), mesh))
            facts.append((name, number, value.placements, value.shape, local.dtype, local.layout, value.requires_grad))
        elif isinstance(value, torch.Tensor) and _is_plain(value):
            facts.append((name, value.shape, value.dtype, value.layout, value.requires_grad))
        elif isinstance(value, torch.Tensor) or hasattr(value, "__create_write_items__"):
            facts.append((name, _create_write_items(name, value)))
        else:
            facts.append((name,))
    return (facts, [_mesh_facts(mesh) for _, mesh in meshes.values()], dict(paths), more)


def _is_plain(tensor: torch.Tensor) -> bool:
    """Whether it is one shard, and its shape says which."""
    if type(tensor) in (torch.Tensor, torch.nn.Parameter):
        return True
    return not hasattr(tensor, "__create_write_items__") and not isinstance(tensor, ShardedTensor)


def _mesh_facts(mesh: DeviceMesh) -> tuple[Any, ...]:
    coordinate = mesh.get_coordinate()
    return mesh.device_type, mesh.mesh.tolist(), None if coordinate is None else tuple(coordinate)
