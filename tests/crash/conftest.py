from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

MEMORY = Path("/dev/shm")


@pytest.fixture
def scratch(tmp_path: Path) -> Iterator[Path]:
    """In memory where that is possible: thousands of directories are made there."""
    if not os.access(MEMORY, os.W_OK | os.X_OK):
        yield tmp_path
        return
    path = Path(tempfile.mkdtemp(prefix="snapstone-crash-", dir=MEMORY))
    yield path
    shutil.rmtree(path, ignore_errors=True)
