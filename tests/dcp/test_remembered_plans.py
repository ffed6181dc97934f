"""Plans that SavePlanner keeps from save to save, on real ranks. Invariants: everything is read back bit for bit,
whatever is remembered, forgotten or changed, on whichever rank; planning is done once for each set of states.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import snapstone as ss
from dcp.planned_states import assert_loads, full, save, state
from distributed.ranks import run_ranks, values
from snapstone import _native
from snapstone.dcp import SavePlanner, StorageWriter, save_planner
from snapstone.dcp.global_plan import GlobalPlan
from snapstone.dcp.local_plan import facts_of
from snapstone.dcp.plan_columns import PlanColumns


@contextmanager
def counted() -> Iterator[dict[str, int]]:
    """How often this rank describes a plan of its own, and decides on those of all."""
    counts = {"local": 0, "global": 0}
    describe, decide = PlanColumns.of, GlobalPlan.of

    def describing(*arguments: Any) -> PlanColumns:
        counts["local"] += 1
        return describe(*arguments)

    def deciding(*arguments: Any, **options: Any) -> GlobalPlan:
        counts["global"] += 1
        return decide(*arguments, **options)

    PlanColumns.of, GlobalPlan.of = describing, deciding  # type: ignore[method-assign, assignment]
    try:
        yield counts
    finally:
        PlanColumns.of, GlobalPlan.of = describe, decide  # type: ignore[method-assign]


def forget() -> None:
    save_planner._local_plans.clear()
    save_planner._global_plans.clear()


def _repeat(rank: int, run: Path) -> list[dict[str, int]]:
    def with_own(number: int, size: int) -> dict[str, Any]:
        return state(number) | {f"own of {rank}": torch.zeros(size if rank == 1 else 3)}

    work = []
    for number, saved in enumerate(
        [
            state(1),
            state(2),
            state(3, torch.bfloat16),
            state(4, torch.bfloat16),
            state(5),
            state(6, placement=Shard(1)),
            with_own(7, 3),
            with_own(8, 4),
            with_own(9, 4),
        ]
    ):
        path = run / str(number)
        with counted() as counts:
            save(path, saved)
        work.append(counts)
        assert_loads(path, saved)
    return work


def test_a_plan_is_made_once_for_each_different_set_of_states(tmp_path: Path) -> None:
    coordinator, other = values(run_ranks(2, _repeat, tmp_path))
    assert [(work["local"], work["global"]) for work in coordinator] == [
        (1, 1),
        (0, 0),
        (1, 1),  # another dtype
        (0, 0),
        (0, 0),  # the first dtype again
        (1, 1),  # another placement
        (1, 1),
        (0, 1),  # another shape, on rank 1 alone
        (0, 0),
    ]
    assert [(work["local"], work["global"]) for work in other] == [
        (1, 0),
        (0, 0),
        (1, 0),
        (0, 0),
        (0, 0),
        (1, 0),
        (1, 0),
        (1, 0),
        (0, 0),
    ]
    assert ss.Checkpoint.open(tmp_path / "3").get_tensor("model.sharded").dtype == torch.bfloat16


def _facts(rank: int) -> list[str]:
    """Which changes of a state are not noticed."""
    mesh, other_mesh = init_device_mesh("cpu", (2,)), DeviceMesh("cpu", torch.tensor([1, 0]))

    def sharded(**changes: Any) -> Any:
        made = {"rows": 4, "dtype": torch.float32, "mesh": mesh, "placements": [Shard(0)]} | changes
        return distribute_tensor(full(made["rows"], 4, 0, made["dtype"]), made["mesh"], made["placements"])

    def facts(name: str, value: Any) -> Any:
        planner = SavePlanner()
        planner.set_up_planner({name: value})
        return facts_of(planner.state_dict, planner.mappings)

    states: dict[str, list[Any]] = {
        "sharded": ["a", sharded(), sharded()],
        "name": ["b", sharded()],
        "dtype": ["a", sharded(dtype=torch.bfloat16)],
        "shape": ["a", sharded(rows=5)],
        "placement": ["a", sharded(placements=[Shard(1)])],
        "mesh": ["a", sharded(mesh=other_mesh)],
        "gradient": ["a", sharded().requires_grad_()],
        "plain": ["a", full(4, 4), full(4, 4, 1)],
        "plain dtype": ["a", full(4, 4, 0, torch.bfloat16)],
        "plain shape": ["a", full(4, 5)],
        "value": ["a", 1, "other"],
        "list": ["a", [full(4, 4)], [full(4, 4)]],
        "dictionary": ["a", {"0": full(4, 4)}],
    }
    assert all(facts(name, first) == facts(name, same) for name, first, *rest in states.values() for same in rest)
    found = {case: facts(name, first) for case, (name, first, *_) in states.items()}
    return [f"{a} as {b}" for a, b in itertools.combinations(found, 2) if found[a] == found[b]]


def test_every_change_that_a_plan_depends_on_is_noticed() -> None:
    assert values(run_ranks(2, _facts)) == [[], []]


def _alternate(rank: int, run: Path) -> list[dict[str, int]]:
    planners = {"model": SavePlanner(), "optim": SavePlanner()}
    work = []
    for number in range(3):
        for part, planner in planners.items():
            saved = {part: state(number)[part]}
            with counted() as counts:
                dcp.save(saved, storage_writer=StorageWriter(run / part), planner=planner)
            work.append(counts)
            assert_loads(run / part, saved)
    return work


def test_model_and_optimizer_saved_in_turns_keep_their_own_plans(tmp_path: Path) -> None:
    made, remembered = {"local": 1, "global": 1}, {"local": 0, "global": 0}
    assert values(run_ranks(2, _alternate, tmp_path))[0] == [made] * 2 + [remembered] * 4


def _more_than_remembered(rank: int, run: Path) -> bool:
    for number in range(2 * (save_planner.PLANS_MAX + 2)):
        name = f"tensor {number % (save_planner.PLANS_MAX + 2)}"
        save(run / "c", {name: full(4, 4, number)})
        assert_loads(run / "c", {name: full(4, 4, number)})
    return len(save_planner._local_plans.all()) == save_planner.PLANS_MAX


def test_more_states_than_are_remembered(tmp_path: Path) -> None:
    assert values(run_ranks(2, _more_than_remembered, tmp_path)) == [True, True]


# A coordinator that does not know what ranks know ---------------------------------------------------------------------


def _forgetful(rank: int, run: Path) -> list[int]:
    save(run / "c", state(1))
    if rank == 0:
        forget()
    work = []
    for number in (2, 3):
        with counted() as counts:
            saved = state(number) | ({"new": torch.ones(2)} if rank == 1 else {})
            save(run / "c", saved)
        work.append(counts["global"])
        assert_loads(run / "c", saved)
    return work


def test_a_coordinator_that_forgot_is_told_again(tmp_path: Path) -> None:
    assert values(run_ranks(3, _forgetful, tmp_path)) == [[1, 0], [0, 0], [0, 0]]


def _groups(rank: int, run: Path) -> bool:
    """Ranks 2 and 3 have one state for two coordinators, neither of which knows what the other was told."""
    groups = [dist.new_group([0, 2, 3]), dist.new_group([1, 2, 3]), dist.new_group([2, 3])]
    for number in range(2):
        for index, members in enumerate(([0, 2, 3], [1, 2, 3], [2, 3])):
            if rank in members:
                saved = {"all": full(5, 5, number), f"of {rank}": full(3, 3, rank + number), "number": number}
                path = run / f"{number}-{index}"
                save(path, saved, process_group=groups[index])
                assert_loads(path, saved, process_group=groups[index])
        dist.barrier()
    return True


def test_one_state_saved_in_several_groups(tmp_path: Path) -> None:
    assert values(run_ranks(4, _groups, tmp_path)) == [True] * 4


def _other_coordinator(rank: int, run: Path) -> bool:
    for number in range(3):
        if number == 2 and rank == 1:
            forget()
        saved = state(number)
        saved[f"own of {rank}"] = torch.zeros(rank + 1)
        writer, planner = StorageWriter(run / "c"), SavePlanner()
        dcp.save_state_dict(saved, writer, coordinator_rank=1, planner=planner)
        assert_loads(run / "c", saved)
    return True


@pytest.mark.filterwarnings("ignore:'save_state_dict' is deprecated")
def test_a_coordinator_that_is_not_the_first_rank(tmp_path: Path) -> None:
    assert values(run_ranks(3, _other_coordinator, tmp_path)) == [True] * 3


def _disagree_at_meeting(rank: int, run: Path) -> list[str]:
    save(run / "c", {"t": torch.zeros(4)})
    if rank == 0:
        forget()
    try:
        save(run / "c", {"t": torch.zeros(4 if rank else 5)})
        failed = []
    except CheckpointException as error:
        failed = sorted({type(failure).__name__ for failure, _ in error.failures.values()})
    dist.barrier()
    save(run / "c", {"t": torch.ones(4)})
    assert_loads(run / "c", {"t": torch.ones(4)})
    return failed


def test_an_error_at_the_second_meeting_fails_the_save_everywhere(tmp_path: Path) -> None:
    failed = values(run_ranks(3, _disagree_at_meeting, tmp_path))
    assert failed == [["IncompatibleCheckpointError", "RankFailedError"]] * 3


def _fail_to_write(rank: int, run: Path) -> bool:
    for number in range(3):
        saved = state(number, (torch.float32, torch.bfloat16)[number % 2])
        if rank == 1:
            _native.fault_arm("fallocate:1:errno=ENOSPC")
        with pytest.raises(CheckpointException):
            save(run / "c", saved)
        _native.fault_disarm()
        dist.barrier()
        save(run / "c", saved)
        assert_loads(run / "c", saved)
    return True


def test_saves_that_failed_leave_plans_that_work(tmp_path: Path) -> None:
    assert values(run_ranks(2, _fail_to_write, tmp_path)) == [True, True]
