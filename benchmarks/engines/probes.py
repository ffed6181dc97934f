"""The limit: the raw probe of this repository, and fio beside it as a second opinion."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

from states import State, nbytes_of

from engines.contestant import Contestant, Saved, Setting

__all__ = ["DiskLimit", "Fio"]

BLOCK_BYTES = 1 << 20
QUEUE_DEPTH = 64


def _run(command: list[str], **environment: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment}, check=False)
    if done.returncode != 0:
        reason = (done.stderr.strip() or done.stdout.strip()).splitlines()
        raise RuntimeError(f"{Path(command[0]).name}: {reason[-1] if reason else f'exit status {done.returncode}'}")
    return done.stdout


class _Probe(Contestant):
    is_probe: ClassVar[bool] = True

    def __init__(self, setting: Setting) -> None:
        self.setting = setting

    def save(self, state: State, directory: Path, during: Callable[[], None] | None = None) -> Saved:
        directory.mkdir()
        return Saved(self.transfer(directory / "probe", "write", nbytes_of(state)), None)

    def load(self, target: State, directory: Path) -> float:
        return self.transfer(directory / "probe", "read", nbytes_of(target))

    def transfer(self, path: Path, direction: str, nbytes: int) -> float:
        """Seconds for `nbytes`, scaled down from the whole blocks that a probe moves."""
        raise NotImplementedError


class DiskLimit(_Probe):
    label = "limit: raw io_uring probe"
    family = "limit"

    def unavailable(self) -> str | None:
        return None if self.setting.disk_limit else self.setting.disk_limit_missing

    def transfer(self, path: Path, direction: str, nbytes: int) -> float:
        assert self.setting.disk_limit is not None
        seconds = float(_run([self.setting.disk_limit, str(path), direction, str(nbytes)]))
        return seconds * nbytes / (-(-nbytes // BLOCK_BYTES) * BLOCK_BYTES)


class Fio(_Probe):
    label = "fio, io_uring 1 MiB x 64"
    family = "fio"

    def unavailable(self) -> str | None:
        return None if shutil.which("fio") else "fio is not installed"

    def transfer(self, path: Path, direction: str, nbytes: int) -> float:
        options: dict[str, Any] = {
            "name": "limit",
            "filename": path,
            "rw": direction,
            "size": -(-nbytes // BLOCK_BYTES) * BLOCK_BYTES,
            "bs": BLOCK_BYTES,
            "iodepth": QUEUE_DEPTH,
            "ioengine": "io_uring",
            "direct": 1,
            "fallocate": "native",
            "end_fsync": int(direction == "write"),
            "invalidate": 0,
            "output-format": "json",
        }
        # malloc then asks for huge pages (glibc 2.35), which is what the probe and snapstone use.
        text = _run(
            ["fio", *(f"--{key}={value}" for key, value in options.items())], GLIBC_TUNABLES="glibc.malloc.hugetlb=1"
        )
        done = json.loads(text[text.index("{") :])["jobs"][0][direction]
        milliseconds = max(done["runtime"], 1)  # whole milliseconds, to the end of the sync
        return float(milliseconds / 1e3 * nbytes / done["io_bytes"])
