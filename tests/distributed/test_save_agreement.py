"""Ranks that save and load together agree: who writes what, whose values are whose, what a failure or a cancel means.

Invariants: bytes that several ranks hold are written once; all ranks end with the same outcome.
"""

from __future__ import annotations

import itertools
import os
import random
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks, values
from torch import nn
from torch.distributed._shard import sharded_tensor
from torch.distributed._shard.metadata import ShardMetadata
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

import snapstone as ss
from roundtrip.bits import assert_same, random_bits
from snapstone import writer

KIB = 1 << 10
F32, U8 = torch.float32, torch.uint8


# ---- who writes what


def replicated(full: torch.Tensor, mesh: Any) -> DTensor:
    return distribute_tensor(full, mesh, [Replicate()], src_data_rank=None)


def save_replicated(rank: int, path: str) -> list[int]:
    mesh = init_device_mesh("cpu", (4,))
    state: dict[str, Any] = {f"r{i}": random_bits(U8, 200 * KIB + i, seed=i) for i in range(18)}
    state |= {f"d{i}": replicated(random_bits(U8, 100 * KIB, seed=i), mesh) for i in range(6)}
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
    mesh = init_device_mesh("cpu", (2,))
    sharded = distribute_tensor(random_bits(F32, TIED_BYTES // 4, seed=2), mesh, [Shard(0)], src_data_rank=None)
    state = {"embed": weight, "body": torch.zeros(100), "head": weight, "s1": sharded, "s2": sharded}
    saved = ss.save(state, checkpoint_id=path)
    target: dict[str, Any] = {
        "embed": torch.zeros_like(weight),
        "body": torch.zeros(100),
        "s1": torch.zeros_like(sharded),
    }
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


def load_other_keys(rank: int, path: str, kind: str) -> tuple[str, str]:
    target: dict[str, Any] = {f"stage{rank}": {"w": torch.zeros(5), "name": ""}}
    if kind == "missing":
        target["extra"] = torch.zeros(1)
        if rank == 1:
            target["new"] = torch.zeros(4)
    with pytest.raises(ss.CheckpointError) as caught:
        ss.load(target, checkpoint_id=path)
    return type(caught.value).__name__, str(caught.value)


@pytest.mark.parametrize(
    ("kind", "line"),
    [("unexpected", "unexpected in the checkpoint: extra"), ("missing", "missing from the checkpoint: new")],
)
def test_keys_that_do_not_fit_fail_every_rank(tmp_path: Path, kind: str, line: str) -> None:
    stages = {f"stage{rank}": {"w": torch.ones(5), "name": ""} for rank in range(2)}
    ss.save({**stages, "extra": torch.ones(1)}, checkpoint_id=tmp_path / "c")
    for name, message in values(run_ranks(2, load_other_keys, str(tmp_path / "c"), kind)):
        assert name in ("IncompatibleCheckpointError", "RankFailedError")
        assert line in message
        assert "stage" not in message.replace("staging", "")


def save_what_differs(rank: int, run: str, option: str) -> str:
    options: dict[str, Any] = {"checkpoint_id": Path(run, "c"), "timeout": 20}
    if rank == 1:
        other = {"checkpoint_id": Path(run, "other"), "step": 7, "overwrite": True, "base": Path(run, "before")}
        options[option] = other[option]
    with pytest.raises(ValueError, match="ranks 0 and 1 save different checkpoints") as caught:
        ss.save({"fine": torch.ones(2)}, **options)
    return str(caught.value)


@pytest.mark.parametrize("option", ["checkpoint_id", "step", "overwrite", "base"])
def test_ranks_that_are_told_to_save_different_checkpoints_save_none(tmp_path: Path, option: str) -> None:
    ss.save({"fine": torch.ones(2)}, checkpoint_id=tmp_path / "before")
    first, second = values(run_ranks(2, save_what_differs, str(tmp_path), option))
    assert first == second
    assert os.listdir(tmp_path) == ["before"]


def save_what_cannot_be(rank: int, path: str, kind: str) -> str:
    mesh = init_device_mesh("cpu", (2,))
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
        {f"t{rank}": torch.ones(10)},
        checkpoint_id=path,
        timeout=20,
        progress=(lambda *_: gate.wait(1.0) and None) if rank == 0 else False,
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
