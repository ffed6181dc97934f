"""What a machine, and one directory on it, can do for checkpoints: the facts that `snapstone doctor` shows."""

from __future__ import annotations

import os
import platform
import re
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["SPEED_TEST_BYTES", "facts_of", "speed_of"]

SPEED_TEST_BYTES = 256 << 20
_RUNGS = ("uring-fixed", "uring", "threads-direct", "buffered")
_UNLIMITED = (1 << 64) - 1


def facts_of(directory: str) -> dict[str, Any]:
    """Raises OSError when `directory` cannot be opened. Writes nothing but the engine's own probe files."""
    from .. import _native

    file_system = _native.file_system_facts(directory)
    refusals = {rung: _native.try_rung(directory, rung) for rung in _RUNGS}
    memlock = _native.memlock_limit_bytes()
    return {
        "directory": directory,
        "versions": _versions(),
        "cpus": len(os.sched_getaffinity(0)),
        "memory_available_bytes": _native.available_memory_bytes(),
        "memlock_limit_bytes": None if memlock == _UNLIMITED else memlock,
        "huge_pages": {
            "transparent": _transparent_huge_pages(),
            "reserved": _reserved_huge_pages(),
        },
        "cuda": _cuda(),
        "file_system": {key: value for key, value in file_system.items() if key != "device"},
        "io_uring": {"compiled_in": _native.uring_compiled_in(), **_usable(refusals["uring"])},
        "o_direct": _usable(refusals["threads-direct"]),
        "hard_links": _usable(_refusal(_native.try_hard_link, directory)),
        "reflinks": _usable(_refusal(_native.try_reflink, directory)),
        "rungs": [{"name": rung, **_usable(refusals[rung])} for rung in _RUNGS],
        "chosen": _chosen(directory),
    }


def _refusal(attempt: Callable[[str], None], directory: str) -> str:
    try:
        attempt(directory)
    except OSError as error:
        return str(error.strerror or error)
    return ""


def _usable(refusal: str) -> dict[str, Any]:
    return {"usable": not refusal, "reason": refusal or None}


def _chosen(directory: str) -> dict[str, Any]:
    from .. import _native

    forced = os.environ.get("SNAPSTONE_IO") or None
    try:
        rung, reasons = _native.choose_rung(directory)
    except OSError as error:
        return {"rung": None, "forced": forced, "passed_over": [str(error.strerror or error)]}
    return {"rung": rung, "forced": forced, "passed_over": reasons}


def _versions() -> dict[str, str]:
    import torch

    from .. import __version__

    return {
        "snapstone": __version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "kernel": f"{platform.release()} {platform.machine()}",
    }


def _cuda() -> dict[str, Any]:
    import torch

    from .. import _native

    return {**_native.cuda_facts(), "torch": torch.cuda.is_available()}


def _transparent_huge_pages() -> str | None:
    """ "always", "madvise" or "never": the word in brackets."""
    found = re.search(r"\[(\w+)\]", _text("/sys/kernel/mm/transparent_hugepage/enabled"))
    return found[1] if found else None


def _reserved_huge_pages() -> int | None:
    found = re.search(r"^HugePages_Total:\s+(\d+)", _text("/proc/meminfo"), re.MULTILINE)
    return int(found[1]) if found else None


def _text(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def speed_of(directory: str, free_bytes: int) -> dict[str, Any]:
    """One durable save and one verified load of 256 MiB of random bytes, in a directory that is removed again.

    Where the engine writes through the page cache, its pages are dropped before the load. A disk's own cache stays.
    Raises OSError when the directory takes no files.
    """
    if free_bytes < 2 * SPEED_TEST_BYTES:
        return {"nbytes": 0, "skipped": f"only {free_bytes} bytes are free"}
    import torch

    from .. import load, prepare, save

    prepare("cpu", SPEED_TEST_BYTES // 2)
    source = torch.empty(SPEED_TEST_BYTES // 8, dtype=torch.int64).random_()
    target = torch.zeros_like(source)
    parent = tempfile.mkdtemp(prefix=".snapstone-doctor-", dir=directory)
    try:
        path = os.path.join(parent, "speed")
        begin = time.monotonic()
        save({"bytes": source}, checkpoint_id=path, no_dist=True)
        written = time.monotonic()
        _drop_pages(path)
        opened = time.monotonic()
        load({"bytes": target}, checkpoint_id=path, no_dist=True)
        read = time.monotonic()
    finally:
        shutil.rmtree(parent, ignore_errors=True)
    return {
        "nbytes": SPEED_TEST_BYTES,
        "write_bytes_per_second": round(SPEED_TEST_BYTES / (written - begin)),
        "read_bytes_per_second": round(SPEED_TEST_BYTES / (read - opened)),
        "identical": bool(torch.equal(source, target)),
    }


def _drop_pages(path: str) -> None:
    for name in os.listdir(path):
        descriptor = os.open(os.path.join(path, name), os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)
