"""Any saved sharding loads into any other. Saved on four ranks; loaded on four, two and one, sharded and plain.

Invariants: every tensor comes back bit for bit whatever the placements of both sides; replicated bytes are written once.
"""

from __future__ import annotations

import itertools
import math
import os
import random
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks, values
from roundtrip.bits import assert_same, bits_of, other_bits, random_bits
from torch import nn
from torch.distributed._shard import sharded_tensor
from torch.distributed._shard.metadata import ShardMetadata
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.distributed.tensor.placement_types import _StridedShard

import snapstone as ss
from snapstone import writer

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
    """By the definition of FSDP over tensor parallel: first cut by the inner mesh dimension, then each piece by the outer one."""
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
    stats = load_and_compare(path, {"several chunks": distributed(full_of("several chunks"), mesh_of((world_size,)), [Shard(0)])})
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
                wanted[name] = distributed(full, two, [_StridedShard(0, split_factor=2), source.choice([Shard(0), Replicate()])])
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
    wanted = {name: distributed(full_of(name), mesh, [Shard(0) if full_of(name).dim() else Replicate()]) for name in CASES}
    ss.save(wanted, checkpoint_id=path)


def test_saved_on_two_loaded_on_four(tmp_path: Path) -> None:
    values(run_ranks(2, save_on, str(tmp_path / "c")))
    values(run_ranks(4, load_turned, str(tmp_path / "c"), 13))


# ---- who writes what


def save_replicated(rank: int, path: str) -> list[int]:
    mesh = mesh_of((4,))
    state: dict[str, Any] = {f"r{i}": random_bits(U8, 200 * KIB + i, seed=i) for i in range(18)}
    state |= {f"d{i}": distribute_tensor(random_bits(U8, 100 * KIB, seed=i), mesh, [Replicate()], src_data_rank=None) for i in range(6)}
    state["large"] = random_bits(U8, 600 * KIB, seed=99)
    ss.save(state, checkpoint_id=path)
    return [tensor.nbytes for tensor in state.values()]


def test_replicated_tensors_are_written_once_and_spread_over_the_ranks(tmp_path: Path) -> None:
    sizes = values(run_ranks(4, save_replicated, str(tmp_path / "c")))[0]
    files = [(tmp_path / "c" / f"rank-{rank:05d}.data").stat().st_size for rank in range(4)]
    total = sum(sizes)
    assert total <= sum(files) <= total + len(sizes) * 4 * KIB + 4 * 4 * KIB
    assert max(files) - min(files) <= 220 * KIB
    assert max(files) >= 600 * KIB


TIED_BYTES = 512 * KIB


def save_tied(rank: int, path: str) -> int:
    weight = random_bits(F32, TIED_BYTES // 4, seed=1)
    mesh = mesh_of((2,))
    sharded = distribute_tensor(random_bits(F32, TIED_BYTES // 4, seed=2), mesh, [Shard(0)], src_data_rank=None)
    state = {"embed": weight, "body": torch.zeros(100), "head": weight, "s1": sharded, "s2": sharded}
    saved = ss.save(state, checkpoint_id=path)
    target: dict[str, Any] = {"embed": torch.zeros_like(weight), "body": torch.zeros(100), "s1": spoilt(sharded)}
    target |= {"head": target["embed"], "s2": target["s1"]}
    ss.load(target, checkpoint_id=path)
    assert_same(target["head"], weight)
    assert_same(target["s2"].to_local(), sharded.to_local())
    return saved.own_nbytes


def test_weights_tied_on_every_rank_are_stored_once(tmp_path: Path) -> None:
    for own_nbytes in values(run_ranks(2, save_tied, str(tmp_path / "c"))):
        assert own_nbytes <= 2 * TIED_BYTES + 32 * KIB


# ---- state that differs from rank to rank


def save_by_rank(rank: int, path: str) -> None:
    torch.manual_seed(rank)
    state = {
        f"stage{rank}": {"w": torch.full((5,), float(rank)), "name": f"stage {rank}"},
        "shared": torch.arange(3.0),
        "rng": torch.get_rng_state().tolist(),
        "cursor": {"rank": rank, "same": 7},
    }
    ss.save(state, checkpoint_id=path)
    target = {
        f"stage{rank}": {"w": torch.zeros(5), "name": ""},
        "shared": torch.zeros(3),
        "rng": [],
        "cursor": {"rank": -1, "same": -1},
    }
    ss.load(target, checkpoint_id=path)  # strict: what other ranks want is not unexpected
    assert target[f"stage{rank}"]["name"] == f"stage {rank}"
    assert target[f"stage{rank}"]["w"].tolist() == [float(rank)] * 5
    assert target["cursor"] == {"rank": rank, "same": 7}
    assert target["rng"] == state["rng"]


def test_pipeline_stages_and_values_of_each_rank_come_back_to_that_rank(tmp_path: Path) -> None:
    values(run_ranks(3, save_by_rank, str(tmp_path / "c")))
    opened = ss.Checkpoint.open(tmp_path / "c")
    assert sorted(opened.keys()) == ["shared", "stage0.w", "stage1.w", "stage2.w"]
    for rank in range(3):
        assert opened.objects(rank)["cursor.rank"] == rank
        assert opened.objects(rank)["cursor.same"] == 7
    assert opened.objects(9)["cursor.rank"] == 0  # a rank that did not exist then gets what rank 0 had


def load_too_little(rank: int, path: str) -> tuple[str, str]:
    target: dict[str, Any] = {f"stage{rank}": {"w": torch.zeros(5), "name": ""}}
    if rank == 1:
        target["shape"] = torch.zeros(4)
    with pytest.raises(ss.CheckpointError) as caught:
        ss.load(target, checkpoint_id=path)
    return type(caught.value).__name__, str(caught.value)


def test_what_no_rank_wants_is_unexpected_and_fails_all(tmp_path: Path) -> None:
    ss.save(
        {"stage0": {"w": torch.ones(5), "name": ""}, "stage1": {"w": torch.ones(5), "name": ""}, "extra": torch.ones(1)},
        checkpoint_id=tmp_path / "c",
    )
    told = values(run_ranks(2, load_too_little, str(tmp_path / "c")))
    for name, message in told:
        assert name in ("IncompatibleCheckpointError", "RankFailedError")
        assert "stage" not in message.replace("stage.", "")
    assert any("unexpected in the checkpoint: extra" in message for _, message in told)
    assert any("missing from the checkpoint: shape" in message for _, message in told)


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
        name: bits_of(tensor.full_tensor() if isinstance(tensor, DTensor) else tensor) for name, tensor in tensors.items()
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
    rows = [0, 3, 5, 8] if rank == 0 else []

    def made(values_of: torch.Tensor) -> Any:
        first, count = ((0, 5), (5, 3))[rank]
        local = values_of[first : first + count].clone()
        shard = sharded_tensor.Shard(local, ShardMetadata([first, 0], [count, 3], f"rank:{rank}/cpu"))
        return sharded_tensor.init_from_local_shards([shard], 8, 3)

    del rows
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


def save_what_cannot_be(rank: int, path: str, kind: str) -> str:
    mesh = mesh_of((2,))
    state: dict[str, Any] = {"fine": torch.ones(2)}
    if kind == "partial":
        state["bad"] = DTensor.from_local(torch.ones(3), mesh, [Partial()], run_check=False)
    elif kind == "hole":
        shard = sharded_tensor.Shard(torch.ones(2), ShardMetadata([2 * rank], [2], f"rank:{rank}/cpu"))
        whole_tensor = sharded_tensor.init_from_local_shards([shard], 4)
        state["bad"] = whole_tensor
        if rank == 1:
            whole_tensor._local_shards = []
    elif kind == "shapes":
        state["bad"] = torch.ones(3 + rank)
    with pytest.raises((TypeError, ss.CheckpointError)) as caught:
        ss.save(state, checkpoint_id=path, timeout=20)
    return str(caught.value)


@pytest.mark.parametrize(("kind", "word"), [("partial", "redistribute"), ("hole", "hole"), ("shapes", "disagree")])
def test_a_state_that_is_not_whole_fails_on_every_rank(tmp_path: Path, kind: str, word: str) -> None:
    told = values(run_ranks(2, save_what_cannot_be, str(tmp_path / "c"), kind))
    assert all(word in message and "bad" in message for message in told), told
    assert list(tmp_path.iterdir()) == []


# ---- several saves at once


def save_two_at_once(rank: int, path: str) -> list[bool]:
    """Rank 0 is slow to remember a structure; rank 1 knows it by the time the second save looks."""
    if rank == 0:
        make = writer.make_structure

        def slowly(*arguments: Any) -> Any:
            time.sleep(0.6)
            return make(*arguments)

        writer.make_structure = slowly
    parameter = nn.Parameter(torch.full((1000,), 3.0))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    handles = []
    for number in range(2):
        handles.append(ss.async_save({"w": parameter}, checkpoint_id=f"{path}-{number}", fence=optimizer, timeout=20))
        time.sleep(0.3)
    for handle in handles:
        handle.result(40)
    return [bool((ss.Checkpoint.open(f"{path}-{number}").get_tensor("w") == 3).all()) for number in range(2)]


def test_ranks_that_remember_different_structures_still_agree(tmp_path: Path) -> None:
    for told in values(run_ranks(2, save_two_at_once, str(tmp_path / "c"))):
        assert told == [True, True]


def save_many_at_once(rank: int, path: str) -> None:
    """Six structures, more than are remembered, in flight together, time after time."""
    parameters = [nn.Parameter(torch.full((100 + i,), float(i))) for i in range(6)]
    optimizer = torch.optim.SGD(parameters, lr=1.0)
    source = random.Random(rank)
    for turn in range(3):
        handles = []
        for number, parameter in enumerate(parameters):
            handles.append(
                ss.async_save({"w": parameter}, checkpoint_id=f"{path}/{turn}-{number}", fence=optimizer, timeout=30)
            )
            time.sleep(source.random() * 0.01)
        for handle in handles:
            handle.result(60)


def test_many_saves_in_flight_on_two_ranks(tmp_path: Path) -> None:
    values(run_ranks(2, save_many_at_once, str(tmp_path)))
    for turn, number in itertools.product(range(3), range(6)):
        assert (ss.Checkpoint.open(tmp_path / f"{turn}-{number}").get_tensor("w") == number).all()


def cancel_on_one(rank: int, path: str, canceller: int) -> tuple[bool | None, str]:
    """Rank 0 holds the save back after rank 1 has written and voted; then one rank cancels."""
    gate = threading.Event()
    handle = ss.async_save(
        {f"t{rank}": torch.ones(10)}, checkpoint_id=path, timeout=20, progress=(lambda *_: gate.wait(1.0) and None) if rank == 0 else False
    )
    answer = None
    if rank == canceller:
        time.sleep(0.5)
        answer = handle.cancel()
    try:
        handle.result(40)
    except ss.CheckpointError as error:
        return answer, type(error).__name__
    return answer, "committed"


@pytest.mark.parametrize("canceller", [0, 1])
def test_cancel_on_one_rank_means_what_it_answers(tmp_path: Path, canceller: int) -> None:
    told = values(run_ranks(2, cancel_on_one, str(tmp_path / "c"), canceller))
    answer = told[canceller][0]
    if answer:
        assert {outcome for _, outcome in told} <= {"CheckpointError", "RankFailedError"}
    else:
        assert [outcome for _, outcome in told] == ["committed", "committed"]
    assert os.listdir(tmp_path) == ([] if answer else ["c"])
    assert answer == (canceller == 0)  # rank 1 has voted: it is rank 0's to say


def test_the_cases_are_what_they_claim() -> None:
    for name, (_, shape, mesh_shape, placements) in CASES.items():
        assert math.prod(mesh_shape) == 4, name
        assert len(mesh_shape) == len(placements), name
        assert all(isinstance(one, Replicate) or one.dim < len(shape) for one in placements), name
