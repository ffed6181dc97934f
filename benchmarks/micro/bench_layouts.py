"""Saving from and loading into tensors that are not contiguous, beside one that is: the price of gather and scatter.

The checkpoints lie in memory where there is a tmpfs, so the disk does not hide the difference.
"""

from __future__ import annotations

import itertools
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import snapstone as ss

SIDE = 4096  # fp32: 64 MiB
TMPFS = Path("/dev/shm")


def _contiguous() -> torch.Tensor:
    return torch.rand(SIDE, SIDE)


def _columns() -> torch.Tensor:
    return torch.rand(SIDE, 2 * SIDE)[:, :SIDE]


def _transposed() -> torch.Tensor:
    return torch.rand(SIDE, SIDE).t()


LAYOUTS = {"contiguous": _contiguous, "columns": _columns, "transposed": _transposed}


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[Path]:
    made = Path(tempfile.mkdtemp(prefix="snapstone-micro-", dir=TMPFS if TMPFS.is_dir() else tmp_path))
    yield made
    shutil.rmtree(made)


@pytest.mark.parametrize("layout", LAYOUTS)
def bench_gather(benchmark: Any, of_bytes: Callable[[int], None], directory: Path, layout: str) -> None:
    state = {"weight": LAYOUTS[layout]()}
    numbers = itertools.count()
    of_bytes(state["weight"].numel() * 4)

    def fresh() -> tuple[tuple[Path], dict[str, Any]]:
        number = next(numbers)
        shutil.rmtree(directory / str(number - 1), ignore_errors=True)
        return (directory / str(number),), {}

    benchmark.pedantic(lambda path: ss.save(state, checkpoint_id=path), setup=fresh, rounds=10, warmup_rounds=1)
    target = {"weight": torch.empty(SIDE, SIDE)}
    ss.load(target, checkpoint_id=directory / str(next(numbers) - 1))
    assert torch.equal(target["weight"], state["weight"])


@pytest.mark.parametrize("layout", LAYOUTS)
def bench_scatter(benchmark: Any, of_bytes: Callable[[int], None], directory: Path, layout: str) -> None:
    saved = torch.rand(SIDE, SIDE)
    target = {"weight": LAYOUTS[layout]()}
    of_bytes(saved.numel() * 4)
    ss.save({"weight": saved}, checkpoint_id=directory / "saved")
    benchmark.pedantic(ss.load, (target,), {"checkpoint_id": directory / "saved"}, rounds=10, warmup_rounds=1)
    assert torch.equal(target["weight"], saved)
