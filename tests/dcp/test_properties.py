"""Random tensors, saved on a random mesh in random placements and loaded on another, through DCP and through `ss`.

Invariants: whatever saved (`dcp.save` on the engine's storage, or `ss.save`) and whatever loads (`dcp.load`, or
`ss.load`), each rank's part has the bits that the placements say; where the stock storage manages the same state, its
result is the same, and the engine's reader reads what it wrote. A case that stock fails is compared with the truth only
and counted.

The draws are derandomized: the same in every run. Four ranks serve all of them.
"""

from __future__ import annotations

import itertools
import math
import multiprocessing
import shutil
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import snapstone as ss
from distributed.ranks import Ranks
from roundtrip.bits import bits_of, other_bits, random_bits
from snapstone.dcp import StorageReader, StorageWriter

WORLD_SIZE = 4
EXAMPLES = 60
ANSWER_S = 60.0
DTYPES = [torch.float32, torch.bfloat16, torch.int64, torch.float8_e4m3fn, torch.bool]

State = dict[str, Any]


@dataclass(frozen=True)
class Side:
    """Where one side keeps the tensors. `placements`: per tensor and mesh dimension a sharded dimension, or None."""

    ranks: tuple[int, ...]
    mesh_shape: tuple[int, ...]
    placements: tuple[tuple[int | None, ...], ...]


@dataclass(frozen=True)
class Case:
    tensors: tuple[tuple[torch.dtype, tuple[int, ...]], ...]
    source: Side
    target: Side


@dataclass
class Answer:
    """Of one rank."""

    problems: list[str] = field(default_factory=list)
    stock: str = ""  # how the stock storage failed


# Draws ----------------------------------------------------------------------------------------------------------------

shapes = st.lists(st.sampled_from([0, 1, 2, 3, 4, 5, 7, 8, 13]), max_size=3).map(tuple)


@st.composite
def sides(draw: st.DrawFn, dims: tuple[int, ...]) -> Side:
    world_size = draw(st.integers(1, WORLD_SIZE))
    ranks = draw(st.sampled_from(list(itertools.combinations(range(WORLD_SIZE), world_size))))
    outer = draw(st.sampled_from([0, *(n for n in range(1, world_size + 1) if world_size % n == 0)]))
    mesh_shape = (outer, world_size // outer) if outer else (world_size,)
    placements = tuple(
        tuple(draw(st.sampled_from([None, *range(count), *range(count)])) for _ in mesh_shape) for count in dims
    )
    return Side(ranks, mesh_shape, placements)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    drawn = draw(st.lists(st.tuples(st.sampled_from(DTYPES), shapes), min_size=1, max_size=4))
    dims = tuple(len(shape) for _, shape in drawn)
    return Case(tuple(drawn), draw(sides(dims)), draw(sides(dims)))


# In a rank ------------------------------------------------------------------------------------------------------------


class Rank:
    """Serves cases. Every rank enters every method, for groups and meshes are made together."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.groups: dict[tuple[int, ...], Any] = {}
        self.meshes: dict[tuple[tuple[int, ...], tuple[int, ...]], DeviceMesh] = {}

    def group(self, ranks: tuple[int, ...]) -> Any:
        if ranks not in self.groups:
            self.groups[ranks] = dist.new_group(list(ranks))
        return self.groups[ranks]

    def mesh(self, side: Side) -> DeviceMesh:
        key = side.ranks, side.mesh_shape
        if key not in self.meshes:
            self.meshes[key] = DeviceMesh("cpu", torch.tensor(side.ranks).reshape(side.mesh_shape))
        return self.meshes[key]

    def state(self, case: Case, side: Side, mesh: DeviceMesh) -> State:
        """What this rank holds on `side`. A plain tensor and a value go along."""
        state: State = {"step": len(case.tensors), "plain": random_bits(torch.float32, 5, 3, seed=99)}
        for number, (dtype, shape) in enumerate(case.tensors):
            placements = [Replicate() if dim is None else Shard(dim) for dim in side.placements[number]]
            full = random_bits(dtype, *shape, seed=number)
            state[f"tensor-{number}"] = distribute_tensor(full, mesh, placements, src_data_rank=None)
        return state

    def serve(self, case: Case, run: Path) -> Answer:
        answer = Answer()
        group, mesh = self.group(case.source.ranks), self.mesh(case.source)
        if self.rank in case.source.ranks:
            self.save(self.state(case, case.source, mesh), group, run, answer)
        failures: list[str] = [""] * WORLD_SIZE
        dist.all_gather_object(failures, answer.stock)
        group, mesh = self.group(case.target.ranks), self.mesh(case.target)
        if self.rank in case.target.ranks:
            self.load(self.state(case, case.target, mesh), group, run, any(failures), answer)
        dist.barrier()
        return answer

    def save(self, state: State, group: Any, run: Path, answer: Answer) -> None:
        dcp.save(state, storage_writer=StorageWriter(run / "dcp"), process_group=group)
        ss.save(state, checkpoint_id=run / "ss", process_group=group)
        try:
            dcp.save(state, storage_writer=dcp.FileSystemWriter(run / "stock"), process_group=group)
        except CheckpointException as error:
            answer.stock = f"save: {error}"

    def load(self, truth: State, group: Any, run: Path, stock_failed: bool, answer: Answer) -> None:
        def through_dcp(state: State, path: Path) -> None:
            dcp.load(state, storage_reader=StorageReader(path), process_group=group)

        def through_ss(state: State, path: Path) -> None:
            ss.load(state, checkpoint_id=path, process_group=group)

        for saved in ("dcp", "ss"):
            for load in (through_dcp, through_ss):
                for name in differences(truth, load, run / saved):
                    answer.problems.append(f"rank {self.rank}: {name} saved by {saved}, loaded {load.__name__}")
        if stock_failed:
            return

        def through_stock(state: State, path: Path) -> None:
            dcp.load(state, storage_reader=dcp.FileSystemReader(path), process_group=group)

        try:
            wrong = differences(truth, through_stock, run / "stock")
        except CheckpointException as error:
            answer.stock = f"load: {error}"
            return
        answer.stock = f"load: wrong bits in {wrong}" if wrong else ""
        for name in differences(truth, through_dcp, run / "stock"):
            if name not in wrong:
                answer.problems.append(f"rank {self.rank}: {name} saved by stock, loaded through_dcp")


def differences(truth: State, load: Callable[[State, Path], None], path: Path) -> list[str]:
    """Names that come back with other bits, loaded over a state in which every bit is wrong."""
    state: State = {name: spoilt(value) if isinstance(value, torch.Tensor) else -1 for name, value in truth.items()}
    load(state, path)
    return [name for name, value in truth.items() if not same(state[name], value)]


def spoilt(tensor: torch.Tensor) -> torch.Tensor:
    if not isinstance(tensor, DTensor):
        return other_bits(tensor)
    return DTensor.from_local(
        other_bits(tensor.to_local()),
        tensor.device_mesh,
        tensor.placements,
        run_check=False,
        shape=tensor.shape,
        stride=tensor.stride(),
    )


def same(actual: Any, expected: Any) -> bool:
    if not isinstance(expected, torch.Tensor):
        return bool(actual == expected)
    if isinstance(expected, DTensor):
        actual, expected = actual.to_local(), expected.to_local()
    return actual.shape == expected.shape and bits_of(actual) == bits_of(expected)


def _serve(rank: int, orders: Any) -> None:
    """Until there are no more: rank 0 gets a case and a directory, all ranks serve it, rank 0 answers for all."""
    serving = Rank(rank)
    while True:
        order = [orders.recv() if rank == 0 else None]
        dist.broadcast_object_list(order)
        if order[0] is None:
            return
        try:
            answer = serving.serve(*order[0])
        except BaseException:
            answer = Answer([f"rank {rank}: {traceback.format_exc()}"])
        answers = [Answer()] * WORLD_SIZE
        dist.all_gather_object(answers, answer)
        if rank == 0:
            orders.send(answers)


# Outside --------------------------------------------------------------------------------------------------------------


class Served:
    def __init__(self, ranks: Ranks, orders: Any) -> None:
        self.ranks = ranks
        self.orders = orders

    def ask(self, case: Case, run: Path) -> list[Answer]:
        self.orders.send((case, run))
        if not self.orders.poll(ANSWER_S):
            raise AssertionError([result.output for result in self.ranks.results(timeout=1.0)])
        answers: list[Answer] = self.orders.recv()
        return answers


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    orders, theirs = multiprocessing.get_context("forkserver").Pipe()
    with Ranks(WORLD_SIZE, _serve, theirs) as ranks:
        theirs.close()
        yield Served(ranks, orders)
        orders.send(None)
        assert [result.outcome for result in ranks.results(10.0)] == ["returned"] * WORLD_SIZE


def test_any_placement_goes_into_any_other_as_with_stock(served: Served, tmp_path: Path) -> None:
    counted: Counter[str] = Counter()

    @settings(
        max_examples=EXAMPLES,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow],
    )
    @given(cases())
    def check(case: Case) -> None:
        run = tmp_path / "run"
        run.mkdir()
        answers = served.ask(case, run)
        shutil.rmtree(run)
        assert [problem for answer in answers for problem in answer.problems] == []
        counted["cases"] += 1
        failures = [answer.stock for answer in answers if answer.stock]
        counted["stock failed"] += bool(failures)
        counted["sharded"] += any(dim is not None for dims in case.source.placements for dim in dims)
        counted["two dimensions"] += len(case.source.mesh_shape) == 2
        counted["empty"] += any(math.prod(shape) == 0 for _, shape in case.tensors)
        for failure in failures[:1]:
            print(case, failure[-300:], sep="\n")

    check()
    print("derandomized:", dict(counted))
    assert counted["stock failed"] <= counted["cases"] // 2
    assert min(counted["sharded"], counted["two dimensions"], counted["empty"]) >= 5
