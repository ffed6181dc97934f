"""Any saved sharding loads into any other. Saved on four ranks; loaded on four, two and one, sharded and plain.

Invariants: every tensor comes back bit for bit whatever the placements of both sides; replicated bytes are
written once.
"""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks, values
from torch import nn
from torch.distributed._shard import sharded_tensor
from torch.distributed._shard.metadata import ShardMetadata
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.distributed.tensor.placement_types import _StridedShard

import snapstone as ss
from roundtrip.bits import assert_same, bits_of, other_bits, random_bits

KIB = 1 << 10

# name -> (dtype, shape, mesh shape on four ranks, placements)
Case = tuple[torch.dtype, tuple[int, ...], tuple[int, ...], list[Any]]
F32, BF16, U8 = torch.float32, torch.bfloat16, torch.uint8
CASES: dict[str, Case] = {
    "rows": (F32, (8, 5), (4,), [Shard(0)]),
    "uneven rows": (F32, (7, 3), (4,), [Shard(0)]),
    "more ranks than rows": (BF16, (2, 3), (4,), [Shard(0)]),
    "uneven columns": (BF16, (5, 6), (4,), [Shard(1)]),
    "last dimension": (U8, (3, 4, 9), (4,), [Shard(-1)]),
    "replicated": (F32, (33, 3), (4,), [Replicate()]),
    "scalar": (torch.int64, (), (4,), [Replicate()]),
    "no rows": (F32, (0, 3), (4,), [Shard(0)]),
    "several chunks": (F32, (1030, 601), (4,), [Shard(0)]),
    "several chunks by column": (F32, (601, 1030), (4,), [Shard(1)]),
    "grid": (F32, (9, 7), (2, 2), [Shard(0), Shard(1)]),
    "grid turned": (F32, (9, 7), (2, 2), [Shard(1), Shard(0)]),
    "rows twice": (F32, (11, 2), (2, 2), [Shard(0), Shard(0)]),
    "rows twice, some empty": (F32, (3, 2), (2, 2), [Shard(0), Shard(0)]),
    "hybrid": (F32, (10, 3), (2, 2), [Replicate(), Shard(0)]),
    "hybrid turned": (F32, (3, 10), (2, 2), [Shard(1), Replicate()]),
    "strided": (F32, (16, 3), (2, 2), [_StridedShard(0, split_factor=2), Shard(0)]),
    "strided, uneven": (F32, (13, 3), (2, 2), [_StridedShard(0, split_factor=2), Shard(0)]),
    "strided and replicated": (F32, (12, 5), (2, 2), [_StridedShard(0, split_factor=2), Replicate()]),
    "three dimensions": (BF16, (5, 6, 7), (2, 2), [Shard(2), Shard(0)]),
}


def full_of(name: str) -> torch.Tensor:
    dtype, shape, _, _ = CASES[name]
    return random_bits(dtype, *shape, seed=sorted(CASES).index(name))


def mesh_of(shape: tuple[int, ...]) -> DeviceMesh:
    return init_device_mesh("cpu", shape)


def rows_of_strided(count: int, coordinate: list[int], replicated: bool) -> list[int]:
    """FSDP over tensor parallel, by definition: cut by the inner mesh dimension, then each piece by the outer one."""
    outer, inner = coordinate
    pieces = torch.arange(count).chunk(2)
    mine = pieces if replicated else (pieces[inner],)
    return [row for piece in mine if len(piece.chunk(2)) > outer for row in piece.chunk(2)[outer].tolist()]


def distributed(full: torch.Tensor, mesh: DeviceMesh, placements: list[Any]) -> DTensor:
    """The DTensor of `full`, without talking to other ranks."""
    if not isinstance(placements[0], _StridedShard):
        return distribute_tensor(full, mesh, placements, src_data_rank=None)
    coordinate = mesh.get_coordinate()
    assert coordinate is not None
    local = full[rows_of_strided(full.shape[0], list(coordinate), isinstance(placements[1], Replicate))]
    return DTensor.from_local(local, mesh, placements, run_check=False, shape=full.shape, stride=full.stride())


def state_of(names: list[str]) -> dict[str, DTensor]:
    meshes: dict[tuple[int, ...], DeviceMesh] = {}
    state = {}
    for name in names:
        _, _, mesh_shape, placements = CASES[name]
        mesh = meshes.setdefault(mesh_shape, mesh_of(mesh_shape))
        state[name] = distributed(full_of(name), mesh, placements)
    return state


def spoilt(tensor: DTensor) -> DTensor:
    """The same placements with other values."""
    local = other_bits(tensor.to_local())
    return DTensor.from_local(
        local, tensor.device_mesh, tensor.placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
    )


def load_and_compare(path: str, wanted: dict[str, DTensor]) -> dict[str, Any]:
    target = {name: spoilt(tensor) for name, tensor in wanted.items()}
    loaded = ss.load(target, checkpoint_id=path, strict=False)
    for name, tensor in wanted.items():
        assert_same(target[name].to_local(), tensor.to_local(), name)
    return dict(loaded.stats)


# ---- all placements, saved on four ranks


def save_all(rank: int, path: str) -> int:
    state = state_of(sorted(CASES))
    saved = ss.save(state, checkpoint_id=path, step=1)
    load_and_compare(path, state)
    return saved.nbytes


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "c"
    sizes = values(run_ranks(4, save_all, str(path)))
    assert set(sizes) == {sum(full_of(name).nbytes for name in CASES)}
    return path


def test_saved_on_four_read_whole_on_one(saved: Path) -> None:
    checkpoint = ss.Checkpoint.open(saved)
    assert checkpoint.world_size == 4
    assert sorted(checkpoint.keys()) == sorted(CASES)
    target = {name: other_bits(full_of(name)) for name in CASES}
    ss.load(target, checkpoint_id=saved)
    for name in CASES:
        full = full_of(name)
        assert_same(target[name], full, name)
        assert_same(checkpoint.get_tensor(name), full, name)
        if full.dim() > 1 and full.numel():
            part = checkpoint.get_slice(name)
            assert_same(part[1:, ::2], full[1:, ::2], name)
            assert_same(part[full.shape[0] // 2], full[full.shape[0] // 2], name)
    assert ss.verify(saved)


def test_every_byte_of_a_sharded_or_replicated_tensor_is_written_once(saved: Path) -> None:
    stored = sum(
        one.stored.item.nbytes for shards in ss.Checkpoint.open(saved).reader.shards.values() for one in shards
    )
    assert stored == sum(full_of(name).nbytes for name in CASES)


def load_on(rank: int, path: str, world_size: int) -> float:
    """Every tensor into several other placements; bytes read over bytes needed by this rank, of the largest."""
    for placement in (Shard(0), Shard(1), Replicate()):
        mesh = mesh_of((world_size,))
        wanted = {}
        for name in sorted(CASES):
            full = full_of(name)
            fits = isinstance(placement, Replicate) or full.dim() > placement.dim
            wanted[name] = distributed(full, mesh, [placement if fits else Replicate()])
        load_and_compare(path, wanted)
    stats = load_and_compare(
        path, {"several chunks": distributed(full_of("several chunks"), mesh_of((world_size,)), [Shard(0)])}
    )
    return float(stats["bytes_read"] / stats["bytes_needed"])


@pytest.mark.parametrize("world_size", [2, 3])
def test_saved_on_four_loaded_on_fewer(saved: Path, world_size: int) -> None:
    for ratio in values(run_ranks(world_size, load_on, str(saved), world_size)):
        assert ratio < 1.6  # chunks of 1 MiB at the edges of a shard of 1.2 MB


def load_turned(rank: int, path: str, seed: int) -> None:
    source = random.Random(seed)
    one, two = mesh_of((4,)), mesh_of((2, 2))
    for _ in range(4):
        wanted = {}
        for name in sorted(CASES):
            full = full_of(name)
            choices: list[Any] = [Replicate(), *(Shard(dimension) for dimension in range(full.dim()))]
            if source.random() < 0.5:
                wanted[name] = distributed(full, one, [source.choice(choices)])
            elif full.dim() and source.random() < 0.3:
                wanted[name] = distributed(
                    full, two, [_StridedShard(0, split_factor=2), source.choice([Shard(0), Replicate()])]
                )
            else:
                wanted[name] = distributed(full, two, [source.choice(choices), source.choice(choices)])
        load_and_compare(path, wanted)


def test_loaded_on_four_in_random_placements(saved: Path) -> None:
    values(run_ranks(4, load_turned, str(saved), 11))


def test_saved_plain_loaded_sharded(tmp_path: Path) -> None:
    ss.save({name: full_of(name) for name in CASES}, checkpoint_id=tmp_path / "c")
    values(run_ranks(4, load_turned, str(tmp_path / "c"), 12))


def save_on(rank: int, path: str) -> None:
    mesh = mesh_of((2,))
    wanted = {
        name: distributed(full_of(name), mesh, [Shard(0) if full_of(name).dim() else Replicate()]) for name in CASES
    }
    ss.save(wanted, checkpoint_id=path)


def test_saved_on_two_loaded_on_four(tmp_path: Path) -> None:
    values(run_ranks(2, save_on, str(tmp_path / "c")))
    values(run_ranks(4, load_turned, str(tmp_path / "c"), 13))


# ---- trainers


class Block(nn.Module):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.up = nn.Linear(6, hidden)
        self.down = nn.Linear(hidden, 6)
        self.norm = nn.LayerNorm(6)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.norm(self.down(self.up(rows).relu()))
        return out


def sharded_training(seed: int, hidden: int, mesh_shape: tuple[int, ...]) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = Block(hidden)
    if len(mesh_shape) == 2:
        mesh = init_device_mesh("cpu", mesh_shape, mesh_dim_names=("dp", "tp"))
        parallelize_module(model, mesh["tp"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
        fully_shard(model, mesh=mesh["dp"])
    else:
        fully_shard(model, mesh=init_device_mesh("cpu", mesh_shape))
    return model, torch.optim.AdamW(model.parameters(), lr=0.01)


def take_step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    rows = torch.randn(4, 6, generator=torch.Generator().manual_seed(seed))
    model(rows).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def whole(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, bytes]:
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    for index, slots in optimizer.state_dict()["state"].items():
        tensors |= {f"optim.{index}.{name}": tensor for name, tensor in slots.items()}
    return {
        name: bits_of(tensor.full_tensor() if isinstance(tensor, DTensor) else tensor)
        for name, tensor in tensors.items()
    }


def train_fsdp_tp(rank: int, path: str, hidden: int) -> tuple[list[str], dict[str, bytes]]:
    model, optimizer = sharded_training(1, hidden, (2, 2))
    take_step(model, optimizer, 1)
    take_step(model, optimizer, 2)
    ss.save({"model": model, "optim": optimizer}, checkpoint_id=path)
    other = sharded_training(2, hidden, (2, 2))
    ss.load({"model": other[0], "optim": other[1]}, checkpoint_id=path)
    assert whole(*other) == whole(model, optimizer)
    # A background save under way, with the optimizer as its fence, while training goes on.
    before = whole(model, optimizer)
    handle = ss.async_save({"model": model, "optim": optimizer}, checkpoint_id=path + "-async", fence=optimizer)
    take_step(model, optimizer, 3)
    handle.result(60)
    after = whole(model, optimizer)
    assert after != before
    ss.load({"model": model, "optim": optimizer}, checkpoint_id=path + "-async")
    assert whole(model, optimizer) == before
    placements = [str(parameter.placements) for parameter in model.parameters() if isinstance(parameter, DTensor)]
    return placements, before


def load_fsdp(rank: int, path: str, hidden: int) -> dict[str, bytes]:
    model, optimizer = sharded_training(3, hidden, (dist.get_world_size(),))
    ss.load({"model": model, "optim": optimizer}, checkpoint_id=path)
    return whole(model, optimizer)


@pytest.mark.parametrize("hidden", [8, 10])
def test_fsdp_over_tensor_parallel_goes_to_fsdp_and_to_a_plain_model(tmp_path: Path, hidden: int) -> None:
    placements, expected = values(run_ranks(4, train_fsdp_tp, str(tmp_path / "c"), hidden))[0]
    assert any("_StridedShard" in one or "_S(" in one or "split" in one for one in placements), placements
    for found in values(run_ranks(2, load_fsdp, str(tmp_path / "c"), hidden)):
        assert found == expected
    model = Block(hidden)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    ss.load({"model": model, "optim": optimizer}, checkpoint_id=tmp_path / "c")
    assert whole(model, optimizer) == expected
    take_step(model, optimizer, 3)  # and it trains on


# ---- other kinds of tensors


def save_old_sharded_tensor(rank: int, path: str) -> None:
    full = torch.arange(24.0).reshape(8, 3)

    def made(values_of: torch.Tensor) -> Any:
        first, count = ((0, 5), (5, 3))[rank]
        local = values_of[first : first + count].clone()
        shard = sharded_tensor.Shard(local, ShardMetadata([first, 0], [count, 3], f"rank:{rank}/cpu"))
        return sharded_tensor.init_from_local_shards([shard], 8, 3)

    ss.save({"t": made(full)}, checkpoint_id=path)
    target = {"t": made(torch.zeros(8, 3))}
    ss.load(target, checkpoint_id=path)
    (local,) = target["t"].local_shards()
    assert torch.equal(local.tensor, full[:5] if rank == 0 else full[5:])
    plain = {"t": torch.zeros(8, 3)}
    ss.load(plain, checkpoint_id=path)
    assert torch.equal(plain["t"], full)


def test_sharded_tensors_of_the_old_api(tmp_path: Path) -> None:
    values(run_ranks(2, save_old_sharded_tensor, str(tmp_path / "c")))
    assert torch.equal(ss.Checkpoint.open(tmp_path / "c").get_tensor("t"), torch.arange(24.0).reshape(8, 3))


def save_on_a_part(rank: int, path: str) -> int:
    mesh = DeviceMesh("cpu", [1, 3])
    full = random_bits(F32, 10, 3, seed=5)
    if mesh.get_coordinate() is None:
        empty = torch.empty(0, 3)
        tensor = DTensor.from_local(empty, mesh, [Shard(0)], run_check=False, shape=full.shape, stride=full.stride())
    else:
        tensor = distribute_tensor(full, mesh, [Shard(0)], src_data_rank=None)
    ss.save({"t": tensor, "everywhere": torch.ones(2)}, checkpoint_id=path)
    loaded = {"t": torch.zeros(10, 3), "everywhere": torch.zeros(2)}
    ss.load(loaded, checkpoint_id=path)
    assert_same(loaded["t"], full)
    return rank


def test_a_mesh_of_some_ranks_only(tmp_path: Path) -> None:
    values(run_ranks(4, save_on_a_part, str(tmp_path / "c")))
    assert_same(ss.Checkpoint.open(tmp_path / "c").get_tensor("t"), random_bits(F32, 10, 3, seed=5))


def test_the_cases_are_what_they_claim() -> None:
    for name, (_, shape, mesh_shape, placements) in CASES.items():
        assert math.prod(mesh_shape) == 4, name
        assert len(mesh_shape) == len(placements), name
        assert all(isinstance(one, Replicate) or one.dim < len(shape) for one in placements), name
