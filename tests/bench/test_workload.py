"""In every layout the state is what was counted, all of it changes in a step, and copies on two ranks are equal."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from distributed.ranks import run_ranks, values
from snapstone.bench.optimizer import ByteStep

SEED = 5


def described(rank: int, fsdp: int, tp: int, state_only: bool, precision: Any) -> tuple[Any, ...]:
    from snapstone.bench.workload import Plan, Workload, digests, local_nbytes

    plan = Plan("tiny", precision, fsdp, tp, "cpu", 0, state_only, 0.0, 2, 16, SEED)
    workload = Workload(plan)
    shapes = {name: tuple(tensor.shape) for name, tensor in workload.state.items()}
    pointers = {name: tensor.data_ptr() for name, tensor in workload.state.items() if hasattr(tensor, "data_ptr")}
    before = digests(workload.state)
    workload.compute()
    workload.update()
    after = digests(workload.state)
    moved = [name for name, tensor in workload.state.items() if pointers[name] != tensor.data_ptr()]
    unchanged = [name for name in before if before[name] == after[name]]
    return shapes, workload.nbytes, local_nbytes(workload.state), unchanged, moved, after, str(workload.layout)


@pytest.mark.parametrize("state_only", [False, True], ids=["training", "state only"])
@pytest.mark.parametrize(
    ("fsdp", "tp", "precision", "layout"),
    [(1, 1, "fp32", "ddp 2"), (2, 1, "bf16", "fsdp 2"), (1, 2, "fp32", "tp 2")],
)
def test_a_step_changes_every_tensor_in_place(
    fsdp: int, tp: int, precision: Any, layout: str, state_only: bool
) -> None:
    from snapstone.bench.models import shape_of, training_state

    ranks = values(run_ranks(2, described, fsdp, tp, state_only, precision))
    counted = list(training_state(shape_of("tiny"), precision))
    for shapes, nbytes, _, unchanged, moved, _, named in ranks:
        assert shapes == {tensor.name: tensor.shape for tensor in counted}
        assert nbytes == sum(tensor.nbytes for tensor in counted)
        assert (unchanged, moved, named) == ([], [], layout)
    first, second = (one[5] for one in ranks)
    same = {name for name in first if first[name] == second[name]}
    if layout == "ddp 2":
        assert same == set(first)
        assert ranks[0][2] == ranks[0][1]
    else:
        assert "model.blocks.0.query.weight" not in same
        assert ranks[0][2] < 0.8 * ranks[0][1]
    assert layout != "tp 2" or "model.embed.weight" in same


@pytest.mark.parametrize(
    ("world", "fsdp", "tp", "message"),
    [
        (4, 3, 1, "--fsdp 3 times --tp 1 does not divide the 4 ranks"),
        (4, 1, 4, "--tp 4 does not divide the 2 key heads"),
        (4, 1, 2, "need --fsdp 2"),
        (4, 0, 1, "--fsdp 0: must be at least 1"),
    ],
)
def test_a_layout_that_does_not_fit_is_refused_with_the_numbers(world: int, fsdp: int, tp: int, message: str) -> None:
    from snapstone.bench.layout import Layout

    with pytest.raises(ValueError, match=message):
        Layout.of(world, fsdp, tp, key_heads=2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_state_comes_back_for_as_long_as_saves_are_compared(dtype: torch.dtype) -> None:
    parameter = torch.nn.Parameter(torch.randn(64, generator=torch.Generator().manual_seed(SEED)).to(dtype))
    optimizer = ByteStep([parameter], "bf16" if dtype == torch.bfloat16 else "fp32")
    seen = []
    for _ in range(128):
        seen.append(parameter.detach().view(torch.int16).numpy().tobytes())
        assert parameter.detach().isfinite().all()
        optimizer.step()
    assert len(set(seen)) == 128
