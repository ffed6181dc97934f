"""Ways to write and read a file as fast as a directory allows: fio, a probe of our own, and the engine's rungs.

Each writes `nbytes` into an empty directory, until they are durable, and reads them back, and says how many seconds
that took. None of them reads what the page cache has.
"""

from __future__ import annotations

import ctypes
import errno
import itertools
import json
import mmap
import os
import queue
import shutil
import signal
import subprocess
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Literal

__all__ = ["BLOCK_BYTES", "RUNGS", "DiskProbe", "Fio", "OwnProbe", "ProbeError", "Rung", "drop_pages", "remove"]

RUNGS = ("uring-fixed", "uring", "threads-direct", "buffered")  # best first
BLOCK_BYTES = 1 << 20  # of one request: a chunk of a checkpoint, unless set otherwise


class ProbeError(Exception):
    """A probe that could not do its work; the message says why."""


class DiskProbe(ABC):
    """One way. `rung` names the engine's way that it is like."""

    tool: ClassVar[Literal["fio", "probe", "snapstone"]]

    def __init__(self, rung: str, nbytes: int) -> None:
        self.rung = rung
        self.nbytes = nbytes

    def refusal(self, directory: str) -> str | None:
        """Why it does not work there."""
        from .. import _native

        return _native.try_rung(directory, self.rung) or None

    @abstractmethod
    def write(self, directory: str) -> float:
        """Seconds. Raises OSError or ProbeError."""

    @abstractmethod
    def read(self, directory: str) -> float:
        """Seconds for what `write` left there. Raises OSError or ProbeError."""


class Fio(DiskProbe):
    """One job of io_uring with O_DIRECT, with requests as large, and as many at once, as a lane of the engine has."""

    tool = "fio"

    def __init__(self, nbytes: int) -> None:
        super().__init__("uring", nbytes)

    def refusal(self, directory: str) -> str | None:
        if shutil.which("fio") is None:
            return "fio is not installed"
        return super().refusal(directory)

    def write(self, directory: str) -> float:
        return self._run(directory, "write")

    def read(self, directory: str) -> float:
        return self._run(directory, "read")

    def _run(self, directory: str, operation: Literal["write", "read"]) -> float:
        from .. import _native

        options = {
            "name": "limit",
            "filename": "fio.data",  # in the working directory: a colon in a path would divide it
            "rw": operation,
            "size": self.nbytes,
            "bs": BLOCK_BYTES,
            "iodepth": _native.QUEUE_DEPTH,
            "ioengine": "io_uring",
            "direct": 1,
            "fallocate": "native",
            "end_fsync": int(operation == "write"),
            "invalidate": 0,
            "output-format": "json",
        }
        # As a thread, so that no process outlives a killed fio. glibc (2.35) then takes huge pages, as the engine does.
        done = subprocess.run(
            ["fio", "--thread", *(f"--{key}={value}" for key, value in options.items())],
            cwd=directory,
            env={**os.environ, "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            lines = (done.stderr.strip() or done.stdout.strip()).splitlines()
            raise ProbeError(f"fio: {lines[-1] if lines else f'exit status {done.returncode}'}")
        return _seconds_of_fio(done.stdout, operation, self.nbytes)


def _seconds_of_fio(text: str, operation: str, nbytes: int) -> float:
    """From the JSON of one job, which may have warnings before it. fio counts whole milliseconds."""
    try:
        job: dict[str, Any] = json.loads(text[text.index("{") :])["jobs"][0]
        moved, milliseconds, error = job[operation]["io_bytes"], job[operation]["runtime"], job["error"]
    except (ValueError, KeyError, IndexError, TypeError) as reason:
        raise ProbeError(f"fio printed something else than its results: {reason}") from None
    if error:
        raise ProbeError(f"fio: {os.strerror(error)}")
    if moved != nbytes:
        raise ProbeError(f"fio moved {moved} bytes instead of {nbytes}")
    return max(int(milliseconds), 1) / 1e3


class OwnProbe(DiskProbe):
    """Blocking requests of as many threads as fio has requests in flight: with O_DIRECT, or, where there is none,
    through the page cache. The bytes are random and ready; nothing looks at those that are read.
    """

    tool = "probe"

    def write(self, directory: str) -> float:
        return self._transfer(directory, os.O_CREAT | os.O_EXCL | os.O_WRONLY, os.pwrite)

    def read(self, directory: str) -> float:
        drop_pages(directory)
        return self._transfer(directory, os.O_RDONLY, lambda file, slot, at: os.preadv(file, [slot], at))

    def _transfer(self, directory: str, flags: int, move: Callable[[int, memoryview, int], int]) -> float:
        flags |= os.O_CLOEXEC | (0 if self.rung == "buffered" else os.O_DIRECT)
        slots = _slots(min(self._depth(), self.nbytes // BLOCK_BYTES))
        begin = time.monotonic()
        file = os.open(os.path.join(directory, "probe.data"), flags, 0o600)
        try:
            if flags & os.O_WRONLY and self.rung != "buffered":
                _allocate(file, self.nbytes)
            _in_threads(file, slots, self.nbytes // BLOCK_BYTES, move)
            if flags & os.O_WRONLY:
                os.fsync(file)
        finally:
            os.close(file)
        return time.monotonic() - begin

    def _depth(self) -> int:
        from .. import _native

        return _native.QUEUE_DEPTH


def _slots(count: int) -> list[memoryview]:
    """Page-aligned, full of random bytes, and touched. The memory goes with the last of them."""
    memory = mmap.mmap(-1, count * BLOCK_BYTES)
    memory.madvise(mmap.MADV_HUGEPAGE)
    noise = os.urandom(BLOCK_BYTES)
    for slot in range(count):
        memory[slot * BLOCK_BYTES : (slot + 1) * BLOCK_BYTES] = noise[slot:] + noise[:slot]
    view = memoryview(memory)
    return [view[slot * BLOCK_BYTES : (slot + 1) * BLOCK_BYTES] for slot in range(count)]


def _allocate(file: int, nbytes: int) -> None:
    """As the engine does. Not os.posix_fallocate, which writes every block where a file system has no fallocate."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.fallocate(file, 0, ctypes.c_int64(0), ctypes.c_int64(nbytes)) != 0:
        number = ctypes.get_errno()
        if number not in (errno.EOPNOTSUPP, errno.ENOSYS):
            raise OSError(number, os.strerror(number))


def _in_threads(file: int, slots: list[memoryview], blocks: int, move: Callable[[int, memoryview, int], int]) -> None:
    """Moves every block once. The first error ends it, as does Ctrl-C; all threads have ended when this returns."""
    errors: list[OSError] = []
    order = itertools.count()  # next() of it is atomic
    ended: list[memoryview] = []
    told: queue.SimpleQueue[None] = queue.SimpleQueue()

    def work(slot: memoryview) -> None:
        while not errors and (block := next(order)) < blocks:
            try:
                if (moved := move(file, slot, block * BLOCK_BYTES)) != BLOCK_BYTES:
                    raise OSError(errno.EIO, f"a request moved {moved} bytes instead of {BLOCK_BYTES}")
            except OSError as error:
                errors.append(error)
        ended.append(slot)
        told.put(None)

    started: list[memoryview] = []

    # Not Thread.join: one that Ctrl-C interrupts takes the thread for ended (python/cpython#90882).
    def wait() -> None:
        while len(ended) < len(started):
            told.get()

    try:
        with interrupts_held():
            for slot in slots:
                threading.Thread(target=work, args=(slot,), daemon=True).start()
                started.append(slot)
        wait()
    except BaseException:
        errors.append(OSError(errno.EINTR, "interrupted"))
        wait()
        raise
    if errors:
        raise errors[0]


class Rung(DiskProbe):
    """A save and a verified load through one rung of the engine: with copy, digests, index and commit.

    Tensors of `nbytes` each: what is saved, and what it is loaded into.
    """

    tool = "snapstone"

    def __init__(self, rung: str, nbytes: int, source: Any, target: Any) -> None:
        super().__init__(rung, nbytes)
        self._source = source
        self._target = target

    def write(self, directory: str) -> float:
        from .. import save

        with self._chosen():
            begin = time.monotonic()
            save({"bytes": self._source}, checkpoint_id=os.path.join(directory, "checkpoint"), no_dist=True)
            return time.monotonic() - begin

    def read(self, directory: str) -> float:
        import torch

        from .. import load

        path = os.path.join(directory, "checkpoint")
        drop_pages(path)
        self._target.zero_()
        with self._chosen():
            begin = time.monotonic()
            load({"bytes": self._target}, checkpoint_id=path, no_dist=True)
            seconds = time.monotonic() - begin
        if not torch.equal(self._source, self._target):
            raise ProbeError("what was loaded is not what was saved")
        return seconds

    @contextmanager
    def _chosen(self) -> Iterator[None]:
        before = os.environ.get("SNAPSTONE_IO")
        os.environ["SNAPSTONE_IO"] = self.rung
        try:
            yield
        finally:
            if before is None:
                del os.environ["SNAPSTONE_IO"]
            else:
                os.environ["SNAPSTONE_IO"] = before


def drop_pages(directory: str | os.PathLike[str]) -> None:
    """Asks the kernel to drop the cached pages of every file below, or of this one; those that are not on the disk yet
    stay.
    """
    for path in (Path(directory), *Path(directory).rglob("*")):
        if path.is_file() and not path.is_symlink():
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(descriptor)


@contextmanager
def interrupts_held() -> Iterator[None]:
    """Ctrl-C comes after the block. Threads that are started in it leave the signal to the others."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def remove(directory: str) -> None:
    """With all that is in it, as far as that works. Ctrl-C comes afterwards: amid shutil.rmtree it can turn into an
    OSError of a descriptor that is closed twice.
    """
    with interrupts_held():
        shutil.rmtree(directory, ignore_errors=True)
