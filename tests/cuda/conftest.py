"""Tests here run on the fake CUDA driver, or on a device with SNAPSTONE_TEST_CUDA=real."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest

import snapstone
from cuda import fake_driver, fake_torch
from cuda.device import IS_REAL, Devices, FakeDevices, RealDevices
from snapstone import _native

HERE = Path(__file__).resolve().parent

# On a device these are not skipped, which would be a failure there: they are not about it.
collect_ignore = ["test_fake_driver.py", "test_fake_torch.py", "test_processes.py"] if IS_REAL else []


def pytest_collection_finish(session: pytest.Session) -> None:
    """Chosen before the first test of any directory: the engine looks for a driver once."""
    if not IS_REAL and any(HERE in item.path.parents for item in session.items):
        fake_driver.choose()


@pytest.fixture
def fake() -> Iterator[fake_driver.FakeDriver]:
    """The fake driver, idle; the test fails if something was wrong that it did not `reset`."""
    driver = fake_driver.FakeDriver()
    driver.reset()
    yield driver
    driver.drain()
    violations, seed = driver.violations(), driver.counters()["seed"]
    driver.reset()
    assert violations == [], f"FAKECUDA_SEED={seed}"


@pytest.fixture
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Devices]:
    """Two devices, with staging memory that is ready for them; nothing is under way when the test ends."""
    devices: Devices
    if IS_REAL:
        devices = RealDevices()
    else:
        fake = request.getfixturevalue("fake")
        fake.mode("chaos")
        fake_torch.install()
        fake_torch.patch(monkeypatch)
        devices = FakeDevices(fake)
    yield devices
    _native.fault_disarm()
    snapstone.wait()
    gc.collect()  # what dies later dies under another test's eyes
