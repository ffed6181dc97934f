"""The process group that a forked process has inherited: connections of its parent, in the name of its rank."""

from __future__ import annotations

import os
from typing import Any

import torch.distributed as dist

__all__ = ["refuse"]

_group: Any = None  # the default one at the fork


def _remember_in_child() -> None:
    global _group
    _group = dist.group.WORLD if dist.is_available() and dist.is_initialized() else None


os.register_at_fork(after_in_child=_remember_in_child)


def refuse() -> None:
    """ValueError in a forked process that has made no group of its own."""
    if _group is not None and dist.group.WORLD is _group:
        raise ValueError(
            "process_group: it belongs to the process that forked this one; pass no_dist=True to save or load alone"
        )
