"""What a result must say about where it was measured, without names of hosts, users or paths."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
from pathlib import Path
from typing import Any

import torch

__all__ = ["cpu_slug", "facts", "file_system", "memory_available_bytes", "touch_free_memory", "version_of"]


def _proc_field(path: str, field: str, default: str) -> str:
    for line in Path(path).read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() == field:
            return value.strip()
    return default


def cpu_model() -> str:
    return _proc_field("/proc/cpuinfo", "model name", platform.machine())


def cpu_slug() -> str:
    return re.sub(r"[^a-z0-9]+", "-", cpu_model().lower()).strip("-")


def _memory_bytes(field: str) -> int:
    return int(_proc_field("/proc/meminfo", field, "0 kB").split()[0]) * 1024


def memory_available_bytes() -> int:
    return _memory_bytes("MemAvailable")


def touch_free_memory(nbytes: int) -> None:
    """Writes to so much free memory, which the next allocations then get.

    Hypervisors take free pages back after seconds and give them out again at several times the cost of a page that the
    machine has; without this the engine that runs after a pause pays for it.
    """
    spare_bytes = max(memory_available_bytes() - (1 << 30), 0)
    torch.empty(min(nbytes, spare_bytes), dtype=torch.uint8).fill_(1)


def file_system(directory: Path) -> str:
    """Type and device kind: "ext4 on virtio_blk", "xfs on SAMSUNG MZ..., "tmpfs"."""
    device = os.stat(directory).st_dev
    wanted = f"{os.major(device)}:{os.minor(device)}"
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields = line.split()
        if fields[2] == wanted:
            name = fields[fields.index("-") + 1]
            hardware = _device_kind(wanted)
            return f"{name} on {hardware}" if hardware else name
    return "unknown"


def _device_kind(numbers: str) -> str:
    block = Path("/sys/dev/block") / numbers
    if not block.exists():
        return ""  # tmpfs, overlay, network
    block = block.resolve()
    if (block / "partition").exists():
        block = block.parent
    model = block / "device" / "model"
    if model.exists():
        return model.read_text().strip()
    driver = block / "device" / "driver"
    return driver.resolve().name if driver.exists() else block.name


def version_of(distribution: str) -> str | None:
    """The installed version, or None."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def facts() -> dict[str, Any]:
    return {
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(_memory_bytes("MemTotal") / 2**30, 1),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
