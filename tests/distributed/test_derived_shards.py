"""Derived shards among ranks: each rank finds its own, and any other number of ranks loads them.

Invariants: every tensor comes back bit for bit on any number of ranks, whoever reads for whom; what is derived is read
from the masters' chunks, once; a checkpoint in which only some shards of a tensor are derived is as good as any.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks, values
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor

import snapstone as ss
from distributed.test_opening import make_index
from format import reference_reader
from roundtrip.bits import assert_same, nested_equal, other_bits
from snapstone import opening
from snapstone.catalog import Catalog, Columns
from snapstone.errors import CorruptCheckpointError
from snapstone.index import Place, StoredTensor
from snapstone.plan import TensorItem

SHAPES = {"rows": (206, 61), "columns": (61, 206), "everywhere": (90, 80), "partly": (200, 50), "large": (1030, 700)}
SAVED: dict[str, Placement] = {
    "rows": Shard(0),
    "columns": Shard(1),
    "everywhere": Replicate(),
    "partly": Shard(0),
    "large": Shard(0),
}
LOADED: dict[str, Placement] = {
    "rows": Shard(1),
    "columns": Shard(1),
    "everywhere": Shard(0),
    "partly": Replicate(),
    "large": Shard(0),
}


def full_state() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(77)
    masters = {name: torch.randn(*shape, generator=generator) for name, shape in SHAPES.items()}
    model = {name: master.to(torch.bfloat16) for name, master in masters.items()}
    model["partly"][150, 3] += 1  # in the shard of the second rank
    return {"masters": masters, "model": model}


def cut(state: dict[str, Any], placements: dict[str, Placement], world_size: int) -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (world_size,))
    return {
        kind: {
            name: distribute_tensor(tensor, mesh, [placements[name]], src_data_rank=None)
            for name, tensor in of_kind.items()
        }
        for kind, of_kind in state.items()
    }


def save_cut(rank: int, path: str, world_size: int) -> int:
    state = cut(full_state(), SAVED, world_size)
    return int(ss.save(state, checkpoint_id=path, derive=True).stats["derived_bytes"])


def load_cut(rank: int, path: str, world_size: int, strategy: Any, shared_from: int) -> list[int]:
    """With their masters, then alone; the bytes that this rank read each time."""
    opening.SHARED_FROM = shared_from
    nbytes = []
    for kinds in (["masters", "model"], ["model"]):
        wanted = cut({kind: full_state()[kind] for kind in kinds}, LOADED, world_size)
        target: dict[str, Any] = {
            kind: {name: blank_of(tensor) for name, tensor in of_kind.items()} for kind, of_kind in wanted.items()
        }
        loaded = ss.load(target, checkpoint_id=path, strategy=strategy, strict=False)
        for kind, of_kind in wanted.items():
            for name, tensor in of_kind.items():
                assert_same(target[kind][name].to_local(), tensor.to_local(), f"{kind}.{name}")
        nbytes.append(int(loaded.stats["bytes_read"]))
    return nbytes


def blank_of(tensor: DTensor) -> DTensor:
    return DTensor.from_local(
        other_bits(tensor.to_local()),
        tensor.device_mesh,
        tensor.placements,
        run_check=False,
        shape=tensor.shape,
        stride=tensor.stride(),
    )


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("derived") / "c"
    derived = values(run_ranks(2, save_cut, str(path), 2))
    state = full_state()
    stored = state["model"]["partly"].nbytes // 2
    assert sum(derived) == sum(tensor.nbytes for tensor in state["model"].values()) - stored
    return path


def test_each_rank_derives_its_own_shards(saved: Path) -> None:
    state = full_state()
    contents = reference_reader.read(saved)
    found = ss.Checkpoint.open(saved).load_tensors()
    for kind, of_kind in state.items():
        for name, tensor in of_kind.items():
            assert_same(found[f"{kind}.{name}"], tensor)
            data = tensor.contiguous().view(torch.uint8).numpy().tobytes()
            assert contents.tensors[f"{kind}.{name}"].data == data, name
    assert ss.verify(saved)
    shards = ss.Checkpoint.open(saved).reader.shards["model.partly"]
    assert [shard.stored.derived_from for shard in shards] == ["masters.partly", None]


LOADS = [  # ranks, strategy, from how many writers on indexes are read for each other
    (1, "direct", 8),
    (2, "direct", 2),
    (2, "scatter", 8),
    (2, "broadcast", 2),
    (3, "direct", 8),
    (3, "scatter", 2),
    (3, "broadcast", 8),
]


@pytest.mark.parametrize(("world_size", "strategy", "shared_from"), LOADS)
def test_any_number_of_ranks_loads_them(saved: Path, world_size: int, strategy: str, shared_from: int) -> None:
    nbytes = values(run_ranks(world_size, load_cut, str(saved), world_size, strategy, shared_from))
    if strategy != "direct":
        assert max(map(sum, zip(*nbytes, strict=True))) <= sum(entry.stat().st_size for entry in saved.glob("*.data"))


def test_a_state_of_one_rank_is_that_of_two(saved: Path, tmp_path: Path) -> None:
    ss.save(full_state(), checkpoint_id=tmp_path / "one", derive=True)
    assert not ss.Checkpoint.open(tmp_path / "one").diff(saved)
    assert nested_equal(ss.Checkpoint.open(saved).state_dict(), full_state())


def test_a_catalog_refuses_a_missing_master() -> None:
    parameter = StoredTensor(
        TensorItem("p", "bfloat16", (4, 2), (0, 0), (4, 2), 16), None, Place(0, 0, 0), "m", "0" * 32
    )

    def columns(dtype: str, shape: tuple[int, ...], name: str = "m") -> list[Columns]:
        index = make_index(0, [TensorItem(name, dtype, shape, (0,) * len(shape), shape, 32)])
        other = make_index(1, [])
        return [Columns.of(index), Columns.of(replace(other, tensors=(parameter,)))]

    found = Catalog("c", columns("float32", (4, 2)))
    assert found.has_derived
    assert found.first("p").stored.derived_from == "m"
    for wrong in (columns("float32", (2, 4)), columns("float64", (4, 2)), columns("float32", (4, 2), "other")):
        with pytest.raises(CorruptCheckpointError, match="derived from 'm'"):
            Catalog("c", wrong)
