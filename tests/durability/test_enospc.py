"""A full disk: real ones (a small tmpfs), and ENOSPC injected at every call that can meet it.

Invariants, sync and async, for every way of doing I/O:
  1. The save raises OSError with errno ENOSPC and a filename in the run directory.
  2. The previous checkpoint loads bit for bit; nothing of the failed save is visible.
  3. No staging directory, open file or slot is left, and the space is free again.
  4. The next save that fits works.
"""

from __future__ import annotations

import ctypes
import errno
import itertools
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import snapstone as ss
from durability import small
from durability.seam import calls_of, faults, os_error_of
from durability.small import RUNGS
from lacking import skip_without
from snapstone import _native

SEED = 28028
MIB = 1 << 20
DISK_BYTES = 8 * MIB
FILES_MAX = 24
LIBC = ctypes.CDLL(None, use_errno=True)
MNT_DETACH = 2


@pytest.fixture(autouse=True)
def seeded(monkeypatch: pytest.MonkeyPatch) -> None:
    print(f"seed {SEED}")
    monkeypatch.setenv("SNAPSTONE_CHUNK_BYTES", "65536")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A tmpfs of DISK_BYTES bytes and FILES_MAX files and directories."""
    path = tmp_path / "disk"
    path.mkdir()
    options = f"size={DISK_BYTES},nr_inodes={FILES_MAX},mode=700".encode()
    if LIBC.mount(b"snapstone-test", os.fsencode(path), b"tmpfs", 0, options) != 0:
        skip_without("mounts", f"a tmpfs needs root and CAP_SYS_ADMIN: {os.strerror(ctypes.get_errno())}")
    yield path
    LIBC.umount2(os.fsencode(path), MNT_DETACH)


def big(nbytes: int) -> dict[str, torch.Tensor]:
    return {"big": torch.arange(nbytes // 8) * 0x9E3779B97F4A7C15, "small": torch.ones(3)}


Save = Callable[..., Any]
SAVES: dict[str, Save] = {
    "sync": lambda state, path, **options: ss.save(state, checkpoint_id=path, **options),
    "async": lambda state, path, **options: ss.async_save(state, checkpoint_id=path, **options).result(60),
}


def assert_full(caught: pytest.ExceptionInfo[OSError], run: Path) -> None:
    assert caught.value.errno == errno.ENOSPC, caught.value
    assert str(caught.value.filename).startswith(str(run)), caught.value


def assert_as_before(run: Path) -> None:
    small.assert_holds(run / "previous", 1)
    assert os.listdir(run) == ["previous"]
    assert small.open_files(run) == []
    small.assert_slots_free()


def use(rung: str, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reason = _native.try_rung(str(run), rung)
    if reason:
        pytest.skip(f"{rung}: {reason}")
    monkeypatch.setenv("SNAPSTONE_IO", rung)


@pytest.mark.parametrize("kind", list(SAVES))
@pytest.mark.parametrize("rung", RUNGS)
def test_a_state_larger_than_the_disk(small_disk: Path, monkeypatch: pytest.MonkeyPatch, rung: str, kind: str) -> None:
    use(rung, small_disk, monkeypatch)
    ss.save(small.state(1), checkpoint_id=small_disk / "previous")
    free = os.statvfs(small_disk).f_bfree
    for codec in (None, "zstd"):
        with pytest.raises(OSError) as caught:  # noqa: PT011 - checked below
            SAVES[kind](big(3 * DISK_BYTES), small_disk / "c", codec=codec)
        assert_full(caught, small_disk)
        del caught
        assert_as_before(small_disk)
        assert os.statvfs(small_disk).f_bfree == free
    SAVES[kind](big(2 * MIB), small_disk / "fits")
    assert ss.verify(small_disk / "fits")
    assert torch.equal(ss.Checkpoint.open(small_disk / "fits").get_tensor("big"), big(2 * MIB)["big"])


@pytest.mark.parametrize("rung", ["uring", "buffered"])
def test_a_disk_that_fills_up_at_every_byte(small_disk: Path, monkeypatch: pytest.MonkeyPatch, rung: str) -> None:
    """From almost full to just enough, page by page: data, index and manifest are the first not to fit in turn."""
    use(rung, small_disk, monkeypatch)
    ss.save(small.state(1), checkpoint_id=small_disk / "previous")
    ballast = small_disk / "ballast"
    names: set[str] = set()
    for pages in itertools.count():
        free = os.statvfs(small_disk)
        with open(ballast, "wb") as opened:
            os.posix_fallocate(opened.fileno(), 0, (free.f_bavail - pages) * free.f_bsize)
        error = os_error_of(lambda: ss.save(small.state(2), checkpoint_id=small_disk / "c"))
        if error is None:
            break
        assert error.errno == errno.ENOSPC, error
        names.add(Path(error.filename).name)
        ballast.unlink()
        assert_as_before(small_disk)
    assert {"OWNER", "rank-00000.data", "rank-00000.index", "MANIFEST.json"} <= names, names
    small.assert_holds(small_disk / "c", 2)
    small.assert_holds(small_disk / "previous", 1)


def test_a_disk_without_room_for_more_files(small_disk: Path) -> None:
    ss.save(small.state(1), checkpoint_id=small_disk / "previous")
    failures = 0
    for more in itertools.count():
        for number in range(os.statvfs(small_disk).f_favail - more):
            (small_disk / f"file{number}").touch()
        error = os_error_of(lambda: ss.save(small.state(2), checkpoint_id=small_disk / "c"))
        if error is None:
            break
        assert error.errno == errno.ENOSPC, error
        failures += 1
        for file in small_disk.glob("file*"):
            file.unlink()
        assert_as_before(small_disk)
    assert failures >= 4
    small.assert_holds(small_disk / "c", 2)


def test_an_overwrite_on_a_full_disk_keeps_the_old_one(small_disk: Path) -> None:
    ss.save(small.state(1), checkpoint_id=small_disk / "previous")
    with pytest.raises(OSError) as caught:  # noqa: PT011 - checked below
        ss.save(big(DISK_BYTES), checkpoint_id=small_disk / "previous", overwrite=True)
    assert_full(caught, small_disk)
    del caught
    assert_as_before(small_disk)


@pytest.mark.parametrize("kind", list(SAVES))
@pytest.mark.parametrize("rung", RUNGS)
def test_enospc_at_any_call(use_rung: Callable[[str], Path], rung: str, kind: str) -> None:
    """Where nothing can be mounted, too: the call says ENOSPC once, and from then on every time."""
    run, save = use_rung(rung) / "run", SAVES[kind]
    save(small.state(1), run / "previous")
    counts = calls_of(lambda: save(small.state(1), run / "previous", overwrite=True))
    failures = 0
    for call in counts.keys() & {
        "open",
        "mkdir",
        "fallocate",
        "ftruncate",
        "pwrite",
        "uring_write",
        "fsync",
        "renameat2",
    }:
        for fault in faults(call, "errno=ENOSPC", lasting=call in ("pwrite", "uring_write", "fallocate")):
            error = os_error_of(lambda: save(small.state(2), run / "c"))
            fault.stop()
            if error is not None:
                failures += 1
                assert error.errno == errno.ENOSPC, (fault, error)
                assert error.filename.startswith(str(run)), (fault, error)
            if (run / "c").exists():  # no fault, or that of the very last sync
                small.assert_holds(run / "c", 2)
                shutil.rmtree(run / "c")
            assert_as_before(run)
    assert failures >= 10
    save(small.state(2), run / "c")
    small.assert_holds(run / "c", 2)


def test_what_one_process_finds_before_bytes_move_is_raised_by_the_call_itself(tmp_path: Path) -> None:
    """As the data file that cannot be made; ranks hear of it in a vote, and from the handle."""
    handles: list[Any] = []
    raised = set()
    for fault in faults("open", "errno=ENOSPC"):
        path = tmp_path / f"c-{fault.nth}"
        refused = os_error_of(lambda path=path: handles.append(ss.async_save(big(8), checkpoint_id=path)))
        if refused is None:
            os_error_of(lambda: handles[-1].result(60))
        else:
            raised.add(os.path.basename(refused.filename))
    assert "rank-00000.data" in raised
