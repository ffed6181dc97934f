"""The files of a DeepSpeed checkpoint as one checkpoint of the engine, and back.

    files.NAME.PLACE    the tensors of file NAME, under the names of their places in it
    deepspeed.NAME      the rest of that file as a text (see `packing`), of the rank that saved it
    rng                 the random generators of each rank, as such a text

NAME is the path of the file within the directory of its tag.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any

import torch

import snapstone as ss

from ...errors import CorruptCheckpointError, IncompatibleCheckpointError
from ..packing import pack, unpack

__all__ = ["FOLDER", "Collected", "Files"]

FOLDER = "snapstone"  # within the directory of a tag
_TENSORS = "files"
_TEXTS = "deepspeed"
_RNG = "rng"
_EMBED_BYTES = 1 << 20


class Collected:
    """What one rank saves. Values are taken when they are added; tensors are the caller's own until the save begins."""

    def __init__(self) -> None:
        self._tensors: dict[str, dict[str, torch.Tensor]] = {}
        self._texts: dict[str, str] = {}

    def add(self, name: str, content: Mapping[str, Any]) -> None:
        """
        Raises:
            TypeError, ValueError: a value that cannot be stored, by its place; a name of a file elsewhere.
        """
        if not _is_inside(name):
            raise ValueError(f"{name}: not within the directory of the tag")
        packed = pack(content)
        self._tensors[name] = packed.tensors
        self._texts[name] = packed.text

    def state(self, generators: Mapping[str, Any] | None) -> dict[str, Any]:
        """
        Args:
            generators: from `capture_rng`.
        """
        state: dict[str, Any] = {_TENSORS: self._tensors, _TEXTS: self._texts}
        if generators is not None:
            state[_RNG] = pack({_RNG: generators}, embed_bytes=_EMBED_BYTES).text
        return state


class Files:
    """The files of a committed checkpoint.

    Args:
        directory: of the tag.

    Raises:
        CheckpointError: as from `snapstone.load`.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self.directory = os.path.abspath(os.fspath(directory))
        self._opened = ss.Checkpoint.open(os.path.join(self.directory, FOLDER))

    @property
    def save_id(self) -> str:
        return self._opened.save_id

    @property
    def world_size(self) -> int:
        return self._opened.world_size

    def names(self) -> Iterator[str]:
        """Each once, whichever rank saved it.

        Raises:
            CorruptCheckpointError: a name of a file elsewhere.
        """
        head = f"{_TEXTS}."
        for key in dict.fromkeys(key for rank in range(self.world_size) for key in self._opened.objects(rank)):
            if key.startswith(head):
                name = key.removeprefix(head)
                if not _is_inside(name):
                    raise CorruptCheckpointError(f"{name!r} is no name of a file in it", path=self._opened.path)
                yield name

    def load(
        self, name: str, *, rank: int = 0, weights_only: bool = True, device: str | torch.device = "cpu"
    ) -> dict[str, Any]:
        """What the file of that name would hold.

        Args:
            rank: where to look for it first.
            weights_only: refuse values that need pickle, but for classes that torch.serialization has been told of.

        Raises:
            CheckpointError: as from `snapstone.load`. IncompatibleCheckpointError: there is no such file; a value that
                needs weights_only=False.
        """
        ranks = dict.fromkeys((rank, 0, *range(self.world_size)))
        found = (self._opened.objects(one).get(f"{_TEXTS}.{name}") for one in ranks if one < self.world_size)
        text = next((one for one in found if isinstance(one, str)), None)
        if text is None:
            raise IncompatibleCheckpointError(f"holds no {name}", path=self._opened.path)
        head = f"{_TENSORS}.{name}."
        wanted = [key for key in self._opened.keys() if key.startswith(head)]  # noqa: SIM118 # no dict
        tensors = self._opened.load_tensors(wanted)
        named = {key.removeprefix(head): tensor.to(device) for key, tensor in tensors.items()}
        return unpack(text, named, weights_only=weights_only)

    def generators(self, rank: int, world_size: int) -> Mapping[str, Any] | None:
        """For `restore_rng`: those of `rank`, or of rank 0 when another number of ranks saved them."""
        text = self._opened.objects(rank if world_size == self.world_size else 0).get(_RNG)
        if not isinstance(text, str):
            return None
        generators: Mapping[str, Any] = unpack(text, {})[_RNG]
        return generators


def _is_inside(name: str) -> bool:
    """Whether that is a file in the directory of the tag, and not in the checkpoint's own."""
    parts = name.split("/")
    return name == os.path.normpath(name) and not name.startswith("/") and parts[0] not in ("", ".", "..", FOLDER)
