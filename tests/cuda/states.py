"""States of tensors on devices: what is in them, what a training step does to them, what a checkpoint of them holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

import snapstone as ss
from cuda.device import Devices
from snapstone import _native

__all__ = [
    "CODECS",
    "KIB",
    "MIB",
    "Tensors",
    "adamw",
    "assert_same",
    "assert_saved",
    "bits",
    "crowd",
    "host_copy",
    "model",
    "numbers",
    "save",
    "scribble",
    "state_of",
]

KIB, MIB = 1 << 10, 1 << 20

# Those that this build has: zstd may have been missing where it was built.
CODECS = (None, "zstd") if _native.zstd_compiled_in() else (None,)

Tensors = dict[str, torch.Tensor]


def numbers(nbytes: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (nbytes,), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def model(device: torch.device, *, other: torch.device | None = None, seed: int = 0) -> tuple[Tensors, Tensors]:
    """A state of large, small, strided and odd tensors, and the same on the host; on `other` some of it."""
    seed *= 1000
    host = {
        "large": numbers(3 * MIB + 17, seed + 1),
        "matrix": numbers(512 * KIB, seed + 2).view(torch.bfloat16).reshape(512, 512),
        "small": numbers(700, seed + 3),
        "scalar": torch.tensor(2.5 + seed),
        "empty": torch.zeros(0, 3),
        "strided": numbers(1024, seed + 4).float().reshape(32, 32).t(),
        **{f"tiny.{i}": numbers(16 + i, seed + 5 + i) for i in range(40)},
    }
    state = {name: tensor.to(device) for name, tensor in host.items()}
    state["strided"] = host["strided"].t().contiguous().to(device).t()
    if other is not None:
        for name in ("matrix", "tiny.3", "small"):
            state[name] = host[name].to(other)
    state["on_host"] = host["on_host"] = numbers(100 * KIB, seed + 99)
    return state, host


def crowd(device: torch.device, chunk_bytes: int) -> tuple[Tensors, Tensors]:
    """A state that the staging memory of this process cannot hold, in chunks of that size."""
    count = 3 * int(_native.ring_facts()["slots"]) + 50
    host = {"first": numbers(count // 2 * chunk_bytes, 1), "second": numbers(count // 2 * chunk_bytes + 5, 2)}
    return {name: tensor.to(device) for name, tensor in host.items()}, host


def save(how: torch.optim.Optimizer | str, state: Any, path: Path) -> None:
    """As `how` says: "sync", or behind the fence that it is; waits for the end."""
    if how == "sync":
        ss.save(state, checkpoint_id=path)
    else:
        ss.async_save(state, checkpoint_id=path, fence=how).result()


def scribble(state: Tensors) -> None:
    """What the next step does to the tensors of devices, in the current streams."""
    for tensor in state.values():
        if tensor.is_cuda and tensor.numel():
            tensor.fill_(1)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def assert_saved(path: Path, host: Tensors) -> None:
    saved = ss.Checkpoint.open(path).load_tensors()
    assert saved.keys() == host.keys()
    for name, tensor in host.items():
        assert torch.equal(bits(saved[name]), bits(tensor)), name


def adamw(device: torch.device, count: int = 4, nbytes: int = 64 * KIB) -> torch.optim.Optimizer:
    """One that has stepped, with gradients for the next step."""
    parameters = [
        torch.nn.Parameter((numbers(nbytes, i).float() / 256).reshape(-1, 64).to(device)) for i in range(count)
    ]
    optimizer = torch.optim.AdamW(parameters, lr=0.1, foreach=False)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return optimizer


def state_of(optimizer: torch.optim.Optimizer, volatile: torch.Tensor) -> dict[str, Any]:
    parameters = optimizer.param_groups[0]["params"]
    return {
        "model": {str(i): parameter for i, parameter in enumerate(parameters)},
        "moments": [optimizer.state[parameter] for parameter in parameters],
        "buffers": {"running": volatile},
    }


def host_copy(device: Devices, value: Any) -> Any:
    """A nested state as it is once all devices have done all work."""
    if isinstance(value, torch.Tensor):
        return device.on_host(value.detach()).clone()
    if isinstance(value, dict):
        return {key: host_copy(device, item) for key, item in value.items()}
    return [host_copy(device, item) for item in value]


def assert_same(one: Any, other: Any) -> None:
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
        return
    assert len(one) == len(other)
    for key in one if isinstance(one, dict) else range(len(one)):
        assert_same(one[key], other[key])
