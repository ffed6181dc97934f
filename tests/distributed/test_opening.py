"""Checkpoints of many writers are opened by the group: each index is read by one rank, and all see the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

import snapstone as ss
from distributed.ranks import run_ranks, values
from snapstone import CorruptCheckpointError, _native, manifest, opening
from snapstone.catalog import Catalog, Columns, Listing
from snapstone.collective import Deadline, Group
from snapstone.dcp import LoadPlanner, StorageReader
from snapstone.fabric import Fabric
from snapstone.index import Index, Place, StoredTensor
from snapstone.plan import Box, TensorItem
from snapstone.trace import Trace

WRITERS = 9


def full(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def state(fill: bool, placement: Any) -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    rank = dist.get_rank()
    return {
        "w": distribute_tensor(full(1, 31, 17) * fill, mesh, [placement]),
        "v": distribute_tensor(full(2, 64) * fill, mesh, [Shard(0)]),
        "scalar": torch.tensor(5.0 * fill),
        "rng": {str(rank): torch.full((3,), rank * fill)},
        "step": 4 * fill,
    }


def _save(rank: int, path: Path) -> None:
    ss.save(state(True, Shard(0)), checkpoint_id=path)


def _load(rank: int, path: Path, through_dcp: bool) -> bool:
    for placement in (Shard(0), Shard(1), Replicate()):
        target = state(False, placement)
        if through_dcp:
            reader = StorageReader(path, strategy="scatter")
            dcp.load(target, storage_reader=reader, planner=LoadPlanner())
        else:
            ss.load(target, checkpoint_id=path, strict=False, strategy="direct")
        assert torch.equal(target["w"].full_tensor(), full(1, 31, 17))
        assert torch.equal(target["v"].full_tensor(), full(2, 64))
        assert target["scalar"] == 5
        assert torch.equal(target["rng"][str(rank)], torch.full((3,), rank))
        assert target["step"] == 4
    return True


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("run") / "c"
    values(run_ranks(WRITERS, _save, path))
    return path


@pytest.mark.parametrize("through_dcp", [False, True])
def test_what_ranks_open_together_loads_like_what_one_opens_alone(saved: Path, through_dcp: bool) -> None:
    assert values(run_ranks(3, _load, saved, through_dcp)) == [True] * 3


def _count_opens(rank: int, path: Path) -> int:
    group = Group.create()
    _native.fault_arm("open:1000000:errno=EIO")  # counts from here on
    manifest.read(str(path))
    of_manifest = _native.fault_seen("open")
    channel = group.channel("test")
    reader = opening.open_together(str(path), group, channel, Fabric(None, group), Deadline(20), Trace("open", 0, 1))
    channel.close()
    assert reader.is_shared
    assert len(reader.shards["w"]) == WRITERS
    return int(_native.fault_seen("open")) - 2 * int(of_manifest)


def test_each_index_is_read_by_one_rank(saved: Path) -> None:
    counts = values(run_ranks(4, _count_opens, saved))
    opens_each = counts[0] // 3  # of 9 indexes the first of 4 ranks has 3
    assert opens_each > 0
    assert counts == [3 * opens_each, 2 * opens_each, 2 * opens_each, 2 * opens_each]


def _read_indexes(rank: int, path: Path, broken: str) -> str:
    if rank == 1 and broken == "read":
        _native.fault_arm("pread:1+:errno=EIO")
    target = state(False, Shard(0))
    with pytest.raises((ss.CheckpointError, OSError)) as caught:
        ss.load(target, checkpoint_id=path, strict=False)
    _native.fault_disarm()
    return f"{type(caught.value).__name__} {getattr(caught.value, 'failed_ranks', '')}"


def test_a_damaged_index_is_found_by_the_rank_that_reads_it_and_told_to_all(saved: Path, tmp_path: Path) -> None:
    copy = tmp_path / "c"
    copy.mkdir()
    for file in saved.iterdir():
        data = bytearray(file.read_bytes())
        if file.name == "rank-00004.index":
            data[200] ^= 1
        (copy / file.name).write_bytes(data)
    found = values(run_ranks(3, _read_indexes, copy, "index"))
    assert found == ["RankFailedError (1,)", "CorruptCheckpointError ", "RankFailedError (1,)"]


def _broken_gather(rank: int, path: Path) -> tuple[tuple[int, ...], str]:
    class Broken(Fabric):
        def all_gather(self, payload: bytes, deadline: Deadline) -> list[bytes]:
            if rank == 1:
                raise ss.RankFailedError("the backend broke here")
            return super().all_gather(payload, deadline)

    group = Group.create()
    channel = group.channel("test")
    with pytest.raises(ss.RankFailedError) as caught:
        opening.open_together(str(path), group, channel, Broken(None, group), Deadline(3), Trace("open", 0, 1))
    channel.close()
    return caught.value.failed_ranks, str(caught.value)


def test_indexes_that_could_not_be_gathered_are_told_by_who_missed_them(saved: Path) -> None:
    for failed_ranks, message in values(run_ranks(3, _broken_gather, saved)):
        assert failed_ranks == ()
        assert "rank 0: the process group broke while ranks exchanged bytes" in message


def make_index(rank: int, items: list[TensorItem]) -> Index:
    stored = tuple(StoredTensor(item, ["p", item.name], Place(3 * i, 2, i)) for i, item in enumerate(items))
    return Index("0" * 32, rank, 4, (f"rank-{rank:05d}.data",), 1 << 20, stored, {"o": {"value": rank}}, b"t" * 80)


def test_a_catalog_says_what_a_listing_says() -> None:
    rows = [
        [TensorItem("a", "float32", (8, 6), (2 * r, 0), (2, 6), 48), TensorItem("s", "int64", (), (), (), 8)]
        for r in range(4)
    ]
    rows[2].append(TensorItem("only", "bfloat16", (0, 3), (0, 0), (0, 3), 0))
    indexes = [make_index(rank, items) for rank, items in enumerate(rows)]
    listing = Listing("c", indexes)
    blocks: dict[bytes, str] = {}
    copies, columns = [], []
    told: set[bytes] = set()
    for half in (indexes[:2], indexes[2:]):  # as two ranks would
        of_half, its_columns = opening.decode_indexes(opening.encode_indexes(half, told), blocks)
        copies += of_half
        columns += its_columns
        told |= {one.key for one in its_columns}
    assert len(blocks) == 2
    catalog = Catalog("c", columns)
    assert [(one.rank, one.files, one.objects, one.table) for one in copies] == [
        (one.rank, one.files, one.objects, one.table) for one in indexes
    ]
    assert dict(listing) == {name: sorted(shards) for name, shards in catalog.items()}
    assert listing.paths == catalog.paths
    for name in listing:
        assert listing.describe(name)[:3] == catalog.describe(name)[:3]
        assert catalog.first(name) in listing[name]
    assert [shard.table for shard in catalog.near("a", Box((3, 1), (2, 2)))] == [1, 2]
    assert catalog.tensor_of(2, 4) == listing.tensor_of(2, 4) == "s"
    assert catalog.tensor_of(1, 99) is listing.tensor_of(1, 99) is None


def test_what_indexes_have_alike_is_told_once() -> None:
    items = [TensorItem(f"layer.{number}", "float32", (4,), (0,), (4,), 16) for number in range(100)]
    one = len(opening.encode_indexes([make_index(0, items)], set()))
    known = len(opening.encode_indexes([make_index(0, items)], {Columns.of(make_index(0, items)).key}))
    assert known < one - 100 * len("layer.")
    assert len(opening.encode_indexes([make_index(rank, items) for rank in range(3)], set())) == one + 2 * known


def test_indexes_that_disagree_on_a_tensor_are_refused() -> None:
    one = Columns.of(make_index(0, [TensorItem("a", "float32", (4,), (0,), (4,), 16)]))
    other = Columns.of(make_index(1, [TensorItem("a", "float32", (5,), (0,), (5,), 20)]))
    with pytest.raises(CorruptCheckpointError, match="disagree"):
        Catalog("c", [one, other])
    assert isinstance(one.numbers, np.ndarray)
