"""A file system of its own in a file, mounted, and cut off from its device as a power cut would."""

from __future__ import annotations

import fcntl
import os
import shutil
import struct
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from durability.counted import count

__all__ = ["LoopMount", "mounted", "why_not"]

GOINGDOWN = 0x8004587D  # EXT4_IOC_SHUTDOWN and XFS_IOC_GOINGDOWN
NOLOGFLUSH = 2
IMAGE_BYTES = 512 << 20  # sparse; xfs takes no less than 300 MiB
# auto_da_alloc makes ext4 write the data of a file that takes another's name, which other file systems do not.
FILE_SYSTEMS = {"ext4": (["mkfs.ext4", "-qF"], "loop,noauto_da_alloc"), "xfs": (["mkfs.xfs", "-qf"], "loop")}
BUSY_S = 20.0


def why_not(file_system: str, scratch: Path) -> str:
    """Empty where it can be mounted and cut off; else the reason."""
    if os.geteuid() != 0:
        return "mounting needs root"
    program = FILE_SYSTEMS[file_system][0][0]
    if shutil.which(program) is None:
        return f"{program} is not installed"
    try:
        with mounted(file_system, scratch) as mount:
            mount.cut()
            mount.again()
    except (subprocess.CalledProcessError, OSError) as error:
        return f"{file_system} cannot be mounted and cut off here: {getattr(error, 'stderr', '') or error}"
    return ""


class LoopMount:
    def __init__(self, file_system: str, image: Path, path: Path) -> None:
        self._options = FILE_SYSTEMS[file_system][1]
        self._kind = file_system
        self._image = image
        self.path = path

    def mount(self) -> None:
        _run("mount", "-t", self._kind, "-o", self._options, str(self._image), str(self.path))

    def cut(self) -> None:
        """From here on nothing reaches the device: not the pages, not the log."""
        count("power cuts")
        descriptor = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.ioctl(descriptor, GOINGDOWN, struct.pack("I", NOLOGFLUSH))
        finally:
            os.close(descriptor)

    def unmount(self) -> None:
        """Waits for what a dead process had in flight."""
        end = time.monotonic() + BUSY_S
        while True:
            try:
                return _run("umount", str(self.path))
            except subprocess.CalledProcessError:
                if time.monotonic() > end:
                    raise
                time.sleep(0.05)

    def again(self) -> None:
        """The next start of the machine."""
        self.unmount()
        self.mount()


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=60)


@contextmanager
def mounted(file_system: str, scratch: Path) -> Iterator[LoopMount]:
    image, path = scratch / f"{file_system}.image", scratch / file_system
    path.mkdir()
    with image.open("wb") as file:
        file.truncate(IMAGE_BYTES)
    mount = LoopMount(file_system, image, path)
    try:
        _run(*FILE_SYSTEMS[file_system][0], str(image))
        mount.mount()
        yield mount
    finally:
        if os.path.ismount(path):
            try:
                mount.unmount()
            except subprocess.CalledProcessError:
                _run("umount", "-l", str(path))
        image.unlink()
        path.rmdir()
