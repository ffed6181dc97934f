"""What trainers do around saves and loads: graphs of their steps, allocators that map memory, links that they share."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import snapstone as ss
from cuda import fake_driver
from cuda.device import IS_REAL, Devices
from cuda.states import KIB, MIB, assert_saved, bits, model, numbers, scribble

ROOT = Path(__file__).resolve().parents[2]


def test_a_step_that_is_replayed_from_a_graph_comes_after_the_fence(device: Devices, tmp_path: Path) -> None:
    weights = numbers(MIB).to(device.cuda)
    stream = torch.cuda.Stream(device.cuda)
    torch.cuda.synchronize()
    replay = device.graph(lambda: weights.add_(1), stream)
    expected = numbers(MIB)
    with torch.cuda.stream(stream):
        for step in range(3):
            replay()
            expected += 1
            handle = ss.async_save({"w": weights}, checkpoint_id=tmp_path / str(step))
            replay()
            expected += 1
            handle.result()
            assert_saved(tmp_path / str(step), {"w": expected - 1})
        ss.load({"w": weights}, checkpoint_id=tmp_path / "0")
        replay()
        assert torch.equal(device.on_host(weights), numbers(MIB) + 2)


def test_a_rate_cap_holds_the_copies_up_and_not_the_caller(
    device: Devices, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SNAPSTONE_CHUNK_BYTES", str(64 * KIB))
    host = {"a": numbers(2 * MIB)}
    state = {name: tensor.to(device.cuda) for name, tensor in host.items()}
    optimizer = torch.optim.SGD([torch.nn.Parameter(state["a"].float())], lr=1.0)
    ss.save(state, checkpoint_id=tmp_path / "warm")
    monkeypatch.setenv("SNAPSTONE_DMA_GBPS", "0.004")
    begin = time.monotonic()
    handle = ss.async_save(state, checkpoint_id=tmp_path / "c", fence=optimizer)
    called = time.monotonic() - begin
    handle.result()
    assert time.monotonic() - begin > 0.4, "2 MiB at 4 MB/s take 0.5 s"
    assert called < 0.4
    assert_saved(tmp_path / "c", host)


EXPANDABLE = """
import sys
from pathlib import Path

import pytest
import torch

import snapstone as ss
from cuda import fake_torch
from cuda.device import IS_REAL
from cuda.states import assert_saved, bits, model, numbers, scribble

if not IS_REAL:
    fake_torch.install()
    fake_torch.patch(pytest.MonkeyPatch())
path = Path(sys.argv[1])
first = torch.empty(5 << 20, dtype=torch.uint8, device="cuda:0")
for turn in range(2):
    state, host = model(torch.device("cuda:0"), seed=turn)
    state["huge"] = numbers(9 << 20, turn).to("cuda:0")  # more than one granule of memory
    host["huge"] = numbers(9 << 20, turn)
    handle = ss.async_save(state, checkpoint_id=path / str(turn))
    scribble(state)
    state.clear()
    if IS_REAL:
        torch.cuda.empty_cache()  # unmaps
    handle.result()
    assert_saved(path / str(turn), host)
    targets = {name: torch.empty_like(tensor, device="cuda:0") for name, tensor in host.items()}
    ss.load(targets, checkpoint_id=path / str(turn))
    for name, tensor in host.items():
        assert torch.equal(bits(targets[name].cpu()), bits(tensor)), name
"""


def test_memory_of_expandable_segments(tmp_path: Path) -> None:
    """Tensors lie across pieces of memory that are mapped, and unmapped, one by one. On the fake, which maps nothing,
    it is a state that grows and is freed.
    """
    paths = [str(ROOT / "python"), str(ROOT / "tests"), *sys.path]
    setting = "expandable_segments:True"
    environment = {
        **os.environ,
        **({} if IS_REAL else fake_driver.environment()),
        "PYTORCH_ALLOC_CONF": setting,
        "PYTORCH_CUDA_ALLOC_CONF": setting,
        "PYTHONPATH": os.pathsep.join(paths),
    }
    command = [sys.executable, "-c", EXPANDABLE, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert "violation" not in done.stderr


def test_the_driver_is_asked_nothing_about_memory_that_is_not_the_engines() -> None:
    """So it is the same to the engine how an allocator came by an address, and how it lies in what."""
    table = (ROOT / "csrc" / "cuda" / "driver.h").read_text()
    calls = set(re.findall(r"\bcu[A-Z]\w+", table))
    assert {"cuMemcpyDtoHAsync", "cuMemAllocAsync"} <= calls
    assert not [call for call in calls if re.search("Pointer|AddressRange|Ipc|Export|Retain.*Handle", call)]


def test_states_of_two_trainers_share_a_link(device: Devices, tmp_path: Path) -> None:
    """Two saves and a load at once."""
    first, first_host = model(device.cuda, seed=1)
    second, second_host = model(device.other, seed=2)
    ss.save(first, checkpoint_id=tmp_path / "base")
    handles = [ss.async_save(state, checkpoint_id=tmp_path / name) for name, state in (("a", first), ("b", second))]
    scribble(first)
    scribble(second)
    target = {name: torch.empty_like(tensor) for name, tensor in first.items() if tensor.is_cuda}
    ss.load(target, checkpoint_id=tmp_path / "base", strict=False)
    for handle in handles:
        handle.result()
    assert_saved(tmp_path / "a", first_host)
    assert_saved(tmp_path / "b", second_host)
    for name, tensor in target.items():
        assert torch.equal(bits(device.on_host(tensor)), bits(first_host[name])), name
