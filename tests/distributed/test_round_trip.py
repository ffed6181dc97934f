"""A trained model with its optimizer goes from four ranks to two to three, with every strategy, with ss and with DCP.

Invariants: parameters and optimizer state arrive bit for bit; where ranks read for each other, the group reads at most
1.05 times the bytes that it needs.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard

import snapstone as ss
from distributed.ranks import run_ranks, values
from snapstone.dcp import LoadPlanner, StorageReader, StorageWriter

STRATEGIES = ("direct", "scatter", "broadcast")
FROZEN = (500, 777)  # elements of a buffer that every rank holds whole


def training(seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Uneven over 2, 3 and 4 ranks."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(501, 301), nn.GELU(), nn.Linear(301, 7))
    model.register_buffer("table", torch.randn(FROZEN))
    fully_shard(model[0])
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    return model, optimizer


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    model(torch.randn(4, 501)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def digests(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, str]:
    """Of every whole tensor, by name."""
    found = {}
    flat = [*model.state_dict().items()]
    for name, parameter in model.named_parameters():
        flat += [(f"{name}/{key}", value) for key, value in optimizer.state[parameter].items()]
    for name, tensor in flat:
        whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
        found[name] = hashlib.sha256(whole.detach().contiguous().numpy().tobytes()).hexdigest()
    return found


def parts(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """What is handed to DCP."""
    return dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))


def _save(rank: int, path: Path, through_dcp: bool) -> dict[str, str]:
    model, optimizer = training(1)
    torch.manual_seed(rank)
    for _ in range(2):
        step(model, optimizer)
    if through_dcp:
        dcp.save(parts(model, optimizer), storage_writer=StorageWriter(path))
    else:
        ss.save({"model": model, "optimizer": optimizer}, checkpoint_id=path)
    return digests(model, optimizer)


def _pass_on(rank: int, source: Path, targets: Path, through_dcp: bool) -> list[tuple[dict[str, str], int, int]]:
    """Loads with every strategy; (digests, bytes that this rank read, bytes that the group needs) of each."""
    found = []
    for strategy in STRATEGIES:
        model, optimizer = training(2)
        if through_dcp:
            step(model, optimizer)  # DCP fills the state that there is
            reader = StorageReader(source, strategy=strategy)
            nested = parts(model, optimizer)
            dcp.load(nested, storage_reader=reader, planner=LoadPlanner())
            set_state_dict(model, optimizer, model_state_dict=nested["model"], optim_state_dict=nested["optimizer"])
            dcp.save(parts(model, optimizer), storage_writer=StorageWriter(targets / strategy))
            stats: Any = reader.stats
        else:
            state = {"model": model, "optimizer": optimizer}
            stats = ss.load(state, checkpoint_id=source, strategy=strategy).stats
            ss.save(state, checkpoint_id=targets / strategy)
        assert stats["strategy"] == strategy
        found.append((digests(model, optimizer), stats["bytes_read"], ss.Checkpoint.open(source).nbytes))
    return found


@pytest.mark.parametrize("through_dcp", [False, True], ids=["ss", "dcp"])
def test_four_to_two_to_three_with_every_strategy(tmp_path: Path, through_dcp: bool) -> None:
    source = tmp_path / "c"
    expected = values(run_ranks(4, _save, source, through_dcp))[0]
    assert len(expected) == 5 + 4 * 3
    for world_size in (2, 3):
        targets = tmp_path / f"of-{world_size}"
        results = values(run_ranks(world_size, _pass_on, source, targets, through_dcp, timeout=120))
        for position, strategy in enumerate(STRATEGIES):
            of_ranks = [result[position] for result in results]
            assert all(one[0] == expected for one in of_ranks), strategy
            read, needed = sum(one[1] for one in of_ranks), of_ranks[0][2]
            if strategy == "direct":
                assert read > 1.05 * needed  # every rank reads the buffer
            else:
                assert read <= 1.05 * needed
        source = targets / "scatter"
