"""Where the tests of this folder save: in memory when they may, because an fsync there costs microseconds."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import snapstone as ss
from durability import small
from durability.based import forget
from durability.chain import CHUNK_BYTES
from snapstone import _native

MEMORY = Path("/dev/shm")


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[Path]:
    """An empty directory in memory, or the test's own on disk where there is none."""
    if not os.access(MEMORY, os.W_OK | os.X_OK):
        yield tmp_path
        return
    path = Path(tempfile.mkdtemp(prefix="snapstone-test-", dir=MEMORY))
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture
def use_rung(directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Makes saves and loads use one way of doing I/O; returns a directory in which it works."""

    def choose(rung: str) -> Path:
        for candidate in (directory, tmp_path):
            if not _native.try_rung(str(candidate), rung):
                monkeypatch.setenv("SNAPSTONE_IO", rung)
                return candidate
        pytest.skip(f"{rung}: {_native.try_rung(str(tmp_path), rung)}")

    return choose


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SNAPSTONE_CHUNK_BYTES", str(CHUNK_BYTES))


@pytest.fixture
def run(directory: Path, small_chunks: None) -> Path:
    """Of the checkpoints "origin" and its delta "previous". What this process remembers of them is forgotten."""
    small.save_previous(directory / "run")
    forget()
    return directory / "run"


@pytest.fixture(autouse=True)
def no_faults_left() -> Iterator[None]:
    """A test that fails while a fault is armed does not spoil the next one."""
    yield
    _native.fault_disarm()
    for _ in range(8):
        try:
            ss.wait(30)
            return
        except Exception as error:  # of a save that a failed test left behind
            print(f"left behind: {error!r}")
