"""What the snapshot of an optimizer's fence copies at the call, and what it may leave to the next step."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn, optim
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate

from snapstone.fence import OptimizerFence
from snapstone.state import Flattened


def snapshot(optimizer: optim.Optimizer, state: Mapping[str, Any]) -> Mapping[str, Any]:
    fence = OptimizerFence.of(optimizer)
    assert fence is not None
    taken = fence.snapshot(state)
    assert isinstance(taken, Mapping)
    return taken


def test_detached_parameters_are_left_to_the_fence() -> None:
    model = nn.Linear(300, 200)
    state = dict(model.state_dict())
    taken = snapshot(optim.SGD(model.parameters()), state)
    assert taken is not state
    assert all(taken[name] is state[name] for name in state)


def flattened(optimizer: optim.Optimizer, state: Mapping[str, Any]) -> Mapping[str, torch.Tensor]:
    """As for a state with more than plain dicts in it, such as the OrderedDict of a module."""
    fence = OptimizerFence.of(optimizer)
    assert fence is not None
    taken = fence.snapshot(OrderedDict(state))
    assert isinstance(taken, Flattened)
    return taken.tensors


OTHER_MEMORY: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "a copy": lambda flat: flat[:64].clone(),
    "more than the parameter, from the same address": lambda flat: flat,
    "a neighbour in the same storage": lambda flat: flat[64:],
    "nothing": lambda flat: flat[:0],
    "interleaved with it": lambda flat: flat[1::2],
    "as many bytes from the same address, in other places": lambda flat: flat[::2],
}


@pytest.mark.parametrize("kind", OTHER_MEMORY)
def test_what_only_looks_like_a_parameter_is_copied(kind: str) -> None:
    flat = torch.arange(128.0)
    parameter = nn.Parameter(flat[:64])
    volatile = OTHER_MEMORY[kind](flat)
    before = volatile.clone()
    taken = snapshot(optim.SGD([parameter]), {"volatile": volatile, "parameter": parameter})
    also_taken = flattened(optim.SGD([parameter]), {"volatile": volatile, "parameter": parameter.detach()})
    volatile.fill_(-1)
    assert torch.equal(taken["volatile"], before)
    assert torch.equal(also_taken["volatile"], before)
    assert taken["parameter"] is parameter
    assert also_taken["parameter"].data_ptr() == parameter.data_ptr()


def test_a_contiguous_tensor_over_a_strided_parameter_is_copied() -> None:
    base = torch.zeros(64)
    parameter = nn.Parameter(base[::2])
    state = {"parameter": parameter, "head": base[:32]}
    taken = snapshot(optim.SGD([parameter]), state), flattened(optim.SGD([parameter]), state)
    base[1::2] = 7
    assert [one["head"].sum().item() for one in taken] == [0, 0]


@pytest.fixture
def one_rank_mesh() -> Iterator[DeviceMesh]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_dtensors_are_told_apart_by_their_local_memory(one_rank_mesh: DeviceMesh) -> None:
    owned = nn.Parameter(DTensor.from_local(torch.ones(8), one_rank_mesh, [Replicate()]))
    other = DTensor.from_local(torch.ones(8), one_rank_mesh, [Replicate()])
    state = {"owned": owned.detach(), "other": other}
    taken = snapshot(optim.SGD([owned]), state)
    other.to_local().zero_()
    assert taken["owned"] is state["owned"]
    assert torch.equal(taken["other"].to_local(), torch.ones(8))
