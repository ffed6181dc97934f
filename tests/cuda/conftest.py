"""Tests here run on the fake CUDA driver, or on a device with SNAPSTONE_TEST_CUDA=real."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from cuda import fake_driver

HERE = Path(__file__).resolve().parent


def pytest_collection_finish(session: pytest.Session) -> None:
    """Chosen before the first test of any directory: the engine looks for a driver once."""
    if os.environ.get("SNAPSTONE_TEST_CUDA") != "real" and any(HERE in item.path.parents for item in session.items):
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
