"""What planning costs when many ranks save many tensors, counted and never timed: ranks are simulated in one process,
each with a memory of its own. `benchmarks/planning.py` has the seconds.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType

from snapstone.dcp import SavePlanner, global_plan, local_plan, save_planner
from snapstone.dcp.global_plan import GlobalPlan
from snapstone.dcp.plan_columns import PlanColumns
from snapstone.dcp.recent import Recent

RANKS = 64
TENSORS = 300
SCALAR_EVERY = 10
ROWS, COLUMNS = 4, 8  # of a rank's shard


class Row:
    """A tensor of which this rank has some rows, as DCP asks it."""

    def __init__(self, rank: int, ranks: int, columns: int = COLUMNS) -> None:
        self.rank, self.ranks, self.columns = rank, ranks, columns

    def __create_write_items__(self, name: str, _: object) -> list[WriteItem]:
        offsets, sizes = torch.Size((self.rank * ROWS, 0)), torch.Size((ROWS, self.columns))
        chunk, properties = ChunkStorageMetadata(offsets, sizes), TensorProperties(torch.float32)
        data = TensorWriteData(chunk, properties, torch.Size((self.ranks * ROWS, self.columns)))
        return [WriteItem(MetadataIndex(name, offsets), WriteItemType.SHARD, tensor_data=data)]


def state(rank: int, ranks: int, tensors: int, columns: int = COLUMNS) -> dict[str, Any]:
    model = {
        f"layer {number}": Row(rank, ranks, columns) if number % SCALAR_EVERY else torch.tensor(float(number))
        for number in range(tensors)
    }
    return {"model": model, "epoch": 1}


@dataclass
class World:
    """Simulated ranks. Counts what is gathered and scattered, as DCP pickles it, and who plans."""

    states: list[dict[str, Any]]
    remembered: list[Recent[Any]] = field(init=False)
    gathered_bytes: list[int] = field(default_factory=list)
    scattered_bytes: list[int] = field(default_factory=list)
    items_moved: int = 0
    final: list[SavePlan] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.remembered = [Recent(save_planner.PLANS_MAX) for _ in self.states]

    def save(self, use_memory: Callable[[Recent[Any]], None]) -> Metadata:
        planners = [SavePlanner() for _ in self.states]
        proposals, self.final = [], []
        for rank, (planner, own) in enumerate(zip(planners, self.states, strict=True)):
            use_memory(self.remembered[rank])
            planner.set_up_planner(own, is_coordinator=rank == 0)
            proposals.append(pickle.dumps(planner.create_local_plan()))
        self.gathered_bytes = list(map(len, proposals))
        plans = list(map(pickle.loads, proposals))
        decided, metadata = planners[0].create_global_plan(plans)
        decisions = list(map(pickle.dumps, decided))
        self.scattered_bytes = list(map(len, decisions))
        self.items_moved = sum(len(plan.items) for plan in [*plans, *decided])
        for rank, planner in enumerate(planners):
            use_memory(self.remembered[rank])
            self.final.append(planner.finish_plan(pickle.loads(decisions[rank])))
        return metadata


@pytest.fixture
def use_memory(monkeypatch: pytest.MonkeyPatch) -> Callable[[Recent[Any]], None]:
    monkeypatch.setattr(save_planner, "_global_plans", Recent(save_planner.PLANS_MAX))
    return lambda memory: monkeypatch.setattr(save_planner, "_local_plans", memory)


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How often a rank's plan is described, the plans of all decided on, and a tensor asked for its items."""
    counts = {"described": 0, "decided": 0, "write items": 0}

    def count(owner: Any, name: str, what: str) -> None:
        original = getattr(owner, name)

        def counting(*arguments: Any, **options: Any) -> Any:
            counts[what] += 1
            return original(*arguments, **options)

        monkeypatch.setattr(owner, name, counting)

    count(PlanColumns, "of", "described")
    count(GlobalPlan, "of", "decided")
    count(local_plan, "_create_write_items", "write items")
    return counts


def test_a_repeated_save_moves_no_items_and_plans_nothing(use_memory: Any, work: dict[str, int]) -> None:
    world = World([state(rank, RANKS, TENSORS) for rank in range(RANKS)])
    world.save(use_memory)
    first = world.final
    assert (work["described"], work["decided"]) == (RANKS, 1)
    assert sum(len(plan.items) for plan in first) == RANKS * TENSORS * 9 // 10 + TENSORS // 10 + 1
    for _ in range(2):
        world.save(use_memory)
        assert world.items_moved == 0
        assert max(world.gathered_bytes) <= 1024
        assert max(world.scattered_bytes) <= 1024
        assert (work["described"], work["decided"]) == (RANKS, 1)
        assert world.final == first


def test_a_first_save_sends_ten_bytes_an_item_and_gets_a_bit_back(use_memory: Any) -> None:
    world = World([state(rank, RANKS, TENSORS) for rank in range(RANKS)])
    world.save(use_memory)
    assert world.items_moved == 0
    assert max(world.gathered_bytes) <= 1024 + 20 * TENSORS
    assert max(world.scattered_bytes) <= 1024 + TENSORS // 8


def test_one_rank_that_changed_sends_its_plan_and_no_other_does(use_memory: Any, work: dict[str, int]) -> None:
    world = World([state(rank, RANKS, TENSORS) for rank in range(RANKS)])
    world.save(use_memory)
    world.states[7]["model"]["own"] = torch.zeros(3)
    metadata = world.save(use_memory)
    assert (work["described"], work["decided"]) == (RANKS + 1, 2)
    assert [rank for rank, nbytes in enumerate(world.gathered_bytes) if nbytes > 1024] == [7]
    assert "model.own" in {item.index.fqn for item in world.final[7].items}
    assert "model.own" in metadata.state_dict_metadata
    world.save(use_memory)
    assert (work["described"], work["decided"]) == (RANKS + 1, 2)


def test_a_plan_is_checked_when_it_is_new(use_memory: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    checked: list[str] = []
    check = global_plan._check_cover

    def checking(name: str, *more: Any, **options: Any) -> None:
        checked.append(name)
        check(name, *more, **options)

    monkeypatch.setattr(global_plan, "_check_cover", checking)
    world = World([state(rank, 4, 20) for rank in range(4)])
    for _ in range(2):
        world.save(use_memory)
        assert sorted(checked) == sorted(f"model.layer {number}" for number in range(20))


def test_what_is_kept_grows_with_ranks_times_tensors_and_no_faster(use_memory: Any) -> None:
    kept, broadcast = [], []
    for ranks in (RANKS // 2, RANKS):
        save_planner._global_plans.clear()
        world = World([state(rank, ranks, TENSORS) for rank in range(ranks)])
        metadata = world.save(use_memory)
        metadata.state_dict_metadata.compact = True  # type: ignore[attr-defined]
        (plan,) = save_planner._global_plans.all()
        kept.append(len(pickle.dumps(plan)))
        broadcast.append(len(pickle.dumps(metadata)))
    # Not twice exactly: what all ranks share counts once, and larger numbers compress less well.
    assert kept[1] <= 2.5 * kept[0] <= 2.5 * 20 * RANKS // 2 * TENSORS
    assert broadcast[1] <= 2.5 * broadcast[0] <= 2.5 * 4 * RANKS // 2 * TENSORS


def test_states_saved_in_turns_are_planned_once_each(use_memory: Any, work: dict[str, int]) -> None:
    world = World([{} for _ in range(4)])
    for number in range(3 * save_planner.PLANS_MAX):
        columns = 1 + number % save_planner.PLANS_MAX
        world.states = [state(rank, 4, 20, columns) for rank in range(4)]
        world.save(use_memory)
    assert (work["described"], work["decided"]) == (4 * save_planner.PLANS_MAX, save_planner.PLANS_MAX)
