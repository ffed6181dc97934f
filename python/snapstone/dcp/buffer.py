"""SharedBuffer: the host memory that a stager copies into, one segment that other processes can map.

Ownership: a staged tensor is a view of the segment and keeps it mapped. The pages belong to the buffer, which gives
           them back to the system in `free`, whoever still maps them.
Memory:    an anonymous file (memfd), not /dev/shm, which containers keep small. torch sends its descriptor to another
           process, once for all tensors of a state. All pages are there before the first copy: memory that the
           system cannot give is an error, not a signal in the middle of a copy.
Threads:   `unused` may be asked from any thread; the rest is one caller's at a time.
"""

from __future__ import annotations

import mmap
import os
from contextlib import suppress

import torch
from torch.cuda import _pin_memory_utils as pinning
from torch.multiprocessing import get_sharing_strategy

__all__ = ["SharedBuffer"]

_GRAIN_BYTES = 2 << 20  # a huge page


class SharedBuffer:
    def __init__(self) -> None:
        self._storage: torch.UntypedStorage | None = None
        self._pages: mmap.mmap | None = None
        self._own_count = 0
        self._pinned: int | None = None

    def __del__(self) -> None:
        with suppress(Exception):  # CUDA may be gone before us
            self._unpin()

    @property
    def nbytes(self) -> int:
        return 0 if self._storage is None else self._storage.nbytes()

    def unused(self) -> bool:
        """Whether no tensor of this process is a view of the buffer."""
        storage = self._storage
        return storage is None or torch._C._storage_Use_Count(storage._cdata) <= self._own_count

    def reserve(self, nbytes: int, *, pinned: bool = False) -> torch.UntypedStorage:
        """At least `nbytes`, with what was staged before still in them, or lost where the buffer had to grow.
        `pinned`: page-locked, for copies from a CUDA device.

        Raises:
            OSError: the system does not have the memory, or no descriptor.
        """
        if self._storage is None or self._storage.nbytes() < nbytes:
            self.free(release=True)
            self._allocate(max(1, -(-nbytes // _GRAIN_BYTES)) * _GRAIN_BYTES)
        assert self._storage is not None
        # The other sharing strategy of torch moves the memory when it is first sent, which must not be locked then.
        if pinned and self._pinned is None and get_sharing_strategy() == "file_descriptor":  # type: ignore[no-untyped-call]
            pinning.pin_memory(self._storage.data_ptr(), self._storage.nbytes())
            self._pinned = self._storage.data_ptr()
        return self._storage

    def _allocate(self, nbytes: int) -> None:
        descriptor = os.memfd_create("snapstone-staging")
        try:
            os.posix_fallocate(descriptor, 0, nbytes)
            self._pages = mmap.mmap(descriptor, nbytes)
            self._storage = torch.UntypedStorage._new_shared_fd_cpu(descriptor, nbytes)  # type: ignore[attr-defined]
        except OSError as error:
            raise OSError(
                error.errno, f"{nbytes} bytes of memory to stage in: {os.strerror(error.errno or 0)}"
            ) from None
        finally:
            os.close(descriptor)
        self._own_count = torch._C._storage_Use_Count(self._storage._cdata)

    def free(self, *, release: bool) -> None:
        """Lets go of the segment. `release`: nobody reads what is staged in it any more. A process that was sent the
        state maps the segment until its next request, and a failed save's traceback may too: they keep no memory.
        """
        self._unpin()
        self._storage = None
        pages, self._pages = self._pages, None
        if pages is not None:
            if release:
                pages.madvise(mmap.MADV_REMOVE)
            pages.close()

    def _unpin(self) -> None:
        address, self._pinned = self._pinned, None
        if address is not None:
            pinning.unpin_memory(address)
