"""Saves of many tensors: how fast a state of 10,000 leaves the device, and how long the calls hold up their caller.

Nothing else runs on the device. The state leaves it from the call on until the caller's stream has passed the fence,
the call included: what `fence="now"` costs.
"""

from __future__ import annotations

import itertools
import time
from pathlib import Path
from typing import Any

import torch

import snapstone as ss
from snapstone import _native

from .bench import Bench, gbps, spread

__all__ = ["SLACK_BYTES", "measure", "staging_bytes"]

State = dict[str, torch.Tensor]
SLACK_BYTES = 128 << 20  # of staging memory, beyond what a state needs
SLOT_BYTES = 1 << 20


def measure(bench: Bench) -> None:
    for count in bench.scale.parameters:
        bench.step(f"calls_{4 * count}", lambda count=count: _calls(bench, count), seconds=4)
    state = _many(bench)
    bench.step("engine", lambda: _engine(bench, state), seconds=4)
    bench.step("torch_pinned", lambda: _torch_pinned(bench, state), seconds=3)
    bench.step("torch_pageable", lambda: _torch_pageable(bench, state), seconds=5)


def _nbytes_of(state: State) -> int:
    return sum(tensor.nbytes for tensor in state.values())


def staging_bytes(state: State) -> int:
    """For all of it at once: the last chunk of every tensor takes a whole slot, but small tensors share them."""
    small = _native.PACK_THRESHOLD_BYTES
    sizes = [tensor.nbytes for tensor in state.values()]
    return sum(size if size < small else -(-size // SLOT_BYTES) * SLOT_BYTES for size in sizes) + SLACK_BYTES


def _many(bench: Bench) -> State:
    """Each in an allocation of its own."""
    sizes = itertools.islice(itertools.cycle(bench.scale.tensor_bytes), bench.scale.tensors)
    return {f"tensor.{number}": bench.random(nbytes) for number, nbytes in enumerate(sizes)}


def _saved(bench: Bench, state: State, directory: Path, **options: Any) -> dict[str, Any]:
    """Seconds of one save, by when what came: the call returned, the stream was past the fence, the host knew, it was
    durable. `devices` and `device_copy` are what the engine says of it.
    """
    with bench.checkpoint(directory) as path:
        bench.settle()
        begin = time.perf_counter()
        handle = ss.async_save(state, checkpoint_id=path, **options)
        called = time.perf_counter()
        bench.wait()
        passed = time.perf_counter()
        handle.staging_completion.result()
        staged = time.perf_counter()
        handle.result()
        stats = handle.stats
        return {
            "call": called - begin,
            "snapshot": passed - begin,
            "staged": staged - begin,
            "durable": time.perf_counter() - begin,
            "devices": stats.get("devices"),
            "device_copy": stats.get("device_copy"),
            "cuda_unused": stats.get("cuda_unused"),
            "rung": stats.get("rung"),
        }


def _engine(bench: Bench, state: State) -> dict[str, Any]:
    nbytes = _nbytes_of(state)
    budget = staging_bytes(state)
    bench.check_host_memory(budget + nbytes, "staging and files")
    directory = bench.place(2 * nbytes)
    ss.prepare(bench.device, budget)
    saves = [_saved(bench, state, directory, host_memory_budget=budget) for _ in range(bench.scale.saves + 1)]
    steady = saves[1:]
    with bench.checkpoint(directory) as path:
        ss.save(state, checkpoint_id=path, host_memory_budget=budget)
        targets = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
        bench.settle()
        begin = time.perf_counter()
        ss.load(targets, checkpoint_id=path)
        bench.wait()
        load_seconds = time.perf_counter() - begin
    wrong = [name for name, tensor in state.items() if not torch.equal(targets[name], tensor)]
    if wrong:
        raise RuntimeError(f"{len(wrong)} of {len(state)} tensors came back different, the first is {wrong[0]}")
    return {
        "tensors": len(state),
        "nbytes": nbytes,
        "d2h_gbps": gbps(nbytes, [one["snapshot"] for one in steady]),
        "call_seconds": spread([one["call"] for one in steady]),
        "staged_seconds": spread([one["staged"] for one in steady]),
        "durable_seconds": spread([one["durable"] for one in steady]),
        "load_gbps": gbps(nbytes, [load_seconds]),
        "file_system": _file_system(directory),
        "saves": saves,
    }


def _file_system(directory: Path) -> str:
    from machine import file_system

    return file_system(directory)


def _calls(bench: Bench, parameters: int) -> dict[str, Any]:
    """Of the state of an AdamW: weights, two moments and a step count of each parameter."""
    optimizer, state = _adamw(bench, parameters)
    budget = staging_bytes(state)
    bench.check_host_memory(budget + _nbytes_of(state), "staging and files")
    directory = bench.place(2 * _nbytes_of(state))
    ss.prepare(bench.device, budget)
    found: dict[str, Any] = {"tensors": len(state), "nbytes": _nbytes_of(state)}
    for name, fence in (("now", "now"), ("optimizer", optimizer)):
        saves = []
        for _ in range(bench.scale.saves + 1):
            with bench.checkpoint(directory) as path:
                bench.settle()
                begin = time.perf_counter()
                handle = ss.async_save(state, checkpoint_id=path, fence=fence, host_memory_budget=budget)
                called = time.perf_counter()
                optimizer.step()  # the hook, and then the step's own launches
                stepped = time.perf_counter()
                handle.result()
                saves.append((called - begin, stepped - called))
        steps = []
        for _ in range(bench.scale.saves):
            bench.settle()
            begin = time.perf_counter()
            optimizer.step()
            steps.append(time.perf_counter() - begin)
        found[name] = {
            "first_call_seconds": saves[0][0],
            "call_seconds": spread([call for call, _ in saves[1:]]),
            "step_seconds": spread([step for _, step in saves[1:]]),
            "step_seconds_without_save": spread(steps),
        }
    return found


def _adamw(bench: Bench, parameters: int) -> tuple[torch.optim.Optimizer, State]:
    sizes = itertools.islice(itertools.cycle(bench.scale.tensor_bytes), parameters)
    weights = [torch.nn.Parameter(torch.zeros(nbytes // 4, device=bench.device)) for nbytes in sizes]
    optimizer = torch.optim.AdamW(weights, lr=1e-3, foreach=None if not bench.fake else False)
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    state: State = {}
    for number, weight in enumerate(weights):
        state[f"model.{number}"] = weight.detach()
        for slot, tensor in optimizer.state[weight].items():
            state[f"optimizer.{number}.{slot}"] = tensor
    return optimizer, state


def _torch_pinned(bench: Bench, state: State) -> dict[str, Any]:
    """`copy_(non_blocking=True)` of each, into memory that is there; and back."""
    nbytes = _nbytes_of(state)
    bench.check_host_memory(nbytes, "pinned memory")
    memory = bench.pinned(nbytes)
    pieces, at = [], 0
    for tensor in state.values():
        pieces.append((memory[at : at + tensor.nbytes], tensor))
        at += tensor.nbytes

    def to_host() -> None:
        for host, tensor in pieces:
            host.copy_(tensor, non_blocking=True)

    def to_device() -> None:
        for host, tensor in pieces:
            tensor.copy_(host, non_blocking=True)

    d2h = bench.repeated(to_host, repeat=bench.scale.saves)
    h2d = bench.repeated(to_device, repeat=bench.scale.saves)
    return {"nbytes": nbytes, "d2h_gbps": gbps(nbytes, d2h), "h2d_gbps": gbps(nbytes, h2d)}


def _torch_pageable(bench: Bench, state: State) -> dict[str, Any]:
    nbytes = _nbytes_of(state)
    bench.check_host_memory(nbytes, "memory for the copy")
    seconds = bench.repeated(lambda: [tensor.cpu() for tensor in state.values()], repeat=3)
    return {"nbytes": nbytes, "d2h_gbps": gbps(nbytes, seconds)}
