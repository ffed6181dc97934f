"""Orphans: memory that a job may still use though nobody waits for it any more.

A job that failed or was cancelled may have left requests with the kernel, or copies with a device, that end later or
never. What they read or write must not be freed before: leaking memory is better than sharing it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

__all__ = ["let_go", "sweep"]


class _Orphan:
    """Equal to itself alone."""

    def __init__(self, job: Any, memory: Any, is_free: Callable[[Any], bool]) -> None:
        self.job = job
        self.memory = memory
        self.is_free = is_free


# Changed one by one, each time in one step: jobs end on several threads, some in the middle of a garbage collection.
_orphans: set[_Orphan] = set()


def let_go(job: Any, memory: Any, is_free: Callable[[Any], bool], seconds: float) -> None:
    """Keeps `memory`, which `job` uses, alive until `is_free(job)`, which raises nothing; waits so many seconds for
    the job's end.
    """
    _orphans.add(_Orphan(job, memory, is_free))  # before the wait, which Ctrl-C may end
    job.wait(seconds)
    sweep()


def sweep() -> None:
    """Lets go of what is free by now."""
    for orphan in list(_orphans):
        if orphan.is_free(orphan.job):
            _orphans.discard(orphan)
