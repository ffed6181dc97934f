"""What the engine finds in a CUDA driver, and says of one that it cannot use."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys

import pytest

from cuda import fake_driver
from snapstone.errors import CheckpointError, CudaError


def facts(**variables: str) -> dict[str, object]:
    """`cuda_facts()` of a process of its own."""
    program = "import json; from snapstone import _native; print(json.dumps(_native.cuda_facts()))"
    return dict(json.loads(_output_of([sys.executable, "-c", program], variables)))


def _output_of(command: list[str], variables: dict[str, str]) -> str:
    known = {name: value for name, value in os.environ.items() if not name.startswith("FAKECUDA_")}
    done = subprocess.run(command, env={**known, **variables}, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_driver_and_its_devices_are_described() -> None:
    assert facts(**fake_driver.environment(devices=2, memory=1 << 30, numa=1, version=12080)) == {
        "available": True,
        "reason": None,
        "driver_version": 12080,
        "devices": [
            {
                "ordinal": ordinal,
                "name": f"Fake CUDA device {ordinal}",
                "compute_capability": [9, 0],
                "total_bytes": 1 << 30,
                "numa_node": 1,
            }
            for ordinal in range(2)
        ],
        "batched_copies": True,
        "stream_ordered_memory": True,
        "kernel_launches": True,
    }


def test_optional_calls_may_be_missing() -> None:
    found = facts(**fake_driver.environment(version=12020, hide="cuMemAllocAsync,cuLaunchKernel"))
    assert found["available"]
    assert not found["batched_copies"]
    assert not found["stream_ordered_memory"]
    assert not found["kernel_launches"]


@pytest.mark.parametrize(
    ("variables", "reason"),
    [
        ({"SNAPSTONE_LIBCUDA": "off"}, "SNAPSTONE_LIBCUDA=off"),
        ({"SNAPSTONE_LIBCUDA": "/nonexistent/libcuda.so"}, "/nonexistent/libcuda.so: cannot open"),
        ({"FAKECUDA_VERSION": "11040"}, "the driver supports CUDA 11.4; 12.0 or newer is needed"),
        ({"FAKECUDA_FAIL": "cuInit:1:999"}, "cuInit: CUDA_ERROR_UNKNOWN"),
        ({"FAKECUDA_DEVICES": "0"}, "cuInit: CUDA_ERROR_NO_DEVICE"),
        ({"FAKECUDA_HIDE": "cuEventQuery"}, "libfakecuda.so has no cuEventQuery"),
    ],
)
def test_a_driver_that_cannot_be_used_is_no_cuda_and_a_reason(variables: dict[str, str], reason: str) -> None:
    found = facts(**{**fake_driver.environment(), **variables})
    assert not found["available"]
    assert found["devices"] == []
    assert found["driver_version"] is None
    assert reason in str(found["reason"])


def test_doctor_shows_the_devices() -> None:
    command = [sys.executable, "-m", "snapstone", "doctor", "--no-speed"]
    output = _output_of(command, fake_driver.environment(devices=2, numa=0, version=12060))
    assert "CUDA              driver for 12.6; no batched copies" in output
    assert "  device 1        Fake CUDA device 1, sm_90, 4.0 GiB, NUMA node 0\n" in output
    document = json.loads(_output_of([*command, "--json"], fake_driver.environment()))
    assert document["cuda"]["driver_version"] == 13000
    assert [device["ordinal"] for device in document["cuda"]["devices"]] == [0, 1]


def test_doctor_says_why_there_is_none() -> None:
    command = [sys.executable, "-m", "snapstone", "doctor", "--no-speed"]
    output = _output_of(command, {"SNAPSTONE_LIBCUDA": "off"})
    assert "CUDA              no: SNAPSTONE_LIBCUDA=off\n" in output


def test_a_failed_call_is_an_error_that_says_which_and_where() -> None:
    program = """
from snapstone import CudaError, _native
_native.fault_arm("cuDeviceGetName:2:errno=719")
try:
    _native.cuda_facts()
except CudaError as error:
    print(error.code, error.call, error.device, str(error))
"""
    output = _output_of([sys.executable, "-c", program], fake_driver.environment())
    assert output == ("719 cuDeviceGetName 1 CUDA_ERROR_LAUNCH_FAILED (call='cuDeviceGetName', code=719, device=1)\n")


def test_the_error_survives_pickle() -> None:
    error = CudaError("CUDA_ERROR_UNKNOWN", code=999, call="cuEventQuery", device=3, rank=5)
    again = pickle.loads(pickle.dumps(error))
    assert isinstance(again, CheckpointError)
    assert (again.code, again.call, again.device, again.rank) == (999, "cuEventQuery", 3, 5)
    assert str(again) == str(error)


def test_a_forked_child_has_no_cuda() -> None:
    program = """
import os
from snapstone import _native
assert _native.cuda_facts()["available"]
child = os.fork()
if child == 0:
    facts = _native.cuda_facts()
    os._exit(0 if not facts["available"] and "forked" in facts["reason"] else 1)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    assert _output_of([sys.executable, "-c", program], fake_driver.environment()) == "0\n"
