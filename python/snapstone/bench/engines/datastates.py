"""DataStates-LLM: copies tensors to a pinned ring in host memory beside the training, and writes them from there.

Ranks give it their local shards, a file each. It syncs nothing, and leaves no mark: a checkpoint is known to be whole
when nobody was killed, and taken for whole here when all files are there.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from ..results import Option
from .engine import Engine, Pending, Setting

__all__ = ["DataStates"]

_RING_SPARE_BYTES = 64 << 20


class DataStates(Engine):
    title = "DataStates-LLM save"
    distribution = "datastates"
    module = "datastates"
    options: ClassVar[tuple[Option, ...]] = (
        {"name": "one file per rank", "value": "of its shards", "why": "ranks write side by side"},
        {
            "name": "host_cache_size",
            "value": "what the rank holds, and 64 MiB",
            "why": "the fence then waits for a copy in memory and not for the disk; others keep such a copy too",
        },
    )
    syncs = False
    needs_cuda = True

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        from datastates import CheckpointEngine

        gibibytes = (setting.nbytes_of_rank + _RING_SPARE_BYTES) / 2**30
        self._engine: Any = CheckpointEngine({"host_cache_size": gibibytes}, setting.rank)

    def save(self, state: Mapping[str, Any], directory: Path, step: int) -> Pending | None:
        from ..optimizer import local

        directory.mkdir(exist_ok=True)
        self._engine.save({name: local(one) for name, one in state.items()}, str(self._path(directory)))
        return Pending(fence=self._engine.wait, wait=lambda: self._engine.wait(persist=True))

    def load(self, state: dict[str, Any], directory: Path) -> None:
        from ..optimizer import local

        for name, found in self._engine.load(str(self._path(directory))).items():
            local(state[name]).copy_(found)

    def is_complete(self, directory: Path) -> bool:
        return len(list(directory.glob("rank-*.pt"))) == self.setting.world

    def _path(self, directory: Path) -> Path:
        return directory / f"rank-{self.setting.rank:05d}.pt"
