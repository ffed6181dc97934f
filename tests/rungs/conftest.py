"""What the plainest way of doing I/O writes: all others are compared with it."""

from __future__ import annotations

from pathlib import Path

import pytest

from rungs.running import run_work


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("reference")
    assert run_work("buffered", directory, directory).rungs == {"buffered"}
    return directory
