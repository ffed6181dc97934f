"""What checkpoints take on a disk, each file counted once however many names it has. Reads no file."""

from __future__ import annotations

import os
import stat
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

__all__ = ["DirectoryUse", "RunUse", "use_of"]

_BASE_NAME = "base"  # the directory of shared files in a checkpoint
_BLOCK_BYTES = 512  # the unit of st_blocks, whatever the file system's


@dataclass(frozen=True, slots=True)
class DirectoryUse:
    """Of one directory. `freed_bytes`: what removing it alone would free, because nothing else has a name for it."""

    path: str
    own_bytes: int
    shared_bytes: int  # in `base`
    freed_bytes: int


@dataclass(frozen=True, slots=True)
class RunUse:
    """`total_bytes` counts each file once; the sum of all own and shared bytes is what separate files would take."""

    directories: list[DirectoryUse]
    total_bytes: int


class _Found(NamedTuple):
    identity: tuple[int, int]  # device and inode
    nbytes: int
    links: int  # names that the file has anywhere
    is_shared: bool


def use_of(paths: Iterable[str]) -> RunUse:
    """What these directories take together. What is removed meanwhile is left out; OSError for what is not allowed."""
    directories = []
    everything: dict[tuple[int, int], int] = {}
    for path in paths:
        found = list(_walk(path))
        own = {one.identity: one.nbytes for one in found if not one.is_shared}
        shared = {one.identity: one.nbytes for one in found if one.is_shared and one.identity not in own}
        names = Counter(one.identity for one in found)
        only_here = {one.identity: one.nbytes for one in found if names[one.identity] >= one.links}
        directories.append(DirectoryUse(path, sum(own.values()), sum(shared.values()), sum(only_here.values())))
        everything |= own | shared
    return RunUse(directories, sum(everything.values()))


def _walk(path: str) -> Iterator[_Found]:
    """The directory and all below it; links are counted and not followed."""
    base = os.path.join(path, _BASE_NAME)
    pending = [path]
    while pending:
        directory = pending.pop()
        is_shared = directory == base
        try:
            yield _found(os.lstat(directory), False)
            with os.scandir(directory) as entries:
                for entry in entries:
                    if entry.is_dir(follow_symlinks=False):
                        pending.append(entry.path)
                    else:
                        yield _found(os.lstat(entry.path), is_shared)
        except FileNotFoundError:
            continue


def _found(facts: os.stat_result, is_shared: bool) -> _Found:
    # A directory's links are its own subdirectories.
    links = 1 if stat.S_ISDIR(facts.st_mode) else facts.st_nlink
    return _Found((facts.st_dev, facts.st_ino), facts.st_blocks * _BLOCK_BYTES, links, is_shared)
