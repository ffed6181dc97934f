"""The decision on the plans of all ranks, against what one computes item by item. Invariants: of every name and offset
one rank that holds it writes it, the entries are stock's, and what does not tile is refused.
"""

from __future__ import annotations

import math
import pickle
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType

from snapstone.dcp.global_plan import GROUP_BYTES, TINY_BYTES, GlobalPlan
from snapstone.dcp.local_plan import LocalPlan
from snapstone.dcp.plan_columns import PlanColumns
from snapstone.errors import IncompatibleCheckpointError
from snapstone.plan import shard_range

fixed = settings(max_examples=150, deadline=None, derandomize=True, database=None)


def shard(name: str, shape: Any, offsets: Any, sizes: Any, dtype: torch.dtype = torch.float32) -> WriteItem:
    chunk = ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))
    data = TensorWriteData(chunk, TensorProperties(dtype), torch.Size(shape))
    return WriteItem(MetadataIndex(name, offsets), WriteItemType.SHARD, tensor_data=data)


def value(name: str) -> WriteItem:
    return WriteItem(MetadataIndex(name), WriteItemType.BYTE_IO)


def decide(ranks: list[list[WriteItem]], *, lowest_rank: bool = False) -> tuple[list[list[WriteItem]], Metadata]:
    columns = [PlanColumns.of(items, {item.index.fqn: (item.index.fqn,) for item in items}) for items in ranks]
    decided = GlobalPlan.of(columns, lowest_rank=lowest_rank)
    chosen = [
        LocalPlan((), items, one).chosen(mask) for items, one, mask in zip(ranks, columns, decided.masks, strict=True)
    ]
    return chosen, decided.metadata()


@st.composite
def worlds(draw: st.DrawFn) -> list[list[WriteItem]]:
    """Ranks on a mesh of two dimensions, tensors of any placement on it, values, and names that few ranks have."""
    mesh = (draw(st.integers(1, 3)), draw(st.integers(1, 3)))
    ranks: list[list[WriteItem]] = [[] for _ in range(math.prod(mesh))]
    for number in range(draw(st.integers(0, 6))):
        name = f"tensor {number}"
        shape = draw(st.lists(st.integers(0, 5), max_size=3))
        dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.int64]))
        placements = [draw(st.sampled_from([None, *range(len(shape))])) for _ in mesh]
        for rank, items in enumerate(ranks):
            offsets, sizes = [0] * len(shape), list(shape)
            for placement, parts, index in zip(placements, mesh, divmod(rank, mesh[1]), strict=True):
                if placement is not None:
                    first, sizes[placement] = shard_range(sizes[placement], parts, index)
                    offsets[placement] += first
            items.append(shard(name, shape, offsets, sizes, dtype))
    for number in range(draw(st.integers(0, 3))):
        holders = draw(st.sets(st.integers(0, len(ranks) - 1), min_size=1))
        own = draw(st.booleans())
        for rank in holders:
            ranks[rank].append(value(f"value {number}") if own else shard(f"own {number}", (3,), (0,), (3,)))
    return [draw(st.permutations(items)) for items in ranks]


@fixed
@given(worlds(), st.booleans())
def test_every_shard_is_written_once_by_a_rank_that_holds_it(ranks: list[list[WriteItem]], lowest_rank: bool) -> None:
    chosen, metadata = decide(ranks, lowest_rank=lowest_rank)
    written = Counter(item.index for items in chosen for item in items)
    assert set(written.values()) <= {1}
    volumes = {item.index: 0 for items in ranks for item in items}
    for items in ranks:
        for item in items:
            if item.tensor_data:
                volumes[item.index] = max(volumes[item.index], math.prod(item.tensor_data.chunk.sizes))
    assert set(written) == set(volumes)
    for rank, (items, own) in enumerate(zip(chosen, ranks, strict=True)):
        assert [item for item in own if item in items] == items  # its own, in its own order
        for item in items:
            if item.tensor_data:  # never an empty shard for one with bytes at the same place
                assert math.prod(item.tensor_data.chunk.sizes) == volumes[item.index]
            if item.tensor_data is None or lowest_rank:
                lower = [other for others in ranks[:rank] for other in others if other == item]
                assert lower == []
    _, stock = create_default_global_save_plan([SavePlan(items) for items in chosen])
    found, expected = dict(metadata.state_dict_metadata), stock.state_dict_metadata
    for entries in (found, expected):
        for entry in entries.values():
            if hasattr(entry, "chunks"):
                entry.chunks.sort(key=lambda chunk: chunk.offsets)
    assert found == expected
    assert metadata.planner_data == {name: (name,) for name in expected}


@fixed
@given(worlds())
def test_equal_plans_give_equal_decisions_and_digests(ranks: list[list[WriteItem]]) -> None:
    again = pickle.loads(pickle.dumps(ranks))
    assert [PlanColumns.of(items, {}) for items in again] == [PlanColumns.of(items, {}) for items in ranks]
    assert decide(again) == decide(ranks)


def test_load_is_spread_largest_first_by_local_bytes() -> None:
    kib = 1024
    ranks = [
        [shard("cut", (100 * kib,), (0,), (90 * kib,), torch.uint8)],
        [shard("cut", (100 * kib,), (90 * kib,), (10 * kib,), torch.uint8)],
        [],
    ]
    for size in (30, 60, 20, 50):
        for items in ranks:
            items.append(shard(f"{size}", (size * kib,), (0,), (size * kib,), torch.uint8))
    chosen, _ = decide(ranks)
    assert [[item.index.fqn for item in items] for items in chosen] == [["cut"], ["cut", "30", "50"], ["60", "20"]]


def test_tiny_shards_go_in_groups_per_set_of_holders() -> None:
    size = (TINY_BYTES // 4,)
    count = 3 * GROUP_BYTES // TINY_BYTES + 1
    ranks = [[shard(f"step {number}", size, (0,), size) for number in range(count)] for _ in range(3)]
    for rank in (0, 2):
        ranks[rank] += [shard(f"pair {number}", (), (), ()) for number in range(5)]
    chosen, _ = decide(ranks)
    for kind, holders in (("step", {0, 1, 2}), ("pair", {0, 2})):
        held = [[item for item in items if item.index.fqn.startswith(kind)] for items in chosen]
        assert {rank for rank, items in enumerate(held) if items} <= holders
    assert sum(any(item.index.fqn.startswith("pair") for item in items) for items in chosen) == 1
    sizes = sorted(sum(TINY_BYTES for item in items if item.index.fqn.startswith("step")) for items in chosen)
    assert sizes == [GROUP_BYTES, GROUP_BYTES, GROUP_BYTES + TINY_BYTES]


@pytest.mark.parametrize(
    ("ranks", "message"),
    [
        ([[shard("t", (4, 4), (0, 0), (2, 4))], []], "hole: 8 of 16"),
        ([[shard("t", (4,), (0,), (3,))], [shard("t", (4,), (2,), (2,))]], "overlap"),
        ([[shard("t", (4,), (0,), (4,))], [shard("t", (4,), (0,), (2,))]], "overlap"),
        ([[shard("t", (4,), (0,), (2,))], [shard("t", (4,), (2,), (3,))]], "outside"),
        (
            [[shard("t", (4,), (0,), (4,))], [shard("t", (5,), (0,), (5,))]],
            r"ranks 0 and 1 .*\[4\] and .*\[5\]",
        ),
        ([[shard("t", (), (), ())], [shard("t", (), (), (), torch.int8)]], "float32.* and .*int8"),
        ([[value("t")], [shard("t", (), (), ())]], "a Python value and"),
        # As many cells as a grid would have, all of the right sizes, and one of them twice as wide as its column.
        (
            [
                [shard("t", (2, 4), (0, 0), (1, 2)), shard("t", (2, 4), (0, 2), (1, 2))],
                [shard("t", (2, 4), (1, 0), (1, 4)), shard("t", (2, 4), (1, 2), (1, 2))],
            ],
            "overlap",
        ),
    ],
)
def test_what_does_not_fit_together_is_refused(ranks: list[list[WriteItem]], message: str) -> None:
    with pytest.raises(IncompatibleCheckpointError, match=message) as info:
        decide(ranks)
    assert info.value.tensor == "t"


def test_a_tiling_that_is_no_grid() -> None:
    cells = [((0, 0), (1, 3)), ((0, 3), (2, 1)), ((1, 0), (1, 1)), ((1, 1), (1, 2))]
    chosen, _ = decide([[shard("t", (2, 4), *cell)] for cell in cells])
    assert list(map(len, chosen)) == [1, 1, 1, 1]


def test_one_rank_that_saves_alone_may_leave_holes_but_no_overlap() -> None:
    chosen, _ = decide([[shard("t", (4, 4), (2, 0), (2, 4))]])
    assert len(chosen[0]) == 1
    with pytest.raises(IncompatibleCheckpointError, match="overlap"):
        decide([[shard("t", (4, 4), (2, 0), (2, 4)), shard("t", (4, 4), (3, 0), (1, 4))]])
    with pytest.raises(IncompatibleCheckpointError, match="outside"):
        decide([[shard("t", (4, 4), (3, 0), (2, 4))]])


def test_an_empty_shard_at_the_place_of_another() -> None:
    empty, filled = shard("t", (3, 2), (0, 0), (0, 2)), shard("t", (3, 2), (0, 0), (3, 2))
    chosen, metadata = decide([[empty], [filled], [shard("t", (3, 2), (0, 0), (0, 0))]])
    assert chosen == [[], [filled], []]
    (chunk,) = metadata.state_dict_metadata["t"].chunks  # type: ignore[union-attr]
    assert chunk.sizes == torch.Size((3, 2))
    chosen, metadata = decide([[shard("t", (0, 2), (0, 0), (0, 2))], [shard("t", (0, 2), (0, 0), (0, 1))]])
    assert sum(map(len, chosen)) == 1
    assert len(metadata.state_dict_metadata["t"].chunks) == 1  # type: ignore[union-attr]


def test_metadata_pickles_as_stock_unless_a_writer_says_that_nobody_keeps_it() -> None:
    ranks = [[shard("t", (4, 4), (2 * rank, 0), (2, 4)), value("v")] for rank in range(2)]
    _, metadata = decide(ranks)
    copy = pickle.loads(pickle.dumps(metadata))
    assert (type(copy), type(copy.state_dict_metadata)) == (Metadata, dict)
    assert copy == metadata
    assert metadata == copy
    assert b"snapstone" not in pickle.dumps(metadata)
    _, metadata = decide(ranks)
    metadata.state_dict_metadata.compact = True  # type: ignore[attr-defined]
    sent = pickle.dumps(metadata)
    received = pickle.loads(sent)
    assert received == copy
    assert pickle.loads(pickle.dumps(received)) == copy
    assert b"snapstone" not in pickle.dumps(received)
    del received.state_dict_metadata["v"]
    received.state_dict_metadata["w"] = copy.state_dict_metadata["v"]
    assert list(received.state_dict_metadata) == ["t", "w"]
    assert pickle.loads(sent) == copy
