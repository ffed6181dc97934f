"""File systems of every kind, mounted for one test and gone with it. What this machine cannot mount is skipped.

`mounted(kind, directory)` gives a `Mount` with an empty directory to save into. Root is needed, and for those in
`IMAGES` a loop device and the program that makes them.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from lacking import skip_without

MIB = 1 << 20
# Program, and bytes of an image that it takes (sparse, so that they cost nothing).
IMAGES = {
    "ext4": (["mkfs.ext4", "-qF"], 128 * MIB),
    "ext4 without a journal": (["mkfs.ext4", "-qF", "-O", "^has_journal"], 128 * MIB),
    "ext4 of 1 KiB blocks": (["mkfs.ext4", "-qF", "-b", "1024"], 128 * MIB),
    "xfs": (["mkfs.xfs", "-qf"], 320 * MIB),
    "btrfs": (["mkfs.btrfs", "-qf"], 512 * MIB),
    "vfat": (["mkfs.vfat", "-F", "32"], 128 * MIB),
    "exfat": (["mkfs.exfat"], 128 * MIB),
}
OPTIONS = {
    "btrfs compressed": ("btrfs", "compress-force=zstd"),
    "ext4 with its journal of data": ("ext4", "data=journal"),
}


@dataclass(frozen=True)
class Mount:
    path: Path  # to save into
    point: Path

    def make_read_only(self) -> None:
        _run("mount", "-o", "remount,ro", str(self.point))

    def make_writable(self) -> None:
        _run("mount", "-o", "remount,rw", str(self.point))


@contextmanager
def mounted(kind: str, directory: Path) -> Iterator[Mount]:
    """`directory` is an empty one on disk, for the mount point and the image."""
    if os.geteuid() != 0:
        skip_without("mounts", "mounting needs root")
    point = directory / "mount"
    point.mkdir()
    try:
        _mount(kind, directory, point)
        saves = point / "saves"
        saves.mkdir()
        yield Mount(saves, point)
    finally:
        with suppress(subprocess.CalledProcessError, FileNotFoundError):
            _run("umount", "--lazy", str(point))


def _mount(kind: str, directory: Path, point: Path) -> None:
    kind, options = OPTIONS.get(kind, (kind, ""))
    image = _program_and_size(kind)
    try:
        if kind in ("tmpfs", "ramfs"):
            _run("mount", "-t", kind, "-o", "size=256m", "none", str(point))
        elif kind == "overlayfs":
            layers = {name: directory / name for name in ("lower", "upper", "work")}
            for layer in layers.values():
                layer.mkdir()
            listed = ",".join(f"{name}dir={layer}" for name, layer in layers.items())
            _run("mount", "-t", "overlay", "overlay", "-o", listed, str(point))
        elif image:
            command, nbytes = image
            path = directory / "image"
            with path.open("wb") as file:
                file.truncate(nbytes)
            _run(*command, str(path))
            _run("mount", "-o", ",".join(filter(None, ("loop", options))), str(path), str(point))
    except subprocess.CalledProcessError as error:
        skip_without("mounts", f"{kind} cannot be mounted here: {error.stderr.strip()}")


def _program_and_size(kind: str) -> tuple[list[str], int] | None:
    if kind not in IMAGES:
        return None
    (program, *arguments), nbytes = IMAGES[kind]
    found = shutil.which(program, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
    thing = "fat" if "fat" in kind else "mounts"
    if found is None:
        skip_without(thing, f"{program} is not installed")
    if kind.split()[0] not in _file_systems_of_the_kernel():
        skip_without(thing, f"the kernel has no {kind}")
    return [found, *arguments], nbytes


@cache
def _file_systems_of_the_kernel() -> frozenset[str]:
    lines = Path("/proc/filesystems").read_text(encoding="ascii").splitlines()
    return frozenset(line.split()[-1] for line in lines)


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=60)
