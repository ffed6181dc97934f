"""Memory that the ranks of one node share while they load: one rank makes it, the others map it."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import uuid

import torch

from . import _native

__all__ = ["Segment", "node_name"]


def node_name() -> str:
    """Equal for ranks that can map each other's segments: one kernel and one process namespace, unless SNAPSTONE_NODE
    says otherwise.
    """
    name = os.environ.get("SNAPSTONE_NODE")
    return name or f"{_native.boot_id()}/{os.stat('/proc/self/ns/pid').st_ino}"


class Segment:
    """`nbytes` of shared memory without a name: it goes with the last process that maps it, however that ends.

    OSError where the kernel gives no memory, or another process's segment cannot be opened (other user, `hidepid`).
    """

    def __init__(self, descriptor: int, nbytes: int, path: str) -> None:
        self.path = path  # for `open` in other processes
        self._descriptor = descriptor
        self.nbytes = nbytes
        # All pages at once: faults one by one take longer than the copies (53 ms to 12 ms for 96 MiB on a VM).
        self._memory = mmap.mmap(descriptor, nbytes, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)
        self._export = ctypes.c_char.from_buffer(self._memory)
        self.address = ctypes.addressof(self._export)

    @classmethod
    def make(cls, nbytes: int) -> Segment:
        name = f"snapstone-load-{uuid.uuid4().hex}"
        descriptor = os.memfd_create(name, os.MFD_CLOEXEC)
        try:
            os.posix_fallocate(descriptor, 0, nbytes)  # now, not as SIGBUS when a page is first touched
            return cls(descriptor, nbytes, f"/proc/{os.getpid()}/fd/{descriptor} {name}")
        except OSError as error:
            os.close(descriptor)
            reason = f"{nbytes} bytes to share with other ranks: {error.strerror}; strategy='direct' needs none"
            raise OSError(error.errno, reason) from None
        except BaseException:
            os.close(descriptor)
            raise

    @classmethod
    def open(cls, path: str, nbytes: int) -> Segment:
        """`path` as `path` of the process that made it. OSError where that names something else here: then both are on
        different machines, whatever `node_name` says (clones of one virtual machine have equal boot ids).
        """
        place, _, name = path.partition(" ")
        if os.readlink(place) != f"/memfd:{name} (deleted)":
            raise OSError(errno.ESTALE, "not the segment that was made", place)
        descriptor = os.open(place, os.O_RDWR | os.O_CLOEXEC)
        try:
            return cls(descriptor, nbytes, path)
        except BaseException:
            os.close(descriptor)
            raise

    def tensor(self, at: int, nbytes: int) -> torch.Tensor:
        """uint8 [nbytes], a view."""
        return torch.frombuffer(self._memory, dtype=torch.uint8, count=nbytes, offset=at)

    def close(self) -> None:
        """The memory itself goes with the last view of it."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
