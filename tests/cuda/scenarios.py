"""Saves and loads that between them need every wait, record and keep-alive of the engine; run by test_steps.py.

As a program it leaves out one step after the other: `python -m cuda.scenarios KIND/NAME...` on the fake driver. Of each
it prints what went wrong for the lack of it, or nothing. It may die of what the host touches then.
"""

from __future__ import annotations

import faulthandler
import gc
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import snapstone as ss
from cuda import fake_torch
from cuda.device import Devices, FakeDevices
from cuda.fake_driver import FakeDriver
from cuda.states import CODECS, KIB, Tensors, adamw, assert_same, assert_saved, host_copy, numbers, scribble, state_of
from snapstone import _native

__all__ = ["SCENARIOS", "Scenario"]

Scenario = Callable[[Devices, Path], None]

CHUNK_BYTES = 64 * KIB  # SNAPSTONE_CHUNK_BYTES of whoever runs these
BUDGET = 24 * CHUNK_BYTES
SECONDS_MAX = 60


def _tensors(device: Devices, chunks: int, seed: int = 0) -> tuple[Tensors, Tensors]:
    """On the devices with work before it that is late, and what it is."""
    host = {
        "large": numbers(chunks * CHUNK_BYTES + 17, seed),
        "other": numbers(5 * CHUNK_BYTES, seed + 1),
        **{f"tiny.{i}": numbers(500 + i, seed + 2 + i) for i in range(20)},
    }
    at = {name: device.other if name == "other" else device.cuda for name in host}
    state = {name: torch.empty(len(tensor), dtype=torch.uint8, device=at[name]) for name, tensor in host.items()}
    for where in {device.cuda, device.other}:
        device.delay(0.003, torch.cuda.current_stream(where))
    for name, tensor in host.items():
        state[name].copy_(tensor)
    return state, host


def save_now(device: Devices, path: Path) -> None:
    state, host = _tensors(device, 8)
    handle = ss.async_save(state, checkpoint_id=path, host_memory_budget=BUDGET)
    scribble(state)
    handle.result()
    assert_saved(path, host)


def save_what_is_freed(device: Devices, path: Path) -> None:
    state, host = _tensors(device, 8)
    handle = ss.async_save(state, checkpoint_id=path, host_memory_budget=BUDGET)
    state.clear()
    torch.full((8 * CHUNK_BYTES + 17,), 7, dtype=torch.uint8, device=device.cuda)
    handle.result()
    assert_saved(path, host)


def save_more_than_fits(device: Devices, path: Path) -> None:
    state, host = _tensors(device, 60)
    handle = ss.async_save(state, checkpoint_id=path, host_memory_budget=BUDGET)
    scribble(state)
    handle.result()
    assert_saved(path, host)


def save_behind_a_step(device: Devices, path: Path) -> None:
    transposed = torch.nn.Parameter(torch.empty(16, 8, device=device.cuda).t())
    matrix = numbers(128).float().reshape(16, 8).t()
    optimizer = adamw(device.cuda)
    optimizer.add_param_group({"params": [transposed]})
    state = {**state_of(optimizer, torch.arange(100.0).to(device.cuda)), "transposed": transposed}
    expected = host_copy(device, state)
    device.delay(0.005)
    transposed.detach().copy_(matrix)
    state["buffers"]["running"].add_(1)
    handle = ss.async_save(state, checkpoint_id=path, fence=optimizer, host_memory_budget=BUDGET)
    state["buffers"]["running"].zero_()
    optimizer.step()
    handle.result()
    expected["transposed"] = matrix
    expected["buffers"]["running"] += 1
    assert_same(expected, ss.Checkpoint.open(path).state_dict())


def save_what_changed(device: Devices, path: Path) -> None:
    state, host = _tensors(device, 20)
    base = path.with_name(path.name + "-base")
    ss.save(state, checkpoint_id=base, host_memory_budget=BUDGET)
    host["large"][3 * CHUNK_BYTES] ^= 1
    device.delay(0.003)
    state["large"].copy_(host["large"])
    saved = ss.save(state, checkpoint_id=path, base=base, host_memory_budget=BUDGET)
    scribble(state)
    assert_saved(path, host)
    assert saved.stats["chunks"] - saved.stats["unchanged_chunks"] == 1


def save_after_one_that_was_given_up(device: Devices, path: Path) -> None:
    state, _ = _tensors(device, 20)
    device.delay(0.01)
    state["large"].add_(1)
    handle = ss.async_save(state, checkpoint_id=path, host_memory_budget=BUDGET)
    handle.cancel()
    handle.upload_completion.exception()
    state.clear()
    host = {"a": numbers(20 * CHUNK_BYTES, 5)}
    shutil.rmtree(path, ignore_errors=True)
    ss.save(host, checkpoint_id=path, host_memory_budget=BUDGET)
    assert_saved(path, host)


def _targets(state: Tensors) -> Tensors:
    targets = {name: torch.empty_like(tensor) for name, tensor in state.items()}
    wide = torch.empty(256, 1024, dtype=torch.uint8, device=state["large"].device)
    targets["strided"] = wide[:, 100:612]
    return targets


def load_between(device: Devices, path: Path) -> None:
    host = {name: tensor.cpu() for name, tensor in _tensors(device, 40)[0].items()}
    host["strided"] = numbers(256 * 512, 50).reshape(256, 512)
    for codec in CODECS:
        saved = path.with_name(f"{path.name}-{codec}")
        ss.save(host, checkpoint_id=saved, codec=codec)
        for _ in range(2):
            targets = _targets(_tensors(device, 40)[0])
            device.delay(0.003)
            scribble(targets)
            ss.load(targets, checkpoint_id=saved)
            copies = {name: tensor.clone() for name, tensor in targets.items()}
            scribble(targets)
            for name, tensor in host.items():
                assert torch.equal(device.on_host(copies[name]), tensor), name
        shutil.rmtree(saved)


def load_after_one_that_failed(device: Devices, path: Path) -> None:
    host = {"large": numbers(60 * CHUNK_BYTES, 3)}
    wrong = path.with_name(path.name + "-wrong")
    for where in (path, wrong):
        ss.save(host, checkpoint_id=where)
    data = wrong / "rank-00000.data"
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(bytes(content))
    for _ in range(3):
        target = torch.empty(60 * CHUNK_BYTES, dtype=torch.uint8, device=device.cuda)
        with pytest.raises(ss.CorruptCheckpointError):
            ss.load({"large": target}, checkpoint_id=wrong)
        ss.load({"large": target}, checkpoint_id=path)
        assert torch.equal(device.on_host(target), host["large"])
    shutil.rmtree(wrong)


SCENARIOS: tuple[Scenario, ...] = (
    save_now,
    save_what_is_freed,
    save_more_than_fits,
    save_behind_a_step,
    save_what_changed,
    save_after_one_that_was_given_up,
    load_between,
    load_after_one_that_failed,
)


def _trouble(fake: FakeDriver, devices: Devices, scenario: Scenario, step: str, seed: int) -> str:
    """What went wrong without the step; empty if nothing did."""
    fake.reset()
    fake.seed(seed)
    _native.fault_arm(f"{step}:1+:skip")
    trouble = ""
    with tempfile.TemporaryDirectory() as directory:
        try:
            scenario(devices, Path(directory) / "c")
        except BaseException as error:
            trouble = f"{type(error).__name__}: {error}"[:200]
        _native.fault_disarm()
        try:
            ss.wait()
        except Exception as error:
            trouble = trouble or repr(error)[:200]
    gc.collect()
    fake.drain()
    return trouble or "; ".join(fake.violations()[:1])


def main(steps: list[str]) -> None:
    fake = FakeDriver()
    fake_torch.install()
    with pytest.MonkeyPatch.context() as monkeypatch:
        fake_torch.patch(monkeypatch)
        devices = FakeDevices(fake)
        for step in steps:
            print(json.dumps({"step": step}), flush=True)
            faulthandler.dump_traceback_later(SECONDS_MAX, exit=True)
            found = next(
                (
                    f"{scenario.__name__}, seed {seed}: {trouble}"
                    for seed in range(4)
                    for scenario in SCENARIOS
                    if (trouble := _trouble(fake, devices, scenario, step, seed))
                ),
                "",
            )
            print(json.dumps({"step": step, "trouble": found}), flush=True)
    os._exit(0)  # what a step kept alive for ever must not be taken down now


if __name__ == "__main__":
    main(sys.argv[1:])
