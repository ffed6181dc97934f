"""Makes `ranks` importable by the tests of this folder and by the processes that they start."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several chunks per tensor, so that a rank can fail in the middle of one; the processes inherit it."""
    monkeypatch.setenv("SNAPSTONE_CHUNK_BYTES", "65536")
