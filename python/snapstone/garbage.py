"""Python's cyclic garbage collector, held off while plans are made.

Planning 10,000 tensors creates some 100,000 small tuples that all stay alive; each full collection that this triggers
walks every object of the process (torch alone has about 500,000) and costs more than the planning.
"""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["paused"]

_lock = threading.Lock()
_holders = 0
_was_enabled = False


def _forget_in_child() -> None:
    """The threads that held it off did not come along into a forked process."""
    global _lock, _holders
    _lock = threading.Lock()
    if _holders and _was_enabled:
        gc.enable()
    _holders = 0


os.register_at_fork(after_in_child=_forget_in_child)


@contextmanager
def paused() -> Iterator[None]:
    """No automatic collection inside; the previous setting comes back when the last of nested or concurrent users
    leaves.
    """
    global _holders, _was_enabled
    with _lock:
        if _holders == 0:
            _was_enabled = gc.isenabled()
            gc.disable()
        _holders += 1
    try:
        yield
    finally:
        with _lock:
            _holders = max(0, _holders - 1)  # a child that was forked inside, and leaves, has none
            if _holders == 0 and _was_enabled:
                gc.enable()
