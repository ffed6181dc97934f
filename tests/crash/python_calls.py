"""What Python code changes of a file system itself, for the journal: the real calls, each followed by its record."""

from __future__ import annotations

import builtins
import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from crash import journal
from crash.journal import CREATE, LINK, MKDIR, RENAME, RMDIR, TRUNCATE, UNLINK, WRITE
from snapstone import _native

__all__ = ["python_calls"]

_REMOVALS = {"rmdir": RMDIR, "unlink": UNLINK, "remove": UNLINK}


@contextmanager
def python_calls(path: Path) -> Iterator[None]:
    """What this thread does meanwhile goes to the journal at `path`, in its order among the calls of the engine.

    Bytes that a file object writes are recorded, as one write, before the next call that is.
    """
    calls = _Calls(path)
    try:
        with pytest.MonkeyPatch.context() as patched:
            for name in _REMOVALS:
                patched.setattr(os, name, calls.removal(name))
            for name in ("rename", "replace"):
                patched.setattr(os, name, calls.renaming(getattr(os, name)))
            patched.setattr(os, "mkdir", calls.mkdir(os.mkdir))
            patched.setattr(os, "link", calls.link(os.link))
            opened = calls.opening(builtins.open)
            patched.setattr(builtins, "open", opened)
            patched.setattr(io, "open", opened)
            patched.setattr(torch, "save", _through_open(torch.save))
            for name in ("sync_file", "sync_directory"):
                patched.setattr(_native, name, calls.after_writes(getattr(_native, name)))
            yield
            calls.record_writes()
    finally:
        calls.close()


class _Calls:
    def __init__(self, path: Path) -> None:
        self._journal = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self._written: dict[int, bytes] = {}  # by a descriptor of the file

    def close(self) -> None:
        for descriptor in (self._journal, *self._written):
            os.close(descriptor)

    def record_writes(self) -> None:
        for descriptor, known in self._written.items():
            data = os.pread(descriptor, os.fstat(descriptor).st_size, 0)
            if data != known:
                inode = os.fstat(descriptor).st_ino
                if len(data) < len(known):
                    self._record(TRUNCATE, inode, offset=len(data))
                self._record(WRITE, inode, data=data)
                self._written[descriptor] = data

    def _record(self, kind: int, subject: int, name: str = "", other: str = "", **more: Any) -> None:
        os.write(self._journal, journal.packed(kind, subject, name, other, **more))

    def after_writes(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def called(*arguments: Any, **options: Any) -> Any:
            self.record_writes()
            return function(*arguments, **options)

        return called

    def removal(self, function_name: str) -> Callable[..., None]:
        function: Callable[..., None] = getattr(os, function_name)

        def called(path: Any, *, dir_fd: int | None = None) -> None:
            self.record_writes()
            directory, name = _place(path, dir_fd)
            function(path, dir_fd=dir_fd)
            self._record(_REMOVALS[function_name], directory, name)

        return called

    def renaming(self, function: Callable[..., None]) -> Callable[..., None]:
        def called(source: Any, target: Any) -> None:
            self.record_writes()
            (directory, name), (into, other) = _place(source), _place(target)
            function(source, target)
            self._record(RENAME, directory, name, other, obj=0 if into == directory else into)

        return called

    def mkdir(self, function: Callable[..., None]) -> Callable[..., None]:
        def called(path: Any, mode: int = 0o777) -> None:
            self.record_writes()
            directory, name = _place(path)
            function(path, mode)
            self._record(MKDIR, directory, name, obj=os.stat(path).st_ino)

        return called

    def link(self, function: Callable[..., None]) -> Callable[..., None]:
        def called(source: Any, target: Any) -> None:
            self.record_writes()
            function(source, target)
            directory, name = _place(target)
            self._record(LINK, directory, other=name, obj=os.stat(target).st_ino)

        return called

    def opening(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def called(file: Any, mode: str = "r", *arguments: Any, **options: Any) -> Any:
            if isinstance(file, int) or not set(mode) & set("wxa+"):
                return function(file, mode, *arguments, **options)
            self.record_writes()
            known = b""
            is_new = not os.path.exists(file)
            if not is_new:
                with function(file, "rb") as before:
                    known = before.read()
            opened = function(file, mode, *arguments, **options)
            facts = os.fstat(opened.fileno())
            if is_new:
                directory, name = _place(file)
                self._record(CREATE, directory, name, obj=facts.st_ino)
            elif "w" in mode:
                known = b""
                self._record(TRUNCATE, facts.st_ino)
            self._written[os.open(file, os.O_RDONLY)] = known
            return opened

        return called


def _place(path: Any, dir_fd: int | None = None) -> tuple[int, str]:
    """Inode of the directory, and the name in it."""
    parent, name = os.path.split(os.fspath(path))
    facts = os.stat(os.path.abspath(parent)) if dir_fd is None else os.fstat(dir_fd)
    return facts.st_ino, name


def _through_open(save: Callable[..., None]) -> Callable[..., None]:
    """torch's own writer of a path is native."""

    def called(value: Any, file: Any) -> None:
        if isinstance(file, str | os.PathLike):
            with open(file, "wb") as opened:
                save(value, opened)
        else:
            save(value, file)

    return called
