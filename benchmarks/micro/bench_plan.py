"""Planning 10,000 tensors: flattening, the digest that finds a cached plan, the plan itself for one and eight ranks."""

from __future__ import annotations

from typing import Any

import torch

from snapstone import plan, state
from snapstone.plan import TensorItem

RANKS = 8


def bench_flatten(benchmark: Any, items: list[TensorItem]) -> None:
    nested = {"model": {item.name: torch.empty(8) for item in items}}
    assert len(benchmark(state.flatten, nested).tensors) == len(items)


def bench_structure_digest(benchmark: Any, items: list[TensorItem]) -> None:
    assert len(benchmark(plan.structure_digest, items)) == 32


def bench_check_tiling(benchmark: Any, items: list[TensorItem]) -> None:
    benchmark(plan.check_tiling, items)


def bench_assign_writers_one_rank(benchmark: Any, items: list[TensorItem]) -> None:
    assert len(benchmark(plan.assign_writers, [items])[0]) == len(items)


def bench_assign_writers_replicated_on_8_ranks(benchmark: Any, items: list[TensorItem]) -> None:
    chosen = benchmark(plan.assign_writers, [items] * RANKS)
    assert sum(map(len, chosen)) == len(items)
