"""Calls of the driver that fail: typed errors that name the call, nothing of the tensors touched afterwards, and an
engine that goes on.
"""

from __future__ import annotations

import errno
from contextlib import suppress
from pathlib import Path

import pytest
import torch

import snapstone as ss
from cuda.device import Devices
from cuda.states import assert_saved, bits, model, numbers, save, scribble
from snapstone import CudaError, _native, orphans

LAUNCH_FAILED = 719  # CUDA_ERROR_LAUNCH_FAILED, which takes the device with it

COPIES = "cuMemcpyBatchAsync_v2:{n}:errno=719;cuMemcpyBatchAsync:{n}:errno=719;cuMemcpyDtoHAsync_v2:{n}:errno=719"


@pytest.mark.parametrize(
    "rules",
    [
        "cuEventRecord:1:errno=719",
        "cuEventQuery:1:errno=719",
        "cuStreamWaitEvent:1:errno=719",
        COPIES.format(n=1),
    ],
)
@pytest.mark.parametrize("fence", ["sync", "now"])
def test_a_failing_call_fails_the_save_and_nothing_after_it(
    device: Devices, tmp_path: Path, rules: str, fence: str
) -> None:
    state, host = model(device.cuda)
    ss.save(state, checkpoint_id=tmp_path / "before")
    _native.fault_arm(rules)
    with pytest.raises(CudaError, match="LAUNCH_FAILED") as caught:
        save(fence, state, tmp_path / "c")
    _native.fault_disarm()
    assert caught.value.code == LAUNCH_FAILED
    assert caught.value.call in rules
    assert caught.value.device == 0
    assert not (tmp_path / "c").exists()
    ss.save(host, checkpoint_id=tmp_path / "host")
    assert_saved(tmp_path / "host", host)
    torch.cuda.synchronize()
    handle = ss.async_save(state, checkpoint_id=tmp_path / "again")
    scribble(state)
    handle.result()
    assert_saved(tmp_path / "again", host)


def test_a_failing_call_fails_the_load_and_nothing_after_it(device: Devices, tmp_path: Path) -> None:
    state, host = model(device.cuda)
    ss.save(state, checkpoint_id=tmp_path / "c")
    for rules in ("cuEventRecord:1:errno=719", "cuEventQuery:1:errno=719", "cuStreamWaitEvent:1:errno=719"):
        _native.fault_arm(rules)
        with pytest.raises(CudaError, match="LAUNCH_FAILED"):
            ss.load(state, checkpoint_id=tmp_path / "c")
        _native.fault_disarm()
        torch.cuda.synchronize()
        ss.load(state, checkpoint_id=tmp_path / "c")
        for name, tensor in host.items():
            assert torch.equal(bits(device.on_host(state[name])), bits(tensor)), name


def test_a_device_that_goes_on_failing_is_nothing_to_tensors_of_the_host(device: Devices, tmp_path: Path) -> None:
    state = {"a": numbers(20 << 20).to(device.cuda)}  # several batches: some write while others fail
    host = {"a": numbers(3 << 20)}
    ss.save(state, checkpoint_id=tmp_path / "device")
    ss.save(host, checkpoint_id=tmp_path / "host")
    for nth in range(1, 200):  # until a load fails that is writing to its targets
        device.delay(0.02)
        _native.fault_arm(f"cuEventQuery:{nth}+:errno=719")
        with suppress(CudaError):
            ss.load(state, checkpoint_id=tmp_path / "device")
        if orphans._orphans:
            break
    assert orphans._orphans
    for _ in range(2):
        target = {"a": torch.zeros(3 << 20, dtype=torch.uint8)}
        ss.load(target, checkpoint_id=tmp_path / "host")
        assert torch.equal(target["a"], host["a"])
    ss.save(host, checkpoint_id=tmp_path / "again")
    assert_saved(tmp_path / "again", host)
    _native.fault_disarm()
    torch.cuda.synchronize()
    ss.load(target, checkpoint_id=tmp_path / "host")  # lets go of what the failed load was to fill
    assert not orphans._orphans


def test_an_optimizer_steps_on_when_the_save_fails(device: Devices, tmp_path: Path) -> None:
    parameter = torch.nn.Parameter(torch.zeros(1000, device=device.cuda))
    optimizer = torch.optim.SGD([parameter], lr=1.0, foreach=False)
    parameter.grad = torch.ones_like(parameter)
    ss.save({"p": parameter}, checkpoint_id=tmp_path / "warm")
    for rules in ("cuEventQuery:1+:errno=719", "cuStreamWaitEvent:2:errno=719", "openat:1+:errno=ENOSPC"):
        _native.fault_arm(rules)
        handle = ss.async_save({"p": parameter}, checkpoint_id=tmp_path / "c", fence=optimizer)
        handle.upload_completion.exception()
        _native.fault_disarm()
        torch.cuda.synchronize()  # a save that failed may still be reading what nobody will see
        optimizer.step()
        assert handle.staging_completion.done()
    torch.cuda.synchronize()
    assert torch.equal(device.on_host(parameter.detach()), torch.full((1000,), -3.0))


@pytest.mark.parametrize("nth", [1, 2, 4])
def test_a_disk_that_is_full_while_copies_are_under_way(device: Devices, tmp_path: Path, nth: int) -> None:
    state, host = model(device.cuda)
    for call in ("write", "pwrite"):
        _native.fault_arm(f"{call}:{nth}:errno=ENOSPC")
        try:
            handle = ss.async_save(state, checkpoint_id=tmp_path / call)
            error = handle.upload_completion.exception()
        except OSError as at_once:
            error = at_once
        _native.fault_disarm()
        if error is not None:
            assert isinstance(error, OSError)
            assert error.errno == errno.ENOSPC
            assert not (tmp_path / call).exists()
    ss.async_save(state, checkpoint_id=tmp_path / "c").result()
    assert_saved(tmp_path / "c", host)


def test_a_cancelled_save_lets_go_of_devices(device: Devices, tmp_path: Path) -> None:
    state, host = model(device.cuda)
    ss.prepare(device.cuda, 16 << 20)
    device.delay(0.2)
    handle = ss.async_save(state, checkpoint_id=tmp_path / "c")
    assert handle.cancel()
    assert handle.upload_completion.exception() is not None
    state.clear()
    fresh = {"a": numbers(1 << 20).to(device.cuda)}
    ss.async_save(fresh, checkpoint_id=tmp_path / "d").result()
    assert_saved(tmp_path / "d", {"a": numbers(1 << 20)})
    assert host
