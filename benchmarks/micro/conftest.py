"""What several micro benchmarks share: a state of 10,000 tensors, described and placed as a save of one rank does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from snapstone import tensors
from snapstone.index import Place, StoredTensor
from snapstone.plan import TensorItem

TENSORS = 10_000


@pytest.fixture(scope="session")
def items() -> list[TensorItem]:
    found: list[TensorItem] = []
    for number in range(TENSORS):
        tensor = torch.empty(256 + number % 3841)
        found += [shard.item for shard in tensors.describe(f"model.layers.{number}.weight", tensor)]
    return found


@pytest.fixture(scope="session")
def stored(items: list[TensorItem]) -> list[StoredTensor]:
    return [StoredTensor(item, None, Place(number // 64, 1, 0)) for number, item in enumerate(items)]


@pytest.fixture
def of_bytes(benchmark: Any) -> Callable[[int], None]:
    """Records how many bytes one call handles, so that the report can give GB/s."""

    def record(nbytes: int) -> None:
        benchmark.extra_info["nbytes"] = nbytes

    return record
