"""What a process finds when it first has to do with CUDA: no driver, memory that is not registered, a first save."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cuda import fake_driver
from cuda.device import IS_REAL

pytestmark = pytest.mark.skipif(IS_REAL, reason="of the fake alone")

ROOT = Path(__file__).resolve().parents[2]

BEGIN = """
import sys
from pathlib import Path

import pytest
import torch

import snapstone as ss
from cuda import fake_torch
from cuda.device import FakeDevices
from cuda.fake_driver import FakeDriver
from cuda.states import MIB, assert_saved, bits, model, scribble
from snapstone import _native

path = Path(sys.argv[1])
"""

ON_THE_FAKE = (
    BEGIN
    + """
fake_torch.install()
driver = FakeDriver({engine})
fake_torch.patch(pytest.MonkeyPatch(), driver)
device = FakeDevices(driver)
state, host = model(device.cuda)
handle = ss.async_save(state, checkpoint_id=path)
scribble(state)
handle.result()
assert_saved(path, host)
stats = handle.stats
targets = {{name: torch.empty_like(tensor) for name, tensor in state.items()}}
loaded = ss.load(targets, checkpoint_id=path)
for name, tensor in host.items():
    assert torch.equal(bits(device.on_host(targets[name])), bits(tensor)), name
"""
)


def run(program: str, path: Path, **variables: str) -> None:
    paths = [str(ROOT / "python"), str(ROOT / "tests"), *sys.path]
    done = subprocess.run(
        [sys.executable, "-c", program, str(path)],
        env={**os.environ, **fake_driver.environment(), "PYTHONPATH": os.pathsep.join(paths), **variables},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    assert "violation" not in done.stderr


def test_a_tensor_that_outlives_everything_ends_with_its_process(tmp_path: Path) -> None:
    run(ON_THE_FAKE.format(engine="") + "sys.unraisablehook = lambda hook: state\n", tmp_path / "saved")


def test_without_a_driver_torch_takes_tensors_to_the_host_and_back(tmp_path: Path) -> None:
    program = """
assert "supports CUDA 11.4" in stats["cuda_unused"], stats
assert "devices" not in stats
assert "devices" not in loaded.stats
with pytest.raises(ValueError, match="CUDA 11.4"):
    ss.prepare("cuda:0", MIB)
"""
    run(ON_THE_FAKE.format(engine="engine=False") + program, tmp_path / "c", FAKECUDA_VERSION="11040")


def test_without_a_driver_copies_to_the_host_follow_the_stream_that_made_the_values(tmp_path: Path) -> None:
    program = """
parameter = torch.nn.Parameter(torch.zeros(1000, device=device.cuda))
optimizer = torch.optim.SGD([parameter], lr=1.0, foreach=False)
parameter.grad = torch.ones_like(parameter)
stream = torch.cuda.Stream(device.cuda)
torch.cuda.synchronize()
with torch.cuda.stream(stream):
    device.delay(0.2, stream)
    parameter.detach().fill_(5)
    handle = ss.async_save({{"p": parameter}}, checkpoint_id=path.with_name("d"), fence=optimizer)
    optimizer.step()
handle.result()
torch.cuda.synchronize()
assert_saved(path.with_name("d"), {{"p": torch.full((1000,), 5.0)}})
assert driver.violations() == []
"""
    run((ON_THE_FAKE + program).format(engine="engine=False"), tmp_path / "c", FAKECUDA_VERSION="11040")


def test_a_first_save_that_nothing_was_prepared_for(tmp_path: Path) -> None:
    program = """
assert stats["devices"]["late_bytes"] > 0 or stats["devices"]["overflow_bytes"] > 0, stats
assert stats["devices"]["unregistered_bytes"] == 0, stats
assert loaded.stats["devices"] == [0]
"""
    run(ON_THE_FAKE.format(engine="") + program, tmp_path / "c")


def test_digests_on_the_device_can_be_demanded_of_a_first_save(tmp_path: Path) -> None:
    program = """
assert stats["devices"]["no_kernels"] == "", stats
assert stats["devices"]["digested_bytes"] > 0, stats
"""
    run(ON_THE_FAKE.format(engine="") + program, tmp_path / "c", SNAPSTONE_DIGEST="device")


def test_registered_memory_may_have_another_address_on_devices(tmp_path: Path) -> None:
    program = """
assert stats["devices"]["unregistered_bytes"] == 0, stats
for turn in range(2):
    handle = ss.async_save(targets, checkpoint_id=path.with_name(f"again{turn}"))
    handle.result()
    assert_saved(path.with_name(f"again{turn}"), host)
"""
    run(ON_THE_FAKE.format(engine="") + program, tmp_path / "c", FAKECUDA_HOST_POINTERS="0")


def test_memory_that_cannot_be_registered_is_used_all_the_same(tmp_path: Path) -> None:
    program = """
assert stats["devices"]["unregistered_bytes"] == stats["devices"]["copied_bytes"] > 0, stats
assert "cuMemHostRegister" in stats["devices"]["refusal"], stats
"""
    run(
        ON_THE_FAKE.format(engine="") + program,
        tmp_path / "c",
        SNAPSTONE_FAULT="cuMemHostRegister_v2:1+:errno=800",
    )


def test_without_kernels_the_host_computes_digests(tmp_path: Path) -> None:
    program = """
assert stats["devices"]["digested_bytes"] == 0, stats
assert stats["devices"]["no_kernels"], stats
import os
os.environ["SNAPSTONE_DIGEST"] = "device"
with pytest.raises(ss.CheckpointError, match="SNAPSTONE_DIGEST=device"):
    ss.save(targets, checkpoint_id=path.with_name("d"))
"""
    run(ON_THE_FAKE.format(engine="") + program, tmp_path / "c", FAKECUDA_HIDE="cuModuleLoadData")


def test_tensors_of_the_host_leave_cuda_alone(tmp_path: Path) -> None:
    program = """
parameter = torch.nn.Parameter(torch.zeros(1000))
optimizer = torch.optim.SGD([parameter], lr=1.0)
ss.async_save({"p": parameter}, checkpoint_id=path, fence=optimizer).result()
ss.load({"p": parameter}, checkpoint_id=path)
import ctypes, json, os
library = ctypes.CDLL(os.environ["SNAPSTONE_LIBCUDA"])
library.fakecuda_counters.restype = ctypes.c_char_p
assert "cuInit" not in json.loads(library.fakecuda_counters())
"""
    run(BEGIN + program, tmp_path / "c")


def test_a_slow_link_holds_up_the_save_and_not_the_call(tmp_path: Path) -> None:
    """0.5 s for the state's 3.8 MiB, each way."""
    program = """
import time
begin = time.monotonic()
handle = ss.async_save(state, checkpoint_id=path.with_name("d"), overwrite=True)
called = time.monotonic() - begin
scribble(state)
handle.result()
assert time.monotonic() - begin > 0.4
assert called < 0.4, called
host = {name: tensor.cpu() for name, tensor in state.items()}
assert_saved(path.with_name("d"), {name: torch.ones_like(t) if t.dtype == torch.uint8 and name != "on_host" else t
                                   for name, t in host.items()} | {"on_host": host["on_host"]})
"""
    run(ON_THE_FAKE.format(engine="") + program, tmp_path / "c", FAKECUDA_GBPS="0.008")


def test_a_lost_device_fails_saves_and_loads_and_keeps_what_it_may_use(tmp_path: Path) -> None:
    program = """
state = {"large": state["large"], "small": state["small"]}
driver.drain()
driver.fail("work:3:719")
try:
    ss.save(state, checkpoint_id=path.with_name("d"))
    raise AssertionError("saved from a lost device")
except ss.CudaError as error:
    assert (error.code, error.device) == (719, 0), error
kept = {name: tensor.data_ptr() for name, tensor in state.items() if tensor.is_cuda and tensor.numel()}
state.clear()
import gc
gc.collect()
assert set(kept.values()) <= set(fake_torch._blocks), "memory was freed that copies may still read"
with pytest.raises(ss.CudaError):
    ss.load(targets, checkpoint_id=path)
assert_saved(path, host)
there = {"a": torch.arange(1000.0)}
ss.save(there, checkpoint_id=path.with_name("e"))
assert_saved(path.with_name("e"), there)
"""
    run(ON_THE_FAKE.format(engine="") + program, tmp_path / "c")
