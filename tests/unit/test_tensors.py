"""Torch tensors as shards of plain memory: what is described, where it lies, and that DTensor cuts the same way."""

from __future__ import annotations

import itertools
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor._utils import _compute_local_shape_and_global_offset
from torch.distributed.tensor.placement_types import _StridedShard
from torch.testing._internal.distributed.fake_pg import FakeStore

from snapstone.errors import IncompatibleCheckpointError
from snapstone.plan import Box, boxes_of_runs, check_tiling
from snapstone.tensors import (
    LocalShard,
    Memory,
    _dimension_runs,
    check_target,
    describe,
    dtype_bytes,
    dtype_names,
    is_floating,
    memory_key,
    memory_of,
    needs_copy,
    on_host,
    tie_positions,
)

# ---- plain tensors


def test_a_plain_tensor_is_one_shard_of_itself() -> None:
    tensor = torch.arange(6.0).reshape(2, 3)
    (shard,) = describe("a.b", tensor)
    assert tuple(shard.item) == ("a.b", "float32", (2, 3), (0, 0), (2, 3), 24)
    assert shard.tensor is tensor
    assert describe("s", torch.tensor(1, dtype=torch.int16))[0].item[1:] == ("int16", (), (), (), 2)


def test_a_description_follows_what_has_the_name_now() -> None:
    for tensor in (torch.ones(2), torch.ones(3), torch.ones(3, dtype=torch.int8), torch.ones(3, 1), torch.ones(2)):
        item = describe("same", tensor)[0].item
        assert (item.dtype, item.shape, item.nbytes) == (str(tensor.dtype)[6:], tuple(tensor.shape), tensor.nbytes)


def test_strides_are_given_in_bytes_and_only_where_needed() -> None:
    tensor = torch.zeros(4, 6, dtype=torch.float64)
    assert memory_of(tensor) == Memory(tensor.data_ptr(), 8, (4, 6), None)
    assert memory_of(tensor.t()) == Memory(tensor.data_ptr(), 8, (6, 4), (8, 48))
    assert memory_of(tensor[1:, ::2]) == Memory(tensor.data_ptr() + 48, 8, (3, 3), (48, 16))
    assert memory_of(tensor[2]) == Memory(tensor.data_ptr() + 96, 8, (6,), None)


def test_ties_are_equal_views_of_equal_memory() -> None:
    tensor = torch.zeros(4, 4, dtype=torch.complex64)
    others = [tensor.t(), tensor[1:], tensor.conj(), tensor.view(torch.float32), tensor.reshape(16), torch.zeros(4, 4)]
    assert memory_key(tensor) == memory_key(tensor.view(4, 4)) == memory_key(torch.nn.Parameter(tensor))
    assert len({memory_key(one) for one in [tensor, *others]}) == 1 + len(others)
    named = [tensor, *others, tensor, tensor.conj(), torch.empty(0), torch.empty(0)]
    shards = [shard for number, one in enumerate(named) for shard in describe(str(number), one)]
    assert tie_positions(shards) == [0, 1, 2, 3, 4, 5, 6, 0, 3, 9, 10]


def test_lazy_bits_are_resolved_on_the_host_copy_only() -> None:
    tensor = torch.tensor([1 + 2j])
    assert not needs_copy(tensor)
    assert needs_copy(tensor.conj())
    assert needs_copy(tensor.conj().imag)
    plain = on_host(describe("t", tensor)[0])
    assert plain.tensor is tensor
    resolved = on_host(describe("t", tensor.conj())[0]).tensor
    assert not resolved.is_conj()
    assert torch.view_as_real(resolved).tolist() == [[1.0, -2.0]]


def test_targets_that_share_elements_are_refused() -> None:
    check_target("t", torch.zeros(3, 1).expand(3, 1))
    check_target("t", torch.zeros(4, 4)[:, 1:3])
    with pytest.raises(ValueError, match=r"^t: an expanded tensor"):
        check_target("t", torch.zeros(1).expand(3))


def test_dtypes_have_names_and_sizes() -> None:
    assert "float8_e4m3fn" in dtype_names()
    assert (dtype_bytes("complex64"), dtype_bytes("bool"), dtype_bytes("bfloat16")) == (8, 1, 2)
    assert is_floating("bfloat16")
    assert not is_floating("int64")
    with pytest.raises(IncompatibleCheckpointError, match="unknown dtype 'float7'"):
        dtype_bytes("float7")


# ---- DTensor


@contextmanager
def rank_of(world_size: int, rank: int) -> Iterator[None]:
    """This process as one rank of a world that never talks."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        yield
    finally:
        dist.destroy_process_group()


def distributed(full: torch.Tensor, mesh_shape: tuple[int, ...], placements: list[Any], rank: int) -> list[LocalShard]:
    mesh = init_device_mesh("cpu", mesh_shape)
    return describe("t", distribute_tensor(full, mesh, placements, src_data_rank=None))


CASES: list[tuple[tuple[int, ...], tuple[int, ...], list[Any]]] = [
    ((8, 4), (4,), [Shard(0)]),
    ((7, 3), (4,), [Shard(0)]),
    ((2, 3), (4,), [Shard(0)]),
    ((5, 6), (4,), [Shard(1)]),
    ((5, 6), (4,), [Shard(-1)]),
    ((5, 6), (4,), [Replicate()]),
    ((), (4,), [Replicate()]),
    ((0, 3), (4,), [Shard(0)]),
    ((7, 9), (2, 2), [Shard(0), Shard(1)]),
    ((7, 9), (2, 2), [Shard(1), Shard(0)]),
    ((9, 2), (2, 2), [Shard(0), Shard(0)]),
    ((3, 2), (2, 2), [Shard(0), Shard(0)]),
    ((7, 9), (2, 2), [Replicate(), Shard(1)]),
    ((7, 9), (2, 2), [Shard(0), Replicate()]),
    ((7, 5, 3), (2, 2), [Shard(2), Shard(1)]),
    ((11, 2), (3, 2), [Shard(0), Shard(0)]),
]


@pytest.mark.parametrize(("shape", "mesh_shape", "placements"), CASES, ids=str)
def test_the_shards_of_all_ranks_put_together_are_the_tensor(
    shape: tuple[int, ...], mesh_shape: tuple[int, ...], placements: list[Any]
) -> None:
    full = torch.arange(float(torch.Size(shape).numel())).reshape(shape)
    world_size = torch.Size(mesh_shape).numel()
    found: list[LocalShard] = []
    for rank in range(world_size):
        with rank_of(world_size, rank):
            found += distributed(full, mesh_shape, placements, rank)
    assert found
    assert {shard.item.shape for shard in found} == {shape}
    check_tiling([shard.item for shard in found])
    for shard in found:
        item = shard.item
        assert tuple(shard.tensor.shape) == item.sizes
        part = full
        for dimension, (offset, size) in enumerate(zip(item.offsets, item.sizes, strict=True)):
            part = part.narrow(dimension, offset, size) if size else part.narrow(dimension, 0, 0)
        assert torch.equal(shard.tensor, part)


def test_partial_values_are_refused_with_the_remedy() -> None:
    with rank_of(2, 0):
        tensor = DTensor.from_local(torch.ones(3), init_device_mesh("cpu", (2,)), [Partial()], run_check=False)
        with pytest.raises(TypeError, match=r"^t: P.* holds no final values; redistribute"):
            describe("t", tensor)


def test_a_rank_outside_the_mesh_has_no_shard() -> None:
    with rank_of(4, 3):
        mesh = dist.device_mesh.DeviceMesh("cpu", [0, 1])
        tensor = DTensor.from_local(
            torch.empty(0), mesh, [Shard(0)], run_check=False, shape=torch.Size([4]), stride=(1,)
        )
        assert describe("t", tensor) == []


def random_placements(source: random.Random, dimensions: int, mesh_shape: tuple[int, ...]) -> list[Any]:
    """Shard and Replicate anywhere; strided shards where later mesh dimensions cut the same one, as under FSDP."""
    placements: list[Any] = [
        source.choice([Replicate(), Shard(source.randrange(dimensions)), Shard(source.randrange(dimensions))])
        for _ in mesh_shape
    ]
    for at, placement in enumerate(placements):
        later = [
            parts
            for other, parts in zip(placements[at + 1 :], mesh_shape[at + 1 :], strict=True)
            if isinstance(placement, Shard) and isinstance(other, Shard) and other.dim == placement.dim
        ]
        if later and source.random() < 0.7:
            placements[at] = _StridedShard(placement.dim, split_factor=torch.Size(later).numel())
    return placements


@pytest.mark.parametrize("seed", range(150))
def test_random_placements_are_cut_as_dtensor_cuts_them(seed: int) -> None:
    source = random.Random(seed)
    shape = tuple(source.randint(1, 13) for _ in range(source.randint(1, 3)))
    mesh_shape = tuple(source.choice([1, 2, 2, 3, 4]) for _ in range(source.randint(1, 3)))
    placements = random_placements(source, len(shape), mesh_shape)
    owners = torch.zeros(shape, dtype=torch.int64)
    coordinates = list(itertools.product(*map(range, mesh_shape)))
    for coordinate in coordinates:
        runs = _dimension_runs("t", shape, placements, mesh_shape, coordinate)
        sizes, offsets = _compute_local_shape_and_global_offset(shape, mesh_shape, list(coordinate), placements)
        assert tuple(sum(count for _, count, _ in one) for one in runs) == tuple(sizes)
        if 0 in sizes:
            continue
        # torch names the lowest index of the shard.
        assert tuple(min(first for first, _, _ in one) for one in runs) == tuple(offsets)
        for box, _ in boxes_of_runs(runs):
            owners[tuple(slice(o, o + s) for o, s in zip(box.offsets, box.sizes, strict=True))] += 1
    replicas = torch.Size(
        [parts for placement, parts in zip(placements, mesh_shape, strict=True) if isinstance(placement, Replicate)]
    ).numel()
    assert (owners == replicas).all(), (shape, mesh_shape, placements)


def test_fsdp_over_tensor_parallel_interleaves_rows() -> None:
    placements = [_StridedShard(0, split_factor=2), Shard(0)]
    rows = {}
    for coordinate in itertools.product(range(2), range(2)):
        (runs,) = _dimension_runs("t", (8,), placements, (2, 2), coordinate)
        rows[coordinate] = runs
    assert rows == {(0, 0): [(0, 2, 0)], (0, 1): [(4, 2, 0)], (1, 0): [(2, 2, 0)], (1, 1): [(6, 2, 0)]}
    # Replicated over the second dimension, a rank's rows are two runs.
    (runs,) = _dimension_runs("t", (8,), [_StridedShard(0, split_factor=2), Replicate()], (2, 2), (1, 0))
    assert runs == [(2, 2, 0), (6, 2, 2)]
    assert boxes_of_runs([runs]) == [(Box((2,), (2,)), (0,)), (Box((6,), (2,)), (2,))]


def test_sharded_tensor_of_the_old_api(tmp_path: Path) -> None:
    from torch.distributed._shard import sharded_tensor
    from torch.distributed._shard.metadata import ShardMetadata

    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        pieces = [
            sharded_tensor.Shard(torch.full((2, 3), float(row)), ShardMetadata([row, 0], [2, 3], "rank:0/cpu"))
            for row in (0, 2)
        ]
        whole = sharded_tensor.init_from_local_shards(pieces, 4, 3)
        shards = describe("t", whole)
    finally:
        dist.destroy_process_group()
    assert [shard.item.offsets for shard in shards] == [(0, 0), (2, 0)]
    assert {shard.item.shape for shard in shards} == {(4, 3)}
    assert [shard.tensor.tolist() for shard in shards] == [[[0.0] * 3] * 2, [[2.0] * 3] * 2]
