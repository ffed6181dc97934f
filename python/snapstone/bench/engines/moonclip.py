"""moonclip: a store of its own for each rank, in which a save in the background differs from the one before.

Its call returns when the tensors are copied. It syncs its files, directories and names. A store deletes old
checkpoints itself; as many stay as the measurement asks for. Ranks give it their local shards: it knows no DTensor.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from ..results import Option
from .engine import Engine, Pending, Setting

__all__ = ["Moonclip", "MoonclipRaw"]

_STATE = "extra/state"  # under this name it gives back what was saved as extra={"state": ...}
_ASYNC: Option = {"name": "async_save", "value": "True", "why": "the call copies, a thread compresses and writes"}
_STORES: Option = {
    "name": "world_size",
    "value": "1: a store per rank, of its local shards",
    "why": "only such stores save in the background; ranks that share one wait for each other's files",
}


class Moonclip(Engine):
    title = "moonclip, delta"
    distribution = "moonclip"
    module = "moonclip"
    options: ClassVar[tuple[Option, ...]] = (
        _ASYNC,
        _STORES,
        {"name": "compression_level", "value": "3", "why": "its default: differences to the last full save, by zstd"},
    )
    syncs = True
    compression_level: ClassVar[int] = 3

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self._stores: dict[Path, Any] = {}

    def save(self, state: Mapping[str, Any], directory: Path, step: int) -> Pending | None:
        from ..optimizer import local

        directory.mkdir(exist_ok=True)  # stands for the step; the bytes are in the stores beside it
        store = self._store(directory.parent)
        store.save(step=step, extra={"state": {name: local(tensor) for name, tensor in state.items()}})
        return Pending(wait=store.flush)

    def load(self, state: dict[str, Any], directory: Path) -> None:
        from ..optimizer import local

        store = self._store(directory.parent)
        for name, tensor in store.load(_snapshots(store)[_step_of(directory)])[_STATE].items():
            local(state[name]).copy_(tensor)

    def is_complete(self, directory: Path) -> bool:
        """Whether the stores of all ranks have the step: each opens its own, which undoes what a crash left half."""
        import torch
        import torch.distributed as dist

        has = torch.tensor(int(_step_of(directory) in _snapshots(self._store(directory.parent))))
        dist.all_reduce(has, dist.ReduceOp.MIN, self.setting.group)
        return bool(has)

    def close(self) -> None:
        self._stores.clear()

    def _store(self, root: Path) -> Any:
        from moonclip import CheckpointManager

        if root not in self._stores:
            self._stores[root] = CheckpointManager(
                str(root / "moonclip" / f"rank-{self.setting.rank:05d}"),
                compression_level=self.compression_level,
                world_size=1,
                rank=0,
                max_total_snapshots=self.setting.keep,
            )
        return self._stores[root]


class MoonclipRaw(Moonclip):
    title = "moonclip, uncompressed"
    options: ClassVar[tuple[Option, ...]] = (
        _ASYNC,
        _STORES,
        {"name": "compression_level", "value": "0", "why": "writes sooner what zstd hardly shrinks"},
    )
    compression_level: ClassVar[int] = 0


def _step_of(directory: Path) -> int:
    return int(directory.name.rpartition("-")[2])


def _snapshots(store: Any) -> dict[int, str]:
    return {snapshot["step"]: snapshot["id"] for snapshot in store.list_snapshots()}
