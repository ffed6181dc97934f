"""The machine of a run, for its document: `python -m on_device.facts DIRECTORY... RESULT.json`. Needs no snapstone.

A fact that cannot be had is its error, and none keeps the others from being written.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["gather", "graphics_card", "revision"]

ROOT = Path(__file__).resolve().parents[2]
_QUERIES = (
    "name,driver_version,memory.total,pcie.link.gen.max,pcie.link.width.max,clocks.max.sm,clocks.max.memory",
    "name,driver_version,memory.total",  # where one of the others is not known
)


def _said(command: list[str]) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, cwd=ROOT, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def graphics_card() -> dict[str, str] | None:
    """What nvidia-smi says of the first one."""
    for query in _QUERIES:
        said = _said(["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader", "--id=0"])
        if said:
            return dict(zip(query.split(","), map(str.strip, said.splitlines()[0].split(",")), strict=False))
    return None


def revision() -> str | None:
    """Of the tree, with "+" when files have changed; None without git."""
    found = _said(["git", "rev-parse", "--short=12", "HEAD"])
    return None if found is None else found + ("+" if _said(["git", "status", "--porcelain"]) else "")


def _torch() -> dict[str, Any]:
    import torch

    return {"version": str(torch.__version__), "cuda": torch.version.cuda, "device_found": torch.cuda.is_available()}


def _machine() -> dict[str, Any]:
    from machine import facts

    return facts()


def _place(directory: str) -> dict[str, Any]:
    from machine import file_system

    usage = shutil.disk_usage(directory)
    return {"file_system": file_system(Path(directory)), "free_bytes": usage.free, "total_bytes": usage.total}


def gather(directories: list[str]) -> dict[str, Any]:
    sources: dict[str, Callable[[], Any]] = {
        "graphics_card": graphics_card,
        "machine": _machine,
        "torch": _torch,
        "memory_lock_limit": lambda: resource.getrlimit(resource.RLIMIT_MEMLOCK)[0],
        "uid": os.geteuid,
        "compiler": lambda: (_said([os.environ.get("CXX", "c++"), "--version"]) or "").partition("\n")[0] or None,
        **{f"directory {number}": lambda path=path: _place(path) for number, path in enumerate(directories, 1)},
    }
    facts: dict[str, Any] = {}
    for name, source in sources.items():
        try:
            facts[name] = source()
        except Exception as error:
            facts[name] = f"{type(error).__name__}: {error}"
    return facts


if __name__ == "__main__":
    Path(sys.argv[-1]).write_text(json.dumps(gather(sys.argv[1:-1])))
