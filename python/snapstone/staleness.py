"""A guard against saving a stale copy: the step advanced, and no tensor that an optimizer owns has changed.

It compares digests that a save has anyway, with those of the base or of the save before. An optimizer's tensors are
found by the form of torch's optimizer state dictionaries: what stands under "state" beside "param_groups".
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from .base import Before
from .errors import CheckpointError
from .index import StoredTensor
from .state import LeafPath
from .structure import Structure

__all__ = ["heed_unchanged", "owned_unchanged"]


def owned_unchanged(
    structure: Structure, paths: Mapping[str, LeafPath], before: Before | None, step: int | None, digests: Any
) -> bool | None:
    """Whether this rank's part of the optimizers' state is what it was at an earlier step; None if it cannot tell.

    `digests` (16 bytes): of each chunk of this save.
    """
    if before is None or before.step is None or step is None or before.step >= step:
        return None
    if structure.owned_chunks is None:
        structure.owned_chunks = _chunks_of(structure.contents, _owned_names(paths), len(digests))
    owned = structure.owned_chunks
    if not owned.any() or not before.known[owned].all():
        return None
    return bool((before.digests[owned] == digests[owned]).all())


def heed_unchanged(found: Sequence[bool | None], on_unchanged: str, step: int | None, path: str, *, warn: bool) -> None:
    """Warns, or raises CheckpointError, if what all ranks found says that nothing has changed."""
    if on_unchanged == "ignore" or True not in found or False in found:
        return
    message = (
        f"step {step}: nothing that an optimizer owns has changed since an earlier step. Was a stale copy of the state "
        'saved? on_unchanged="ignore" if this is meant'
    )
    if on_unchanged == "raise":
        raise CheckpointError(message, path=path)
    if warn:
        warnings.warn(f"{path}: {message}", RuntimeWarning, stacklevel=2)


def _owned_names(paths: Mapping[str, LeafPath]) -> set[str]:
    """Names of the leaves that belong to an optimizer's state."""
    optimizers = {path[: path.index("param_groups")] for path in paths.values() if "param_groups" in path}
    return {
        name
        for name, path in paths.items()
        if "state" in path and any(path[at] == "state" and path[:at] in optimizers for at in range(len(path)))
    }


def _chunks_of(contents: Iterable[StoredTensor], owned: set[str], chunk_count: int) -> Any:
    """Which chunks (bool) tell of owned tensors: those with nothing else in them, or else those that they share."""
    holds = np.zeros(chunk_count, bool)
    mixed = np.zeros(chunk_count, bool)
    for item, _, place, *_ in contents:
        (holds if item.name in owned else mixed)[place.first_chunk : place.first_chunk + place.chunk_count] = True
    alone = holds & ~mixed
    return alone if alone.any() else holds
