"""Making files durable on behalf of engines that do not, and making them cold before a load."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["drop", "dropped_by", "fsync_directories", "fsync_files"]

DROP_CACHES = Path("/proc/sys/vm/drop_caches")


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_files(directory: Path) -> None:
    """Every file below `directory`."""
    for path in directory.rglob("*"):
        if path.is_file():
            _fsync(path)


def fsync_directories(directory: Path) -> None:
    """Every directory from the leaves up, and the parent, where the name of `directory` itself stands."""
    for path in sorted((path for path in directory.rglob("*") if path.is_dir()), reverse=True):
        _fsync(path)
    _fsync(directory)
    _fsync(directory.parent)


def drop(directory: Path, *, whole_machine: bool) -> None:
    """Drops the cached pages of all files below `directory`.

    With `whole_machine` the page and inode caches of the machine too, if this process may.
    """
    for path in directory.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(descriptor)
    if whole_machine and can_drop_whole_machine():
        DROP_CACHES.write_text("3")


def dropped_by(*, whole_machine: bool) -> str:
    """What `drop` uses here, for the result."""
    return "fadvise and drop_caches" if whole_machine and can_drop_whole_machine() else "fadvise"


def can_drop_whole_machine() -> bool:
    return os.geteuid() == 0 and os.access(DROP_CACHES, os.W_OK)
