"""Planning. Invariants: shards tile their tensor, each is written once by a rank that holds it, bytes are spread."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from snapstone.errors import IncompatibleCheckpointError
from snapstone.plan import (
    Box,
    TensorItem,
    assign_writers,
    boxes_of_runs,
    check_tiling,
    first_overlap,
    overlap,
    runs_of,
    shard_range,
    structure_digest,
)

fixed = settings(max_examples=60, deadline=None, derandomize=True, database=None)


def points(box: Box) -> set[tuple[int, ...]]:
    ranges = [range(first, first + size) for first, size in zip(box.offsets, box.sizes, strict=True)]
    return set(itertools.product(*ranges))


@st.composite
def boxes(draw: st.DrawFn, dimensions: int) -> Box:
    offsets = draw(st.lists(st.integers(0, 5), min_size=dimensions, max_size=dimensions))
    sizes = draw(st.lists(st.integers(0, 4), min_size=dimensions, max_size=dimensions))
    return Box(tuple(offsets), tuple(sizes))


@st.composite
def tilings(draw: st.DrawFn) -> tuple[tuple[int, ...], list[Box]]:
    """A shape and boxes that tile it, cut again and again at random places along random dimensions."""
    shape = tuple(draw(st.lists(st.integers(1, 7), min_size=0, max_size=3)))
    done = [Box((0,) * len(shape), shape)]
    for _ in range(draw(st.integers(0, 8)) if shape else 0):
        box = done.pop(draw(st.integers(0, len(done) - 1)))
        dimension = draw(st.integers(0, len(shape) - 1))
        at = draw(st.integers(0, box.sizes[dimension]))
        for first, size in ((0, at), (at, box.sizes[dimension] - at)):
            offsets, sizes = list(box.offsets), list(box.sizes)
            offsets[dimension] += first
            sizes[dimension] = size
            done.append(Box(tuple(offsets), tuple(sizes)))
    return shape, draw(st.permutations(done))


def item(name: str, shape: tuple[int, ...], box: Box | None = None, dtype: str = "uint8") -> TensorItem:
    box = box or Box((0,) * len(shape), shape)
    return TensorItem(name, dtype, shape, box.offsets, box.sizes, box.volume)


# ---- boxes


@given(st.integers(0, 3).flatmap(lambda dimensions: st.tuples(boxes(dimensions), boxes(dimensions))))
@fixed
def test_overlap_is_the_common_points_and_nothing_else(pair: tuple[Box, Box]) -> None:
    a, b = pair
    common = overlap(a, b)
    assert common == overlap(b, a)
    assert (points(common) if common else set()) == points(a) & points(b)
    assert common is None or common.volume == len(points(common))


@given(st.integers(1, 3).flatmap(lambda dimensions: st.lists(boxes(dimensions), max_size=8)))
@fixed
def test_first_overlap_finds_one_exactly_when_two_boxes_share_a_point(found: list[Box]) -> None:
    boxes_with_points = [box for box in found if box.volume]
    pair = first_overlap(boxes_with_points)
    meet = any(points(a) & points(b) for a, b in itertools.combinations(boxes_with_points, 2))
    assert (pair is not None) == meet
    if pair is not None:
        assert points(pair[0]) & points(pair[1])


@given(st.integers(0, 100), st.integers(1, 12))
@fixed
def test_shard_range_cuts_as_torch_chunk_does(size: int, parts: int) -> None:
    ranges = [shard_range(size, parts, index) for index in range(parts)]
    pieces = torch.arange(size).chunk(parts) if size else ()
    assert [list(range(first, first + count)) for first, count in ranges if count] == [
        piece.tolist() for piece in pieces
    ]
    assert all(first <= size and count >= 0 for first, count in ranges)


@given(st.lists(st.lists(st.integers(0, 30), unique=True, min_size=1, max_size=8), min_size=1, max_size=3))
@fixed
def test_boxes_of_runs_cover_the_product_of_the_indices_once(indices: list[list[int]]) -> None:
    parts = boxes_of_runs([runs_of(one) for one in indices])
    covered = [point for box, _ in parts for point in points(box)]
    assert sorted(covered) == sorted(itertools.product(*indices))
    for box, at in parts:
        for dimension, one in enumerate(indices):
            start, size = at[dimension], box.sizes[dimension]
            assert one[start : start + size] == [box.offsets[dimension] + i for i in range(size)]


# ---- tiling


@given(tilings())
@fixed
def test_a_tiling_is_accepted_in_any_order_with_repeats(tiling: tuple[tuple[int, ...], list[Box]]) -> None:
    shape, parts = tiling
    check_tiling([item("t", shape, part) for part in [*parts, *parts[:2]]])


@given(tilings().filter(lambda tiling: len(tiling[0]) > 0), st.data())
@fixed
def test_a_hole_an_overlap_and_a_stray_part_are_refused(
    tiling: tuple[tuple[int, ...], list[Box]], data: st.DataObject
) -> None:
    shape, parts = tiling
    full = [part for part in parts if part.volume]
    victim = data.draw(st.sampled_from(full))
    rest = [part for part in parts if part is not victim]
    items = [item("t", shape, part) for part in rest]
    with pytest.raises(IncompatibleCheckpointError, match=r"hole.*'t'"):
        check_tiling([*items, item("t", shape, Box(victim.offsets, (0,) * len(shape)))])
    dimension = data.draw(st.integers(0, len(shape) - 1))
    grown = list(victim.sizes)
    grown[dimension] += 1
    with pytest.raises(IncompatibleCheckpointError, match=r"overlap|lies outside"):
        check_tiling([*items, item("t", shape, Box(victim.offsets, tuple(grown)))])


@pytest.mark.parametrize("shape", [(), (0,), (0, 5), (3,)])
def test_whole_tensors_tile_themselves(shape: tuple[int, ...]) -> None:
    check_tiling([item("t", shape)])


def test_a_tensor_that_nobody_holds_is_a_hole() -> None:
    with pytest.raises(IncompatibleCheckpointError, match="hole: 0 of 4 elements"):
        check_tiling([item("t", (4,), Box((0,), (0,)))])


def test_ten_thousand_row_shards_are_checked_at_once() -> None:
    parts = [Box((row, 0), (1, 3)) for row in range(10_000)]
    check_tiling([item("t", (10_000, 3), part) for part in parts])


# ---- writers


@st.composite
def worlds(draw: st.DrawFn) -> list[list[TensorItem]]:
    """Up to four ranks: each tensor is replicated on some of them, or row-sharded over them with copies."""
    world_size = draw(st.integers(1, 4))
    ranks: list[list[TensorItem]] = [[] for _ in range(world_size)]
    for number in range(draw(st.integers(0, 8))):
        shape = (draw(st.integers(0, 9)), draw(st.integers(1, 50)))
        parts = draw(st.integers(1, world_size))
        for rank in range(world_size):
            first, count = shard_range(shape[0], parts, rank % parts)
            if rank < parts or draw(st.booleans()):
                ranks[rank].append(item(f"t{number}", shape, Box((first, 0), (count, shape[1]))))
    return [draw(st.permutations(items)) for items in ranks]


@given(worlds())
@fixed
def test_every_shard_is_written_once_by_a_rank_that_holds_it(ranks: list[list[TensorItem]]) -> None:
    chosen = assign_writers(ranks)
    assert chosen == assign_writers([list(items) for items in ranks])
    assert all(positions == sorted(set(positions)) for positions in chosen)
    written = [ranks[rank][position] for rank, positions in enumerate(chosen) for position in positions]
    assert len({(one.name, one.offsets, one.sizes) for one in written}) == len(written)
    assert {tuple(one) for one in written} == {tuple(one) for items in ranks for one in items}
    check_tiling(written)


@given(st.integers(2, 8), st.lists(st.integers(1, 1000), min_size=1, max_size=60))
@fixed
def test_replicated_bytes_are_spread_over_the_ranks(world_size: int, sizes: list[int]) -> None:
    items = [item(f"t{number}", (size,)) for number, size in enumerate(sizes)]
    chosen = assign_writers([items] * world_size)
    load = [sum(sizes[position] for position in positions) for positions in chosen]
    assert sum(load) == sum(sizes)
    assert max(load) - min(load) <= max(sizes)
    assert max(load) <= math.ceil(sum(sizes) / world_size) + max(sizes)


def test_a_rank_that_holds_much_alone_writes_less_of_what_is_shared() -> None:
    alone = item("alone", (100,))
    shared = [item(f"shared{number}", (10,)) for number in range(10)]
    chosen = assign_writers([[alone, *shared], shared])
    assert chosen == [[0], list(range(10))]


def test_what_is_tied_on_every_rank_goes_to_one_writer_and_counts_once() -> None:
    embed, body, head = item("embed", (100,)), item("body", (90,)), item("head", (100,))
    both = [embed, body, head]
    assert assign_writers([both, both], [[0, 1, 0], [0, 1, 0]]) == [[0, 2], [1]]
    assert assign_writers([both, both]) == [[0, 1], [2]]
    # Where a rank ties otherwise, or holds only one of the two, they are spread like any others.
    assert assign_writers([both, both], [[0, 1, 0], [0, 1, 2]]) == assign_writers([both, both])
    assert assign_writers([both, [head]], [[0, 1, 0], [0]]) == [[0, 1], [0]]


@given(worlds(), st.randoms(use_true_random=False))
@fixed
def test_any_ties_leave_every_shard_written_once(ranks: list[list[TensorItem]], source: Any) -> None:
    ties = [[source.randrange(position + 1) for position in range(len(items))] for items in ranks]
    ties = [[tie if own[tie] == tie else position for position, tie in enumerate(own)] for own in ties]
    chosen = assign_writers(ranks, ties)
    written = [ranks[rank][position] for rank, positions in enumerate(chosen) for position in positions]
    assert len({(one.name, one.offsets, one.sizes) for one in written}) == len(written)
    assert {tuple(one) for one in written} == {tuple(one) for items in ranks for one in items}


@pytest.mark.parametrize("other", [item("t", (5,)), item("t", (4,), dtype="int8"), item("t", (4, 1))])
def test_ranks_that_disagree_on_a_tensor_are_told_which_and_what_to_do(other: TensorItem) -> None:
    with pytest.raises(IncompatibleCheckpointError, match=r"ranks 0 and 2 disagree.*rank-specific names.*tensor='t'"):
        assign_writers([[item("t", (4,))], [], [other]])


# ---- digests


def test_equal_structures_have_equal_digests_and_any_difference_shows() -> None:
    one, other = item("a", (2, 3)), item("b", (4,))
    base = structure_digest([one, other], ["path"], 3)
    assert base == structure_digest([TensorItem(*one), other], ["path"], 3)
    changes: list[tuple[Any, ...]] = [
        ([other, one], ["path"], 3),
        ([one], ["path"], 3),
        ([one, other], ["other"], 3),
        ([one, other], ["path"], 4),
        ([one._replace(dtype="int8"), other], ["path"], 3),
        ([one._replace(shape=(3, 2)), other], ["path"], 3),
        ([one._replace(offsets=(1, 0)), other], ["path"], 3),
        ([one._replace(sizes=(1, 3)), other], ["path"], 3),
        ([one._replace(name="a1"), other], ["path"], 3),
    ]
    assert len({base, *(structure_digest(*change) for change in changes)}) == 1 + len(changes)
