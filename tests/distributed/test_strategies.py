"""Loads in which ranks read for each other: every byte once from storage, the right bytes everywhere, errors on all."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

import snapstone as ss
from distributed.rank_states import segment_descriptors
from distributed.ranks import run_ranks, values
from snapstone import RankFailedError, _native, joint
from snapstone.strategy import Rates

MIB = 1 << 20
PLACEMENTS: dict[str, Any] = {"rows": Shard(0), "columns": Shard(1), "replicated": Replicate()}


def full(number: int, rows: int = 1030, columns: int = 1021) -> torch.Tensor:
    return torch.arange(rows * columns, dtype=torch.float32).reshape(rows, columns) * 3 + number


def state(number: int, placement: str) -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    scale = 1 if number else 0
    return {
        "big": distribute_tensor(full(number) * scale, mesh, [PLACEMENTS[placement]]),
        "bf16": distribute_tensor((full(number, 300, 90) * scale).bfloat16(), mesh, [PLACEMENTS[placement]]),
        "transposed": (full(number, 120, 77) * scale).t(),
        "small": [torch.full((3,), float(number + i)) for i in range(50)],
        "scalar": torch.tensor(number),
        "empty": torch.empty(0, 4),
        "own": {f"of-{dist.get_rank()}": torch.full((700, 1000), float(number * (dist.get_rank() + 1)))},
        "step": number,
    }


def assert_is(found: dict[str, Any], number: int, own: bool = True) -> None:
    assert torch.equal(found["big"].full_tensor(), full(number))
    assert torch.equal(found["bf16"].full_tensor(), full(number, 300, 90).bfloat16())
    assert torch.equal(found["transposed"], full(number, 120, 77).t())
    assert [float(one[0]) for one in found["small"]] == [float(number + i) for i in range(50)]
    assert found["scalar"] == number
    assert found["step"] == number
    if own:
        rank = dist.get_rank()
        assert torch.equal(found["own"][f"of-{rank}"], torch.full((700, 1000), float(number * (rank + 1))))


def _save(rank: int, run: Path, placement: str) -> None:
    ss.save(state(7, placement), checkpoint_id=run / "c")


def _load(rank: int, run: Path, placement: str, strategies: list[str], nodes: int) -> list[dict[str, Any]]:
    os.environ["SNAPSTONE_NODE"] = f"node-{rank % nodes}"
    found = []
    for strategy in strategies:
        target = state(0, placement)
        own = f"own.of-{rank}" in ss.Checkpoint.open(run / "c").load_tensors()
        if not own:
            target.pop("own")
        checkpoint = ss.load(target, checkpoint_id=run / "c", strategy=strategy, strict=False)
        assert_is(target, 7, own)
        found.append({key: checkpoint.stats[key] for key in ("strategy", "bytes_read", "bytes_needed")})
    return found


@pytest.mark.parametrize(
    ("before", "saved", "after", "wanted", "nodes"),
    [
        (4, "rows", 2, "columns", 1),
        (2, "columns", 3, "rows", 1),
        (3, "rows", 3, "replicated", 3),
        (2, "rows", 4, "columns", 2),
    ],
)
def test_any_strategy_loads_the_same_bits_and_reads_shared_bytes_once(
    tmp_path: Path, before: int, saved: str, after: int, wanted: str, nodes: int
) -> None:
    values(run_ranks(before, _save, tmp_path, saved))
    strategies = ["direct", "scatter", "broadcast", "auto"]
    results = values(run_ranks(after, _load, tmp_path, wanted, strategies, nodes, timeout=120))
    checkpoint = ss.Checkpoint.open(tmp_path / "c")
    needed = checkpoint.nbytes - sum(checkpoint.get_slice(f"own.of-{rank}").nbytes for rank in range(after, before))
    for position, strategy in enumerate(strategies[1:3], 1):
        of_ranks = [result[position] for result in results]
        assert {one["strategy"] for one in of_ranks} == {strategy}
        assert sum(one["bytes_read"] for one in of_ranks) <= 1.05 * needed
        if strategy == "broadcast":
            assert [one["bytes_read"] > 0 for one in of_ranks] == [True] + [False] * (after - 1)
        else:
            assert all(one["bytes_read"] > 0 for one in of_ranks)
    assert sum(result[0]["bytes_read"] for result in results) > 1.2 * needed


def _measured_load(rank: int, run: Path) -> tuple[str, list[Rates]]:
    os.environ["SNAPSTONE_NODE"] = f"node-{rank}"
    found: list[Rates] = []
    measure = joint._JointLoad._measure

    def keeps(self: Any, needs: Any) -> list[Rates]:
        found.extend(measure(self, needs))
        return found

    joint._JointLoad._measure = keeps  # type: ignore[method-assign]
    target = {"w": torch.zeros(17 * 1024, 1024)}
    checkpoint = ss.load(target, checkpoint_id=run / "c")
    assert torch.equal(target["w"], full(3, 17 * 1024, 1024))
    return checkpoint.stats["strategy"], found


def test_what_is_large_and_wanted_twice_is_measured_before_auto_chooses(tmp_path: Path) -> None:
    values(run_ranks(1, _big_save, tmp_path, 17 * 1024))  # 68 MiB
    (chosen, rates), other = values(run_ranks(2, _measured_load, tmp_path))
    assert other == (chosen, rates)
    assert chosen in ("direct", "scatter")
    assert len(rates) == 2
    for rate in rates:  # nothing is that fast, but what does not move at all seems to be
        assert all(MIB < one < 2e11 for one in (rate.storage, rate.memory)), rate
        assert MIB < rate.fabric < 1e11, rate


def _big_save(rank: int, run: Path, rows: int = 12 * 1024) -> None:
    ss.save({"w": full(3, rows, 1024)}, checkpoint_id=run / "c")  # 48 MiB


def _failing_load(rank: int, run: Path, strategy: str, failing: int, rule: str, nodes: int) -> tuple[str, Any, bool]:
    os.environ["SNAPSTONE_NODE"] = f"node-{rank % nodes}"
    target = {"w": torch.zeros(12 * 1024, 1024)}
    ss.load(target, checkpoint_id=run / "c", strategy=strategy)
    target["w"].zero_()
    before = len(os.listdir("/proc/self/fd"))
    if rank == failing:
        _native.fault_arm(rule)
    try:
        ss.load(target, checkpoint_id=run / "c", strategy=strategy, timeout=20)
    except BaseException as error:
        outcome: Any = type(error).__name__, getattr(error, "failed_ranks", ())
    else:
        outcome = "loaded", ()
    _native.fault_disarm()
    ss.load(target, checkpoint_id=run / "c", strategy=strategy)
    same = torch.equal(target["w"], full(3, 12 * 1024, 1024))
    return *outcome, same and len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize(("strategy", "failing", "nodes"), [("scatter", 1, 1), ("scatter", 2, 3), ("broadcast", 0, 2)])
def test_a_rank_that_cannot_read_fails_the_load_everywhere_and_the_next_one_works(
    tmp_path: Path, strategy: str, failing: int, nodes: int
) -> None:
    values(run_ranks(1, _big_save, tmp_path))
    env = {"SNAPSTONE_IO": "buffered"}
    arguments = (tmp_path, strategy, failing, "pread:1+:errno=EIO", nodes)
    for rank, (name, failed, well_after) in enumerate(values(run_ranks(3, _failing_load, *arguments, env=env))):
        assert (name, failed) == (("OSError", ()) if rank == failing else ("RankFailedError", (failing,)))
        assert well_after


def _corrupt_load(rank: int, run: Path, strategy: str) -> tuple[str, str | None]:
    with pytest.raises(ss.CheckpointError) as caught:
        ss.load({"w": torch.zeros(12 * 1024, 1024)}, checkpoint_id=run / "c", strategy=strategy)
    return type(caught.value).__name__, caught.value.tensor


@pytest.mark.parametrize("strategy", ["scatter", "broadcast"])
def test_a_flipped_byte_reaches_no_rank(tmp_path: Path, strategy: str) -> None:
    values(run_ranks(1, _big_save, tmp_path))
    with (tmp_path / "c" / "rank-00000.data").open("r+b") as file:
        file.seek(31 * MIB + 5)
        byte = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte[0] ^ 16]))
    found = values(run_ranks(3, _corrupt_load, tmp_path, strategy))
    assert sorted(name for name, _ in found) == ["CorruptCheckpointError", "RankFailedError", "RankFailedError"]
    assert ("CorruptCheckpointError", "w") in found


def _orphaned_load(rank: int, run: Path, nodes: int) -> tuple[int, ...]:
    os.environ["SNAPSTONE_NODE"] = f"node-{rank % nodes}"
    if rank == 1:
        _native.fault_arm("pread:3:kill")
    with pytest.raises(RankFailedError) as caught:
        ss.load({"w": torch.zeros(12 * 1024, 1024)}, checkpoint_id=run / "c", strategy="scatter", timeout=5)
    return caught.value.failed_ranks


@pytest.mark.parametrize("nodes", [1, 3])
def test_a_rank_that_dies_while_it_reads_for_others_is_named(tmp_path: Path, nodes: int) -> None:
    values(run_ranks(1, _big_save, tmp_path))
    results = run_ranks(3, _orphaned_load, tmp_path, nodes, env={"SNAPSTONE_IO": "buffered"})
    assert [result.outcome for result in results] == ["returned", "died", "returned"]
    assert results[0].value == results[2].value == (1,)


def _load_as_another_user(rank: int, run: Path) -> bool:
    os.environ["SNAPSTONE_NODE"] = "one"
    if rank == 1:
        os.setgroups([])
        os.setresgid(65534, 65534, 65534)
        os.setresuid(65534, 65534, 65534)
    target = {"w": torch.zeros(12 * 1024, 1024)}
    ss.load(target, checkpoint_id=run / "c", strategy="scatter", timeout=20)
    assert segment_descriptors() == set()
    return torch.equal(target["w"], full(3, 12 * 1024, 1024))


@pytest.mark.skipif(os.getuid() != 0, reason="needs root to become another user")
def test_ranks_that_cannot_share_memory_exchange_over_the_process_group() -> None:
    with tempfile.TemporaryDirectory() as directory:
        os.chmod(directory, 0o755)
        values(run_ranks(1, _big_save, Path(directory)))
        os.chmod(Path(directory) / "c", 0o755)
        for file in (Path(directory) / "c").iterdir():
            file.chmod(0o644)
        assert values(run_ranks(3, _load_as_another_user, Path(directory), store="tcp")) == [True] * 3
