"""Lineage: whose bytes a checkpoint consists of. Those that its own save wrote, and those of earlier saves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from . import index, manifest
from .index import CHUNK_DTYPE, Index
from .manifest import Manifest

__all__ = ["Ancestor", "Change", "ancestors", "change"]

_CARRIED_SUFFIX = ".carried.data"


@dataclass(frozen=True, slots=True)
class Ancestor:
    """An earlier save: how many of its data files a checkpoint links, how large they are, and how much of them its
    records use, padding included. `save_id` is None for files whose names do not say it.
    """

    save_id: str | None
    files: int
    nbytes: int
    used_bytes: int

    @property
    def live_fraction(self) -> float:
        return self.used_bytes / self.nbytes if self.nbytes else 1.0


@dataclass(frozen=True, slots=True)
class Change:
    """What a save wrote because its base did not have it, in bytes of tensors (before any codec), each place once.

    `by_tensor`: of each tensor, how many of its bytes lie in chunks that were written.
    """

    changed_bytes: int
    nbytes: int  # changed or not
    by_tensor: dict[str, int]

    @property
    def tensors(self) -> int:
        return sum(map(bool, self.by_tensor.values()))

    @property
    def share(self) -> float:
        return self.changed_bytes / self.nbytes if self.nbytes else 0.0


def ancestors(document: Manifest, indexes: Sequence[Index]) -> list[Ancestor]:
    """The saves whose files a checkpoint links, those first of which it uses most."""
    used: dict[str, list[Any]] = {entry.name: [] for entry in document.shared}
    for one in indexes:
        records = np.frombuffer(one.table, CHUNK_DTYPE)
        for number, name in enumerate(one.files):
            if name in used:
                used[name].append(records[records["file"] == number])
    found: dict[str | None, Ancestor] = {}
    for entry in document.shared:
        save_id = _origin(entry.name)
        # Two writers may use one place: what was one rank's is two ranks' after the world size changed.
        chunks = np.concatenate([np.empty(0, CHUNK_DTYPE), *used[entry.name]])
        _, first = np.unique(chunks["offset"], return_index=True)
        nbytes = int(index.padded(chunks["stored_bytes"][first]).sum())
        one_save = found.get(save_id, Ancestor(save_id, 0, 0, 0))
        found[save_id] = Ancestor(
            save_id, one_save.files + 1, one_save.nbytes + entry.nbytes, one_save.used_bytes + nbytes
        )
    return sorted(found.values(), key=lambda one: (-one.used_bytes, one.save_id or ""))


def _origin(name: str) -> str | None:
    try:
        return manifest.origin_of_shared(name)[0]
    except ValueError:
        return None


def change(indexes: Sequence[Index]) -> Change:
    """What differed from the base when the checkpoint was saved. Chunks carried over from shared files did not."""
    changed_bytes = nbytes = 0
    by_tensor: dict[str, int] = {}
    for one in indexes:
        records = np.frombuffer(one.table, CHUNK_DTYPE)[: len(one.table) // CHUNK_DTYPE.itemsize - one.references]
        is_written = np.array([_is_written(name) for name in one.files], bool)[records["file"]]
        _, first = np.unique(records.view(f"V{CHUNK_DTYPE.itemsize}"), return_index=True)
        raw = records["raw_bytes"].astype(np.int64)
        nbytes += int(raw[first].sum())
        changed_bytes += int(raw[first][is_written[first]].sum())
        ends = np.cumsum(raw)
        for stored in one.tensors:
            chunk, count, at = stored.place
            chunks = slice(chunk, chunk + count)
            begin = (ends[chunk] - raw[chunk] + at) if count else 0
            inside = np.minimum(ends[chunks], begin + stored.item.nbytes) - np.maximum(
                ends[chunks] - raw[chunks], begin
            )
            written = int(np.maximum(inside, 0)[is_written[chunks]].sum())
            by_tensor[stored.item.name] = by_tensor.get(stored.item.name, 0) + written
    return Change(changed_bytes, nbytes, by_tensor)


def _is_written(name: str) -> bool:
    return not name.startswith(f"{manifest.BASE_NAME}/") and not name.endswith(_CARRIED_SUFFIX)
