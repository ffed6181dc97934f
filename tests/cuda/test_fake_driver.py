"""The controls of the fake driver do what tests rely on. What it catches is tested in native/cuda/fake_test.cc."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time

import pytest

from cuda import fake_driver
from cuda.fake_driver import FakeDriver


def test_bytes_go_to_the_device_and_come_back(fake: FakeDriver) -> None:
    address = fake.alloc(1000)
    fake.write(address, bytes(range(250)) * 4)
    assert fake.read(address + 250, 10) == bytes(range(10))
    fake.free(address)


def test_a_stream_runs_late_and_in_order(fake: FakeDriver) -> None:
    fake.mode("lazy")
    stream = fake.stream()
    address = fake.alloc(4, stream=stream)
    for byte in range(1, 6):
        fake.enqueue_fill(address, byte, 4, stream=stream)
    fake.enqueue_write(address + 1, b"xy", stream=stream)
    assert fake.pending() == 6
    fake.drain()
    assert fake.pending() == 0
    assert fake.read(address, 4) == b"\x05xy\x05"
    fake.free(address)


def test_a_host_that_looks_too_early_is_caught(fake: FakeDriver) -> None:
    fake.mode("lazy")
    address = fake.alloc(4)
    fake.enqueue_fill(address, 1, 4)
    with pytest.raises(RuntimeError):
        fake.read(address, 4)
    assert [line for line in fake.violations() if "before the end of a fill" in line]
    fake.reset()
    fake.free(address)


def test_streams_that_nothing_orders_are_caught(fake: FakeDriver) -> None:
    address = fake.alloc(4)
    fake.enqueue_fill(address, 1, 4)
    fake.enqueue_fill(address, 2, 4, stream=fake.stream())
    fake.drain()
    assert [line for line in fake.violations() if line.startswith("nothing orders a fill")]
    fake.reset()
    fake.free(address)


def test_freed_memory_is_given_again_at_once(fake: FakeDriver) -> None:
    stream = fake.stream()
    first = fake.alloc(512, stream=stream)
    fake.free(first)
    assert fake.alloc(512, stream=stream) == first
    fake.drain()
    assert fake.read(first, 512) == b"\xde" * 512
    fake.free(first)
    with pytest.raises(RuntimeError):
        fake.read(first, 1)
    fake.reset()


def test_a_device_has_only_so_much_memory(fake: FakeDriver) -> None:
    with pytest.raises(MemoryError, match="fake device 1"):
        fake.alloc(1 << 50, device=1)


def test_work_takes_the_time_that_it_is_given(fake: FakeDriver) -> None:
    fake.mode("eager")
    begin = time.monotonic()
    fake.enqueue_delay(0.05)
    assert fake.pending() == 1
    fake.drain()
    assert time.monotonic() - begin >= 0.05
    fake.mode("chaos")


def test_calls_are_counted_until_they_are_reset(fake: FakeDriver) -> None:
    assert "cuDeviceGetCount" not in fake.counters()
    count = ctypes.c_int(0)
    assert fake.library.cuDeviceGetCount(ctypes.byref(count)) == 0
    assert count.value == 2
    assert fake.counters()["cuDeviceGetCount"] == 1
    fake.seed(77)
    assert fake.counters()["seed"] == 77


def test_calls_fail_as_told(fake: FakeDriver) -> None:
    fake.fail("cuDeviceGetCount:2:999")
    count = ctypes.c_int(0)
    assert [fake.library.cuDeviceGetCount(ctypes.byref(count)) for _ in range(3)] == [0, 999, 0]
    with pytest.raises(RuntimeError):
        fake.fail("nonsense")


def test_touching_device_memory_ends_the_process_with_a_word_about_it() -> None:
    program = """
import ctypes
from cuda.fake_driver import FakeDriver
fake = FakeDriver()
ctypes.string_at(fake.alloc(10), 1)
"""
    environment = {**os.environ, **fake_driver.environment(), "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == -signal.SIGSEGV
    assert "fakecuda: the host touched device memory" in done.stderr
