"""Saves and loads of several ranks together: who writes what, what every rank gets back, and what all of them refuse.

Invariants: what is loaded is what was saved, bit for bit and value for value, on every rank and on any other number of
ranks; what ranks hold alike is stored once; whatever is refused is refused on every rank, leaves nothing behind, and
leaves the ranks in step for the next save.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from rank_states import (
    assert_holds,
    attempt,
    blank,
    common,
    hidden,
    leaked,
    objects_of,
    own,
    resources,
    same,
    save,
    state,
)
from ranks import run_ranks, values
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard

import snapstone as ss
from snapstone import _native
from snapstone.collective import Channel, Deadline, Group
from snapstone.reader import Reader

pytestmark = [pytest.mark.timeout(60), pytest.mark.usefixtures("small_chunks")]


def load(rank: int, path: Path, **more: Any) -> dict[str, Any]:
    target = blank(rank)
    ss.load(target, checkpoint_id=path, timeout=20, **more)
    return target


# ---- who writes what


def _keys_after_each(rank: int, run: Path, steps: int) -> list[int]:
    store: Any = dist.distributed_c10d._get_default_store()
    while hasattr(store, "underlying_store"):
        store = store.underlying_store
    keys = []
    for step in range(steps):
        save(rank, run, step)
        load(rank, run / f"step-{step}")
        keys.append(store.num_keys())
    return keys


def test_saves_and_loads_leave_no_keys_in_the_store(tmp_path: Path) -> None:
    for keys in values(run_ranks(2, _keys_after_each, tmp_path, 12, store="tcp")):
        assert max(keys[6:]) < max(keys[:6]) + 40  # every operation has more than ten


def _save_and_load(rank: int, run: Path) -> tuple[bool, dict[str, str]]:
    checkpoint = save(rank, run, 1, metadata={"loss": 0.5})
    assert (checkpoint.step, checkpoint.metadata) == (None, {"loss": 0.5})
    before = resources()
    save(rank, run, 2)
    first, second = load(rank, run / "step-1"), load(rank, run / "step-2")
    assert leaked(before) == [0, 0]
    return same(first, state(rank, 1)) and same(second, state(rank, 2)), checkpoint.save_id


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_every_rank_gets_back_what_it_saved(tmp_path: Path, world_size: int) -> None:
    results = values(run_ranks(world_size, _save_and_load, tmp_path))
    assert [works for works, _ in results] == [True] * world_size
    assert len({save_id for _, save_id in results}) == 1
    for step in (1, 2):
        assert_holds(tmp_path / f"step-{step}", world_size, step)
    files = [name for rank in range(world_size) for name in (f"rank-0000{rank}.data", f"rank-0000{rank}.index")]
    assert sorted(os.listdir(tmp_path / "step-1")) == sorted([*files, "MANIFEST.json", "MANIFEST.xxh128"])
    assert hidden(tmp_path) == []


def _save_replicas(rank: int, run: Path) -> None:
    tensors = {f"t{index}": torch.full((20_000 + index,), float(index)) for index in range(12)}
    sharded = DTensor.from_local(torch.ones(4, 4), init_device_mesh("cpu", (3,)), [Replicate()], run_check=False)
    ss.save({**tensors, "replicated": sharded, f"own.{rank}": torch.ones(60_000)}, checkpoint_id=run / "last")


def test_what_ranks_hold_alike_is_written_once_and_spread_by_bytes(tmp_path: Path) -> None:
    values(run_ranks(3, _save_replicas, tmp_path))
    reader = Reader(tmp_path / "last")
    assert all(len(shards) == 1 for shards in reader.shards.values())
    written = [sum(stored.item.nbytes for stored in index.tensors) for index in reader.indexes]
    assert sum(written) == reader.manifest.nbytes == 4 * (sum(range(20_000, 20_012)) + 16 + 3 * 60_000)
    assert max(written) - min(written) <= 4 * 20_012  # the size of one shared tensor
    for rank, index in enumerate(reader.indexes):
        assert f"own.{rank}" in {stored.item.name for stored in index.tensors}
        on_disk = (tmp_path / "last" / f"rank-0000{rank}.data").stat().st_size
        assert written[rank] <= on_disk < written[rank] + 64 * 4096


def test_values_that_rank_0_has_too_are_stored_once(tmp_path: Path) -> None:
    values(run_ranks(2, _save_and_load, tmp_path))
    objects = [set(index.objects) for index in Reader(tmp_path / "step-1").indexes]
    assert objects == [{"rng", "who", "seed"}, {"rng", "who"}]


def _generators(rank: int, path: Path) -> bool:
    torch.manual_seed(rank)
    torch.rand(rank + 1)
    saved = {"cpu": torch.get_rng_state().numpy().tobytes(), "tensor": {f"rank{rank}": torch.get_rng_state()}}
    ss.save({"rng": saved}, checkpoint_id=path)
    expected = torch.rand(5)
    target = {"rng": {"cpu": b"", "tensor": {f"rank{rank}": torch.zeros_like(torch.get_rng_state())}}}
    ss.load(target, checkpoint_id=path)
    draws = []
    for loaded in (
        torch.frombuffer(bytearray(target["rng"]["cpu"]), dtype=torch.uint8),
        target["rng"]["tensor"][f"rank{rank}"],
    ):
        torch.set_rng_state(loaded)
        draws.append(torch.equal(torch.rand(5), expected))
    return all(draws)


def test_generators_of_each_rank_go_on_where_they_were(tmp_path: Path) -> None:
    assert values(run_ranks(2, _generators, tmp_path / "last")) == [True, True]


# ---- other numbers of ranks


def _sharded(rank: int, world_size: int, seed: int) -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (world_size,))
    whole = {
        "rows": torch.arange(7.0 * 5).reshape(7, 5) + seed,
        "columns": torch.arange(3.0 * 11).reshape(3, 11) + seed,
    }
    placed = {}
    for dimension, (name, tensor) in enumerate(whole.items()):
        piece = tensor.chunk(world_size, dimension)
        local = piece[rank] if rank < len(piece) else tensor.narrow(dimension, 0, 0)
        placed[name] = DTensor.from_local(
            local.clone(), mesh, [Shard(dimension)], run_check=False, shape=tensor.shape, stride=tensor.stride()
        )
    return {**placed, **common(seed), "step": seed, "rank": rank}


def _save_sharded(rank: int, world_size: int, path: Path) -> None:
    ss.save(_sharded(rank, world_size, 3), checkpoint_id=path)


def _load_sharded(rank: int, world_size: int, path: Path) -> tuple[bool, Any]:
    target, expected = _sharded(rank, world_size, 0), _sharded(rank, world_size, 3)
    ss.load(target, checkpoint_id=path)
    tensors = [name for name, item in expected.items() if isinstance(item, torch.Tensor)]
    local = [(getattr(state[name], "_local_tensor", state[name])) for state in (target, expected) for name in tensors]
    half = len(tensors)
    return all(map(torch.equal, local[:half], local[half:])) and target["step"] == 3, target["rank"]


@pytest.mark.parametrize(("saved_by", "loaded_by"), [(2, 3), (2, 1), (3, 2), (1, 2), (4, 3)])
def test_a_checkpoint_loads_on_any_number_of_ranks(tmp_path: Path, saved_by: int, loaded_by: int) -> None:
    values(run_ranks(saved_by, _save_sharded, saved_by, tmp_path / "last"))
    results = values(run_ranks(loaded_by, _load_sharded, loaded_by, tmp_path / "last"))
    # A rank that did not exist then gets the values of the lowest that did.
    assert results == [(True, rank if rank < saved_by else 0) for rank in range(loaded_by)]


def test_one_process_without_a_group_loads_what_several_saved(tmp_path: Path) -> None:
    values(run_ranks(2, _save_sharded, 2, tmp_path / "last"))
    target = {"rows": torch.zeros(7, 5), "columns": torch.zeros(3, 11), **common(0), "step": 0, "rank": -1}
    ss.load(target, checkpoint_id=tmp_path / "last")
    expected = {"rows": torch.arange(35.0).reshape(7, 5) + 3, "columns": torch.arange(33.0).reshape(3, 11) + 3}
    assert same(target, {**expected, **common(3), "step": 3, "rank": 0})


def _names_of_its_own(rank: int, path: Path, extra: bool) -> list[Any]:
    save_names = {**own(rank, 1), f"value.{rank}": rank}
    if extra and rank == 0:
        save_names["nobody's"] = torch.ones(3)
    ss.save(save_names, checkpoint_id=path)
    target = {
        name: torch.zeros_like(item) if isinstance(item, torch.Tensor) else None for name, item in own(rank, 1).items()
    }
    target[f"value.{rank}"] = None
    ended = attempt(lambda: ss.load(target, checkpoint_id=path))
    ended["same"] = same(target, {**own(rank, 1), f"value.{rank}": rank})
    lenient = ss.load(target, checkpoint_id=path, strict=False)
    return [ended, sorted(lenient.unexpected_keys)]


def test_ranks_with_names_of_their_own_load_them_strictly(tmp_path: Path) -> None:
    results = values(run_ranks(2, _names_of_its_own, tmp_path / "last", False))
    assert [(ended["error"], ended["same"]) for ended, _ in results] == [(None, True)] * 2
    assert [unexpected for _, unexpected in results] == [["own.1", "value.1"], ["own.0", "value.0"]]


def test_a_name_that_no_rank_wants_is_an_error_on_every_rank(tmp_path: Path) -> None:
    for ended, _ in values(run_ranks(2, _names_of_its_own, tmp_path / "last", True)):
        assert ended["error"] == "IncompatibleCheckpointError"
        assert "1 keys do not fit" in ended["message"]
        assert "unexpected in the checkpoint: nobody's" in ended["message"]


# ---- what is refused


def _mismatch(rank: int, kind: str) -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (2,))
    half = DTensor.from_local(torch.ones(4, 3), mesh, [Shard(0)], run_check=False)
    good = {"fine": torch.ones(5)}
    bad: Any = {
        "shape": torch.ones(4 + rank),
        "dtype": torch.ones(4, dtype=(torch.float32, torch.float64)[rank]),
        "hole": half,
        "overlap": half if rank else torch.ones(8, 3),
    }[kind]
    return good if kind == "hole" and rank else {**good, "bad": bad}


def _refused(rank: int, run: Path, kind: str) -> dict[str, Any]:
    save(rank, run, 1)
    ended = attempt(lambda: ss.save(_mismatch(rank, kind), checkpoint_id=run / "step-2", timeout=20))
    save(rank, run, 3)
    return ended


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("shape", "float32[4] and float32[5]"),
        ("dtype", "float64"),
        ("hole", "hole: 12 of 24"),
        ("overlap", "overlap"),
    ],
)
def test_tensors_that_do_not_fit_together_are_refused_by_name(tmp_path: Path, kind: str, says: str) -> None:
    first, second = values(run_ranks(2, _refused, tmp_path, kind))
    assert (first["error"], first["tensor"]) == ("IncompatibleCheckpointError", "bad")
    assert (second["error"], second["failed_ranks"]) == ("RankFailedError", (0,))
    for ended in (first, second):
        assert says in ended["message"]
        assert "bad" in ended["message"]
        assert ended["seconds"] < 20  # the deadline is 1800 s
    assert sorted(os.listdir(tmp_path)) == ["step-1", "step-3"]
    assert_holds(tmp_path / "step-3", 2, 3)


def _different_targets(rank: int, run: Path) -> list[Any]:
    here = {"checkpoint_id": run / "here", "step": 1}
    there: list[dict[str, Any]] = [{"checkpoint_id": run / "there"}, {"step": 2}, {"overwrite": True}]
    ended = [attempt(lambda: ss.save(state(rank, 1), **here, timeout=20))]
    for other in there:
        arguments = {**here, "checkpoint_id": run / "new", **(other if rank else {})}
        ended.append(attempt(lambda: ss.save(state(rank, 1), **arguments, timeout=20)))  # noqa: B023
    ended.append(attempt(lambda: ss.save(state(rank, 1), **here, timeout=20)))
    save(rank, run, 3)
    return ended


def test_ranks_that_save_to_different_places_are_all_told(tmp_path: Path) -> None:
    results = values(run_ranks(2, _different_targets, tmp_path))
    for ended in results:
        assert ended[0]["error"] is None
        for one in ended[1:4]:
            assert one["error"] == "ValueError"
            assert "ranks 0 and 1 save different checkpoints" in one["message"]
            assert one["seconds"] < 20
    assert (results[0][4]["error"], results[1][4]["failed_ranks"]) == ("FileExistsError", (0,))
    assert sorted(os.listdir(tmp_path)) == ["here", "step-3"]
    assert_holds(tmp_path / "here", 2, 1)


# ---- the structure is agreed on once


def _posted(call: Any) -> set[str]:
    """The kinds of messages that this rank sends to the store meanwhile."""
    names = set()
    original = Channel._post

    def recording(self: Channel, name: str, payload: bytes) -> Any:
        names.add(name.partition("/")[0])
        return original(self, name, payload)

    Channel._post = recording  # type: ignore[method-assign]
    try:
        call()
    finally:
        Channel._post = original  # type: ignore[method-assign]
    return names


def _same_structure(rank: int, run: Path, alone: int) -> list[set[str]]:
    def grown() -> dict[str, Any]:
        return {**state(rank, 4), **({f"own.{rank}": torch.ones(5)} if rank == 1 else {})}

    posted = [_posted(lambda: save(rank, run, 1)), _posted(lambda: save(rank, run, 2))]
    if rank == alone:
        for index in range(5):  # more than the cache holds
            ss.save({"mine": torch.ones(index + 1)}, checkpoint_id=run / f"alone-{index}", no_dist=True)
    posted.append(_posted(lambda: save(rank, run, 3)))
    posted.append(_posted(lambda: ss.save(grown(), checkpoint_id=run / "step-4", timeout=20)))
    target = grown()
    target[f"own.{rank}"] = torch.zeros_like(target[f"own.{rank}"])
    ss.load(target, checkpoint_id=run / "step-4")
    assert same(target, grown())
    return posted


def test_an_unchanged_structure_is_not_agreed_on_again(tmp_path: Path) -> None:
    for posted in values(run_ranks(2, _same_structure, tmp_path, -1)):
        first, second, third, changed = posted
        assert "assign" in first
        assert not {"items", "assign"} & (second | third)
        assert "assign" in changed  # though only rank 1 has another shape
    for step in (1, 2, 3):
        assert_holds(tmp_path / f"step-{step}", 2, step)


@pytest.mark.parametrize("alone", [0, 1])
def test_a_rank_that_has_forgotten_the_structure_is_waited_for_by_none(tmp_path: Path, alone: int) -> None:
    begin = time.monotonic()
    for posted in values(run_ranks(2, _same_structure, tmp_path, alone)):
        assert "assign" in posted[2]
    assert time.monotonic() - begin < 10
    assert_holds(tmp_path / "step-3", 2, 3)


# ---- in the background, while training goes on


class Training:
    """A model that is the same on all ranks, and one that each rank has for itself."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        torch.manual_seed(0)
        self.shared = torch.nn.Sequential(
            torch.nn.Linear(200, 300), torch.nn.BatchNorm1d(300), torch.nn.Linear(300, 10)
        )
        torch.manual_seed(rank)
        self.private = torch.nn.Linear(10, 400)
        parameters = [*self.shared.parameters(), *self.private.parameters()]
        self.optimizer = torch.optim.Adam(parameters, lr=1e-2)
        self.steps = 0

    def state(self) -> dict[str, Any]:
        moments = {
            str(index): dict(entry)
            for index, entry in enumerate(self.optimizer.state[p] for p in self.private.parameters())
            if entry
        }
        return {
            "shared": self.shared.state_dict(),
            f"private{self.rank}": self.private.state_dict(),
            f"moments{self.rank}": moments,
            "steps": self.steps,
        }

    def step(self) -> None:
        self.optimizer.zero_grad()
        torch.manual_seed(self.steps)
        hidden_layer = self.shared(torch.randn(16, 200))
        # Gradients of the shared part are equal on all ranks; the private part only sees its output.
        hidden_layer.sum().backward()
        self.private(hidden_layer.detach()).square().sum().mul(self.rank + 1).backward()
        self.optimizer.step()
        self.steps += 1


def _flat(nested: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(nested, dict):
        return {prefix: nested.detach().clone() if isinstance(nested, torch.Tensor) else nested}
    return {name: leaf for key, item in nested.items() for name, leaf in _flat(item, f"{prefix}.{key}").items()}


def _train(rank: int, run: Path, fence_now: bool, saves: int) -> list[bool]:
    training = Training(rank)
    training.step()
    handles, expected = [], []
    for index in range(saves):
        expected.append(_flat(training.state()))
        fence = "now" if fence_now else training.optimizer
        handles.append(ss.async_save(training.state(), checkpoint_id=run / f"{index}", fence=fence, timeout=20))
        for _ in range(2):
            training.step()
    assert handles[-1].result(30).path == str(run / f"{saves - 1}")
    ss.wait(30)
    right = []
    for index in range(saves):
        loaded = training.state()
        ss.load(loaded, checkpoint_id=run / f"{index}", timeout=20)
        right.append(same(_flat(loaded), expected[index]))
    return right


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("fence_now", [True, False], ids=["now", "optimizer"])
def test_background_saves_hold_the_values_of_the_call_while_training_goes_on(
    tmp_path: Path, world_size: int, fence_now: bool
) -> None:
    saves = 3 if world_size == 2 else 2
    assert values(run_ranks(world_size, _train, tmp_path, fence_now, saves)) == [[True] * saves] * world_size
    assert hidden(tmp_path) == []


def _two_in_flight(rank: int, run: Path) -> list[str]:
    # Each save is held up on another rank, so that the two overlap for sure.
    _native.fault_arm("uring_write:1:delay=400;pwrite:2:delay=400")
    handles = [ss.async_save(state(rank, step), checkpoint_id=run / f"step-{step}", timeout=20) for step in (1, 2)]
    ids = [handle.result(20).save_id for handle in reversed(handles)]
    _native.fault_disarm()
    return ids


def test_two_background_saves_in_flight_do_not_mix(tmp_path: Path) -> None:
    first, second = values(run_ranks(2, _two_in_flight, tmp_path))
    assert first == second
    assert len(set(first)) == 2
    for step in (1, 2):
        assert_holds(tmp_path / f"step-{step}", 2, step)
    assert hidden(tmp_path) == []


# ---- parts of a job


def _subgroup(rank: int, run: Path) -> Any:
    subgroup = dist.new_group([1, 2])
    if rank == 0:
        ended = attempt(lambda: ss.save({"x": torch.ones(3)}, checkpoint_id=run / "no", process_group=subgroup))
        assert ended["error"] == "ValueError"
        assert "not a member" in ended["message"]
        told = None
    else:
        save(rank - 1, run, 1, process_group=subgroup)
        assert same(load(rank - 1, run / "step-1", process_group=subgroup), state(rank - 1, 1))
        more = {"bad": torch.ones(1).to_sparse()} if rank == 2 else {}
        told = attempt(lambda: ss.save({**state(rank, 1), **more}, checkpoint_id=run / "no", process_group=subgroup))
    save(rank, run, 2)
    return told


def test_a_subgroup_saves_without_the_others_and_names_global_ranks(tmp_path: Path) -> None:
    _, told, mine = values(run_ranks(3, _subgroup, tmp_path))
    assert (told["error"], told["failed_ranks"]) == ("RankFailedError", (2,))
    assert mine["error"] == "TypeError"
    assert_holds(tmp_path / "step-1", 2, 1)
    assert_holds(tmp_path / "step-2", 3, 2)
    assert sorted(os.listdir(tmp_path)) == ["step-1", "step-2"]


def _alone(rank: int, run: Path) -> bool:
    if rank == 1:
        checkpoint = ss.save(state(0, 1), checkpoint_id=run / "step-1", no_dist=True)
        assert checkpoint.manifest.world_size == 1
        handle = ss.async_save(state(0, 2), checkpoint_id=run / "step-2", no_dist=True)
        handle.result(20)
        assert same(load(0, run / "step-1", no_dist=True), state(0, 1))
    save(rank, run, 3)
    return same(load(rank, run / "step-3"), state(rank, 3))


def test_one_rank_saves_alone_inside_a_job(tmp_path: Path) -> None:
    assert values(run_ranks(2, _alone, tmp_path)) == [True, True]
    for step, world_size in ((1, 1), (2, 1), (3, 2)):
        assert_holds(tmp_path / f"step-{step}", world_size, step)


def _replace(rank: int, path: Path) -> list[bool]:
    right = []
    for seed in (1, 2):
        ss.save(state(rank, seed), checkpoint_id=path, overwrite=True, timeout=20)
        Group.create().channel("test").exchange("saved", b"", Deadline(20))
        right.append(same(load(rank, path), state(rank, seed)))
    return right


def test_ranks_replace_a_checkpoint_together(tmp_path: Path) -> None:
    assert values(run_ranks(2, _replace, tmp_path / "last")) == [[True, True]] * 2
    assert os.listdir(tmp_path) == ["last"]
    assert objects_of(tmp_path / "last", 1)["who"] == ("rank", 1)
