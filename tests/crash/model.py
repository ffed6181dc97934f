"""A file system that a crash leaves in any state that its callers' syncs have not ruled out.

What the model assumes, which is less than ext4, xfs and btrfs do:

- Bytes, size and reserved space of a file are durable when an fsync of that file has returned. Before that any of its
  512-byte sectors may be on the disk and any not, those that are not read as before or as zeros, and its size is any
  that it had.
- A name (of a new file or directory, a link, a removal, a rename) is durable when an fsync of its directory has
  returned. Before that each change may be on the disk or not, in any order, independent of other directories and of
  the bytes of the file; only changes of the same name keep their order. A rename and an exchange of two names are each
  one change; a rename from one directory into another is two, one in each.
- After an fsync of a file that failed, what was not durable then may be lost whatever later ones return. One of a
  directory makes nothing durable.
- With `clients`, an fsync of a directory makes durable what the calling process changed, and no other, and one of a
  file nothing while another process has not synced what it wrote: a network file system, where every rank is on a host
  of its own.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from crash import journal
from crash.journal import Op

__all__ = ["Contents", "Directory", "File", "Tree", "World"]

SECTOR = 512
Tree = Any  # of a directory: a tuple of (name, Tree), sorted; of a file: its Contents key, an int


class Change(NamedTuple):
    """Of names in one directory: all of them or none."""

    process: int
    names: tuple[tuple[str, int | None], ...]  # None: removed


@dataclass
class Directory:
    durable: dict[str, int] = field(default_factory=dict)
    live: dict[str, int] = field(default_factory=dict)
    pending: list[Change] = field(default_factory=list)

    def change(self, process: int, *names: tuple[str, int | None]) -> None:
        _apply(self.live, names)
        self.pending.append(Change(process, names))

    def sync(self, process: int | None) -> None:
        """Of changes by that process, and of what those rest on; None: of all."""
        wanted = [process is None or change.process == process for change in self.pending]
        kept = pulled(self.pending, wanted)
        for change, durable in zip(self.pending, kept, strict=True):
            if durable:
                _apply(self.durable, change.names)
        self.pending = [change for change, durable in zip(self.pending, kept, strict=True) if not durable]


def _apply(entries: dict[str, int], names: tuple[tuple[str, int | None], ...]) -> None:
    for name, number in names:
        if number is None:
            entries.pop(name, None)
        else:
            entries[name] = number


def pulled(pending: list[Change], wanted: list[bool]) -> list[bool]:
    """`wanted`, and every change before one of them that has a name in common with it."""
    kept, touched = list(wanted), set[str]()
    for number in range(len(pending) - 1, -1, -1):
        names = {name for name, _ in pending[number].names}
        if kept[number] or names & touched:
            kept[number] = True
            touched |= names
    return kept


@dataclass
class File:
    durable: bytes = b""
    live: bytearray = field(default_factory=bytearray)
    sizes: list[int] = field(default_factory=list)  # since it was durable
    lost: bool = False  # an fsync failed: `durable` is all that will ever be sure
    version: int = 0
    writers: set[int] = field(default_factory=set)  # processes that have not synced it since they wrote

    @property
    def pending(self) -> bool:
        return bool(self.sizes)

    def write(self, offset: int, data: bytes) -> None:
        end = offset + len(data)
        if end > len(self.live):
            self.live.extend(bytes(end - len(self.live)))
        self.live[offset:end] = data
        self.touched()

    def resize(self, nbytes: int, *, only_grow: bool) -> None:
        if nbytes > len(self.live):
            self.live.extend(bytes(nbytes - len(self.live)))
        elif not only_grow:
            del self.live[nbytes:]
        self.touched()

    def touched(self) -> None:
        self.sizes.append(len(self.live))
        self.version += 1

    def sync(self, error: int, process: int | None = None) -> None:
        """By that process; None: for all that wrote."""
        self.lost = self.lost or error != 0
        self.writers = set() if process is None else self.writers - {process}
        if not self.lost and not self.writers:
            self.durable, self.sizes = bytes(self.live), []
            self.version += 1

    def mixed(self, fresh: Any, nbytes: int) -> bytes:
        """`fresh` sectors (a mask of `sector_count`) as written, the others as they were; `nbytes` of them."""
        count = self.sector_count
        new, old = (np.zeros(count * SECTOR, np.uint8) for _ in range(2))
        new[: len(self.live)] = np.frombuffer(self.live, np.uint8)
        known = self.durable[: count * SECTOR]
        old[: len(known)] = np.frombuffer(known, np.uint8)
        both = np.where(np.asarray(fresh)[:, None], new.reshape(count, SECTOR), old.reshape(count, SECTOR))
        return both.tobytes()[:nbytes].ljust(nbytes, b"\0")

    @property
    def sector_count(self) -> int:
        return -(-max(len(self.live), len(self.durable), max(self.sizes, default=0)) // SECTOR)


class Contents:
    """Bytes of files, each once."""

    def __init__(self) -> None:
        self._numbers: dict[bytes, int] = {}
        self._data: list[bytes] = []

    def key(self, data: bytes) -> int:
        number = self._numbers.setdefault(data, len(self._data))
        if number == len(self._data):
            self._data.append(data)
        return number

    def __getitem__(self, number: int) -> bytes:
        return self._data[number]

    def __deepcopy__(self, memo: object) -> Contents:
        return self  # keys mean the same in copies of a world


class World:
    """The file system under one directory: as its callers see it, and what of it is durable."""

    def __init__(self, contents: Contents, *, clients: bool = False) -> None:
        self.contents = contents
        self.clients = clients
        self.directories: dict[int, Directory] = {}
        self.files: dict[int, File] = {}
        self.root = 0
        self._of_inode: dict[int, int] = {}  # a number is used again by some file systems
        self._next = 0
        self._whole: dict[int, tuple[int, int]] = {}

    @classmethod
    def of(cls, path: Path, contents: Contents, *, unsynced: Callable[[Path], bool], clients: bool = False) -> World:
        """All that stands there is durable, but for the bytes of files that `unsynced` names."""
        world = cls(contents, clients=clients)
        world.root = world._scan(path, unsynced)
        return world

    def _scan(self, path: Path, unsynced: Callable[[Path], bool]) -> int:
        inode = path.stat().st_ino
        if inode in self._of_inode:
            return self._of_inode[inode]
        number = self._new(inode)
        if path.is_dir():
            found = {name: self._scan(path / name, unsynced) for name in sorted(os.listdir(path))}
            self.directories[number] = Directory(dict(found), dict(found))
        else:
            file = self.files[number] = File()
            file.write(0, path.read_bytes())
            if not unsynced(path):
                file.sync(0)
        return number

    def _new(self, inode: int) -> int:
        self._next += 1
        self._of_inode[inode] = self._next
        return self._next

    def apply(self, op: Op) -> None:
        subject = self._of_inode.get(op.subject, -1)
        if op.kind in (journal.WRITE, journal.ALLOCATE, journal.TRUNCATE):
            self._change_file(self.files.get(subject), op)  # None: of a file without a name
        elif op.kind == journal.SYNC:
            if subject in self.files:
                self.files[subject].sync(op.error, op.process if self.clients else None)
            elif subject in self.directories and op.error == 0:
                self.directories[subject].sync(op.process if self.clients else None)
        elif subject in self.directories:
            self._change_names(self.directories[subject], op)

    def _change_file(self, file: File | None, op: Op) -> None:
        if file is None:
            return
        file.writers.add(op.process)
        if op.kind == journal.WRITE:
            file.write(op.offset, op.data)
        else:
            file.resize(op.offset, only_grow=op.kind == journal.ALLOCATE)

    def _change_names(self, directory: Directory, op: Op) -> None:
        live = directory.live
        if op.kind in (journal.CREATE, journal.MKDIR):
            number = self._new(op.object)
            if op.kind == journal.CREATE:
                self.files[number] = File()
                self.files[number].sync(0)
            else:
                self.directories[number] = Directory()
            directory.change(op.process, (op.name, number))
        elif op.kind == journal.LINK:
            directory.change(op.process, (op.other, self._of_inode[op.object]))
        elif op.kind in (journal.UNLINK, journal.RMDIR):
            directory.change(op.process, (op.name, None))
        elif op.kind == journal.RENAME and op.object:
            self.directories[self._of_inode[op.object]].change(op.process, (op.other, live[op.name]))
            directory.change(op.process, (op.name, None))
        elif op.kind == journal.RENAME:
            directory.change(op.process, (op.other, live[op.name]), (op.name, None))
        elif op.kind == journal.EXCHANGE:
            directory.change(op.process, (op.name, live[op.other]), (op.other, live[op.name]))

    def pending_changes(self) -> Iterator[tuple[int, Directory]]:
        return ((number, one) for number, one in self.directories.items() if one.pending)

    def pending_files(self) -> Iterator[tuple[int, File]]:
        return ((number, one) for number, one in self.files.items() if one.pending)

    def tree(self, kept: dict[int, list[bool]], bytes_of: dict[int, int]) -> Tree:
        """With those changes of names, and those contents of files that are not durable."""

        def of(number: int) -> Tree:
            if number in self.files:
                return bytes_of[number] if number in bytes_of else self._durable(number)
            directory = self.directories[number]
            entries = directory.durable
            if number in kept:
                entries = dict(entries)
                for change, there in zip(directory.pending, kept[number], strict=True):
                    if there:
                        _apply(entries, change.names)
            return tuple((name, of(entries[name])) for name in sorted(entries))

        return of(self.root)

    def live_tree(self) -> Tree:
        """As callers see it."""
        kept = {number: [True] * len(one.pending) for number, one in self.pending_changes()}
        return self.tree(kept, {number: self.contents.key(bytes(one.live)) for number, one in self.pending_files()})

    def _durable(self, number: int) -> int:
        file = self.files[number]
        version, key = self._whole.get(number, (-1, 0))
        if version != file.version:
            key = self.contents.key(file.durable)
            self._whole[number] = file.version, key
        return key
