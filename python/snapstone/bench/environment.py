"""Where something was measured, without names of hosts or users: hardware, storage, software, world."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path

from .results import Environment, Hardware, Storage

__all__ = ["environment", "memory_available_bytes", "version_of"]


def environment(
    directory: str | os.PathLike[str],
    *,
    device: str = "cpu",
    ranks: int = 1,
    nodes: int = 1,
    backend: str | None = None,
) -> Environment:
    """The facts of this machine and of `directory`, which exists.

    Raises:
        OSError: the directory cannot be looked at.
    """
    import torch

    from .. import __version__

    return {
        "hardware": _hardware(device),
        "storage": _storage(directory),
        "software": {
            "python": platform.python_version(),
            "torch": str(torch.__version__),
            "snapstone": __version__,
            "kernel": f"{platform.release()} {platform.machine()}",
        },
        "world": {"ranks": ranks, "nodes": nodes, "backend": backend},
    }


def _hardware(device: str) -> Hardware:
    import torch

    return {
        "cpu": _field("/proc/cpuinfo", "model name") or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": _memory_bytes("MemTotal"),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "device": device,
    }


def _storage(directory: str | os.PathLike[str]) -> Storage:
    """Type of file system and kind of disk: ext4 and virtio_blk, xfs and a drive's model, tmpfs and nothing."""
    number = os.stat(directory).st_dev
    wanted = f"{os.major(number)}:{os.minor(number)}"
    file_system = "unknown"
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields = line.split()
        if fields[2] == wanted:
            file_system = fields[fields.index("-") + 1]
    return {"file_system": file_system, "device": _disk(wanted), "directory": os.path.abspath(directory)}


def _disk(numbers: str) -> str:
    block = Path("/sys/dev/block") / numbers
    if not block.exists():
        return ""  # tmpfs, overlay, network
    block = block.resolve()
    if (block / "partition").exists():
        block = block.parent
    try:
        return (block / "device" / "model").read_text().strip()
    except OSError:
        driver = block / "device" / "driver"
        return driver.resolve().name if driver.exists() else block.name


def memory_available_bytes() -> int:
    """What can be allocated without swapping: MemAvailable, or less where the control group allows less."""
    from .. import _native

    return _native.available_memory_bytes()


def version_of(distribution: str) -> str | None:
    """The installed version of a package, or None."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _memory_bytes(field: str) -> int:
    text = _field("/proc/meminfo", field)
    return int(text.split()[0]) * 1024 if text else 0


def _field(path: str, name: str) -> str | None:
    try:
        lines = Path(path).read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        found, _, value = line.partition(":")
        if found.strip() == name:
            return value.strip()
    return None
