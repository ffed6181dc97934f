"""torchsnapshot's async_take: returns when everything is staged, writes in a thread, syncs nothing.

Ranks give it their local shards: its own handling of sharded tensors is older than DTensor.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from ..results import Option
from .engine import Engine, Pending

__all__ = ["TorchSnapshot"]


class TorchSnapshot(Engine):
    title = "torchsnapshot async_take"
    distribution = "torchsnapshot"
    module = "torchsnapshot"
    options: ClassVar[tuple[Option, ...]] = (
        {"name": "async_take", "value": "local shards", "why": "the write runs behind training"},
    )
    syncs = False

    def save(self, state: Mapping[str, Any], directory: Path, step: int) -> Pending | None:
        from torchsnapshot import Snapshot, StateDict

        from ..optimizer import local

        app = {"app": StateDict(**{name: local(tensor) for name, tensor in state.items()})}
        pending: Any = Snapshot.async_take(str(directory), app, pg=self.setting.group)
        return Pending(wait=pending.wait)

    def load(self, state: dict[str, Any], directory: Path) -> None:
        from torchsnapshot import Snapshot, StateDict

        from ..optimizer import local

        app: Any = StateDict(**{name: local(tensor) for name, tensor in state.items()})
        Snapshot(str(directory), pg=self.setting.group).restore({"app": app})
        for name, tensor in state.items():
            if app[name].data_ptr() != local(tensor).data_ptr():
                local(tensor).copy_(app[name])

    def is_complete(self, directory: Path) -> bool:
        return (directory / ".snapshot_metadata").exists()  # written by rank 0 when all have written
