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

__all__ = ["heed_unchanged", "owned_unchanged"]


def owned_unchanged(
    contents: Iterable[StoredTensor],
    paths: Mapping[str, LeafPath],
    before: Before | None,
    step: int | None,
    digests: Any,
) -> bool | None:
    """Whether this rank's part of the optimizers' state is what it was at an earlier step; None if it cannot tell.

    `digests` (16 bytes): of each chunk of this save, whose data file has `contents`.
    """
    if before is None or before.step is None or step is None or before.step >= step:
        return None
    return _all_same(contents, _owned_names(paths), before, digests)


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


def _all_same(contents: Iterable[StoredTensor], owned: set[str], before: Before, digests: Any) -> bool | None:
    """Whether all chunks with owned tensors have the digests that they had; None if there is nothing to compare.

    Chunks that owned tensors share with others count only where there are no others.
    """
    whole = np.zeros(len(digests), bool)
    mixed = np.zeros(len(digests), bool)
    for item, _, place, *_ in contents:
        (whole if item.name in owned else mixed)[place.first_chunk : place.first_chunk + place.chunk_count] = True
    compared = whole & ~mixed if (whole & ~mixed).any() else whole
    if not compared.any() or not before.known[compared].all():
        return None
    return bool((before.digests[compared] == digests[compared]).all())
