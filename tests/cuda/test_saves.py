"""What a save of tensors on CUDA devices holds, whatever happens to them afterwards.

Training goes on at once in every test: what it writes is ordered by streams alone, and the host waits for nothing but
the save. On the fake driver a copy that something does not order is a violation even where its bytes were right.
"""

from __future__ import annotations

import warnings
import weakref
from pathlib import Path

import pytest
import torch

import snapstone as ss
from cuda.device import Devices
from snapstone import CudaError, _native

KIB, MIB = 1 << 10, 1 << 20


def numbers(nbytes: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (nbytes,), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def model(device: torch.device, *, other: torch.device | None = None) -> tuple[dict, dict]:
    """A state of large, small, strided and odd tensors, and what it holds; on `other` some of it."""
    host = {
        "large": numbers(3 * MIB + 17, 1),
        "matrix": numbers(512 * KIB, 2).view(torch.bfloat16).reshape(512, 512),
        "small": numbers(700, 3),
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 3),
        "strided": numbers(4096, 4).view(torch.float32).reshape(32, 32).nan_to_num().t(),
        **{f"tiny.{i}": numbers(16 + i, 5 + i) for i in range(40)},
    }
    state = {name: tensor.to(device) for name, tensor in host.items()}
    state["strided"] = host["strided"].t().contiguous().to(device).t()
    if other is not None:
        for name in ("matrix", "tiny.3", "small"):
            state[name] = host[name].to(other)
    state["on_host"] = host["on_host"] = numbers(100 * KIB, 99)
    return state, host


def scribble(state: dict) -> None:
    """What the next step does to the tensors of devices, in the current streams."""
    for tensor in state.values():
        if tensor.is_cuda and tensor.numel():
            tensor.fill_(1)


def assert_saved(path: Path, host: dict) -> None:
    saved = ss.Checkpoint.open(path).load_tensors()
    assert saved.keys() == host.keys()
    for name, tensor in host.items():
        assert torch.equal(saved[name].contiguous().view(torch.uint8), tensor.contiguous().view(torch.uint8)), name


def test_a_save_holds_what_the_stream_had_made_of_the_state(device: Devices, tmp_path: Path) -> None:
    state, host = model(device.cuda)
    state["large"].zero_()
    device.delay(0.02)
    state["large"].copy_(host["large"].to(device.cuda))
    saved = ss.save(state, checkpoint_id=tmp_path / "c")
    scribble(state)
    assert_saved(tmp_path / "c", host)
    found = saved.stats["devices"]
    assert found["ordinals"] == [0]
    assert found["bytes"] == sum(tensor.nbytes for name, tensor in host.items() if name != "on_host")
    assert "cuda_unused" not in saved.stats


def test_the_stream_may_change_the_state_when_async_save_returns(device: Devices, tmp_path: Path) -> None:
    ss.prepare("cuda", 32 * MIB)
    for step in range(3):
        state, host = model(device.cuda)
        handle = ss.async_save(state, checkpoint_id=tmp_path / f"c{step}")
        scribble(state)
        handle.staging_completion.result()
        scribble(state)
        handle.result()
        assert_saved(tmp_path / f"c{step}", host)


def test_several_devices_and_streams_that_are_not_the_default_ones(device: Devices, tmp_path: Path) -> None:
    first, second = torch.cuda.Stream(device.cuda), torch.cuda.Stream(device.other)
    with torch.cuda.stream(first), torch.cuda.stream(second):
        state, host = model(device.cuda, other=device.other)
        state["matrix"].zero_()
        device.delay(0.02, second)
        state["matrix"].copy_(host["matrix"].to(device.other))
        handle = ss.async_save(state, checkpoint_id=tmp_path / "c")
        scribble(state)
    handle.result()
    assert_saved(tmp_path / "c", host)
    assert handle.stats["devices"]["ordinals"] == sorted({device.cuda.index, device.other.index})


@pytest.mark.parametrize("wait_first", [False, True])
def test_memory_that_is_freed_after_the_call_is_saved_all_the_same(
    device: Devices, tmp_path: Path, wait_first: bool
) -> None:
    state, host = model(device.cuda)
    torch.cuda.synchronize()
    addresses = {tensor.data_ptr() for tensor in state.values() if tensor.is_cuda}
    handle = ss.async_save(state, checkpoint_id=tmp_path / "c")
    gone = weakref.ref(state["large"])
    state.clear()
    if wait_first:
        handle.staging_completion.result()
    again = [torch.full((3 * MIB + 17,), 7, dtype=torch.uint8, device=device.cuda) for _ in range(4)]
    handle.result()
    assert gone() is None
    assert_saved(tmp_path / "c", host)
    if wait_first:
        assert any(tensor.data_ptr() in addresses for tensor in again)  # the save let go of it


def adamw(device: torch.device, count: int = 4, nbytes: int = 300 * KIB) -> torch.optim.Optimizer:
    parameters = [
        torch.nn.Parameter(numbers(nbytes, i).float().to(device).reshape(-1, 64) / 256) for i in range(count)
    ]
    optimizer = torch.optim.AdamW(parameters, lr=0.1, foreach=False)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return optimizer


def state_of(optimizer: torch.optim.Optimizer, volatile: torch.Tensor) -> dict:
    parameters = optimizer.param_groups[0]["params"]
    return {
        "model": {str(i): parameter for i, parameter in enumerate(parameters)},
        "moments": [optimizer.state[parameter] for parameter in parameters],
        "buffers": {"running": volatile},
    }


def host_copy(device: Devices, value):
    if isinstance(value, torch.Tensor):
        return device.on_host(value.detach()).clone()
    if isinstance(value, dict):
        return {key: host_copy(device, item) for key, item in value.items()}
    return [host_copy(device, item) for item in value]


def assert_same(one, other) -> None:
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_same(one[key], other[key])
    else:
        for a, b in zip(one, other, strict=True):
            assert_same(a, b)


def test_an_optimizers_step_comes_after_the_snapshot(device: Devices, tmp_path: Path) -> None:
    stream = torch.cuda.Stream(device.cuda)
    with torch.cuda.stream(stream):
        optimizer = adamw(device.cuda)
        running = torch.arange(1000.0, device=device.cuda)
        state = state_of(optimizer, running)
        for step in range(3):
            expected = host_copy(device, state)
            device.delay(0.01)
            handle = ss.async_save(state, checkpoint_id=tmp_path / f"c{step}", fence=optimizer)
            running.add_(1)  # volatile: may change at once
            optimizer.step()
            handle.result()
            loaded = ss.Checkpoint.open(tmp_path / f"c{step}").state_dict()
            assert_same(expected, loaded)


def test_parameters_that_are_not_contiguous_are_saved_behind_a_fence(device: Devices, tmp_path: Path) -> None:
    matrix = numbers(256 * KIB).float().reshape(256, -1)
    parameter = torch.nn.Parameter(matrix.to(device.cuda).t())
    assert not parameter.is_contiguous()
    optimizer = torch.optim.SGD([parameter], lr=1.0, foreach=False)
    parameter.grad = torch.ones_like(parameter)
    device.delay(0.02)
    handle = ss.async_save({"p": parameter}, checkpoint_id=tmp_path / "c", fence=optimizer)
    optimizer.step()
    handle.result()
    assert_saved(tmp_path / "c", {"p": matrix.t()})
    assert torch.equal(device.on_host(parameter.detach()), matrix.t() - 1)


def test_lazy_conjugation_and_negation_are_resolved_on_the_device(device: Devices, tmp_path: Path) -> None:
    host = torch.view_as_complex(torch.arange(200.0).reshape(100, 2))
    on_device = host.to(device.cuda)
    lazy = {"conj": on_device.conj(), "neg": on_device.conj().imag}
    assert lazy["conj"].is_conj()
    assert lazy["neg"].is_neg()
    ss.async_save(lazy, checkpoint_id=tmp_path / "c").result()
    saved = ss.Checkpoint.open(tmp_path / "c").load_tensors()
    assert torch.equal(saved["conj"], host.conj().resolve_conj())
    assert torch.equal(saved["neg"], -host.imag)


def test_a_capturable_optimizer_is_no_fence(device: Devices, tmp_path: Path) -> None:
    optimizer = adamw(device.cuda)
    optimizer.param_groups[0]["capturable"] = True
    with pytest.raises(ValueError, match='use fence="now"'):
        ss.async_save({"p": torch.zeros(3)}, checkpoint_id=tmp_path / "c", fence=optimizer)


@pytest.mark.parametrize("fence", ["sync", "now", "optimizer"])
def test_a_save_inside_a_capture_is_refused(device: Devices, tmp_path: Path, fence: str) -> None:
    optimizer = adamw(device.cuda)
    state = state_of(optimizer, torch.zeros(8, device=device.cuda))
    torch.cuda.synchronize()
    with device.capturing(torch.cuda.Stream(device.cuda)):
        with pytest.raises(RuntimeError, match="save before or after the capture"):
            if fence == "sync":
                ss.save(state, checkpoint_id=tmp_path / "c")
            else:
                ss.async_save(state, checkpoint_id=tmp_path / "c", fence=optimizer if fence == "optimizer" else "now")
    assert not (tmp_path / "c").exists()
    ss.save(state, checkpoint_id=tmp_path / "c")


def test_a_capture_may_begin_while_a_save_is_under_way(device: Devices, tmp_path: Path) -> None:
    state, host = model(device.cuda)
    stream = torch.cuda.Stream(device.cuda)
    torch.cuda.synchronize()
    handle = ss.async_save(state, checkpoint_id=tmp_path / "c")
    with device.capturing(stream):
        handle.result()
    assert_saved(tmp_path / "c", host)
