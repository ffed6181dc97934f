"""What is left when the last sync of a commit fails, and where the file system has no locks.

Invariants: an error after the rename removes nothing, neither the new checkpoint nor the one that it replaced; a
missing lock is no reason to fail; a lock that cannot be had is.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import snapstone as ss
from snapstone import _native

NEVER = "fsync:1000000:errno=EIO"  # armed, so that calls are counted


def save(path: Path, value: float) -> None:
    ss.save({"w": torch.full((1000,), value)}, checkpoint_id=path, overwrite=True)


def value_of(path: Path) -> float:
    assert ss.verify(path)
    values = set(ss.Checkpoint.open(path).get_tensor("w").tolist())
    assert len(values) == 1
    return values.pop()


def fail_the_last_sync(path: Path) -> None:
    """Arms EIO for the fsync that ends a save to `path`: the parent directory's, after the rename."""
    _native.fault_arm(NEVER)
    save(path.with_name("probe"), 0.0)
    last = _native.fault_seen("fsync")
    _native.fault_arm(f"fsync:{last}:errno=EIO")


def test_failed_sync_after_the_swap_keeps_the_checkpoint_that_was_replaced(tmp_path: Path) -> None:
    path = tmp_path / "step-1"
    save(path, 1.0)
    fail_the_last_sync(path)
    with pytest.raises(OSError, match="fsync"):
        save(path, 2.0)
    _native.fault_disarm()
    (replaced,) = tmp_path.glob(".staging-*")
    assert value_of(path) == 2.0
    assert value_of(replaced.rename(tmp_path / "replaced")) == 1.0


def test_failed_sync_after_the_rename_keeps_the_new_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "step-1"
    fail_the_last_sync(path)
    with pytest.raises(OSError, match="fsync"):
        save(path, 1.0)
    _native.fault_disarm()
    assert value_of(path) == 1.0
    assert list(tmp_path.glob(".staging-*")) == []


def test_what_an_uncertain_swap_left_is_removed_only_after_a_good_sync(tmp_path: Path) -> None:
    path = tmp_path / "step-1"
    save(path, 1.0)
    fail_the_last_sync(path)
    with pytest.raises(OSError, match="fsync"):
        save(path, 2.0)
    (replaced,) = tmp_path.glob(".staging-*")
    replaced.joinpath("OWNER").write_text(f"{_native.boot_id()}\n")  # a dead save of this boot: may go at once
    _native.fault_arm("fsync:1+:errno=EIO")
    assert _native.reap(str(tmp_path)) == []
    assert (replaced / "MANIFEST.json").exists()
    _native.fault_disarm()
    assert _native.reap(str(tmp_path)) == [replaced.name]
    assert value_of(path) == 2.0


@pytest.mark.parametrize("error", ["ENOSYS", "EOPNOTSUPP"])
def test_a_file_system_without_locks_can_be_saved_to(tmp_path: Path, error: str) -> None:
    _native.fault_arm(f"flock:1+:errno={error}")
    save(tmp_path / "step-1", 1.0)
    _native.fault_disarm()
    assert value_of(tmp_path / "step-1") == 1.0
    assert [entry.name for entry in tmp_path.iterdir()] == ["step-1"]


def test_a_lock_that_cannot_be_had_is_an_error(tmp_path: Path) -> None:
    _native.fault_arm("flock:1+:errno=ENOLCK")
    with pytest.raises(OSError, match="flock"):
        save(tmp_path / "step-1", 1.0)
    assert not (tmp_path / "step-1").exists()


def test_every_removal_of_leftovers_has_a_sync_of_its_own(tmp_path: Path) -> None:
    """What one sync vouched for may have been swapped for something else by the time of the next removal."""
    leftovers = []
    for digit in "ab":
        leftover = tmp_path / f".staging-{digit * 32}"
        leftover.mkdir()
        leftover.joinpath("OWNER").write_text(f"{_native.boot_id()}\n")
        leftovers.append(leftover.name)
    _native.fault_arm("fsync:2:errno=EIO")
    try:
        assert _native.reap(str(tmp_path)) == leftovers[:1]
    finally:
        _native.fault_disarm()
    assert _native.reap(str(tmp_path)) == leftovers[1:]
