"""LoadStrategy: what `dist_checkpointing.load` reads through."""

from __future__ import annotations

import os
from typing import Any

from megatron.core.dist_checkpointing.strategies.torch import TorchDistLoadShardedStrategy

from ... import Checkpoint, save
from .common import check_common
from .layout import check_one_of_both, engine_path, holds_checkpoint
from .reader import allowing_pickle, engine_readers
from .sharded import OBJECTS

__all__ = ["LoadStrategy", "set_allow_pickle"]

_allow_by_default = False


def set_allow_pickle(allowed: bool) -> None:
    """For strategies that are made without: Megatron-LM makes its own."""
    global _allow_by_default
    _allow_by_default = allowed


class LoadStrategy(TorchDistLoadShardedStrategy):  # type: ignore[misc]
    """Reads a checkpoint of SaveStrategy at any layout: only the chunks that this rank needs, verified. A stock
    `torch_dist` checkpoint is read as before the switch, by Megatron-core itself.

    Args:
        allow_pickle: load sharded objects that `torch.load` refuses with `weights_only=True`, to which Megatron-core
            adds its own classes. They can run code.
        args, kwargs: those of TorchDistLoadShardedStrategy.

    Raises:
        CorruptCheckpointError: from the load, a wrong byte; or a `common.pt` that was not saved with these tensors.
        CheckpointError: what else cannot be read. DCP wraps both in a CheckpointException.
    """

    def __init__(self, *args: Any, allow_pickle: bool | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._allow_pickle = allow_pickle

    @property
    def allow_pickle(self) -> bool:
        return _allow_by_default if self._allow_pickle is None else self._allow_pickle

    @property
    def can_handle_sharded_objects(self) -> bool:
        """Asked by Megatron-core 0.16."""
        return True

    def load(
        self, sharded_state_dict: dict[str, Any], checkpoint_dir: str | os.PathLike[str], *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        check_one_of_both(checkpoint_dir)
        if holds_checkpoint(checkpoint_dir):
            check_common(Checkpoint(engine_path(checkpoint_dir)).metadata, checkpoint_dir)
        with engine_readers(), allowing_pickle(self.allow_pickle):
            loaded: dict[str, Any] = super().load(sharded_state_dict, checkpoint_dir, *args, **kwargs)
        return loaded

    def load_tensors_metadata(self, checkpoint_dir: str | os.PathLike[str], *args: Any, **kwargs: Any) -> Any:
        with engine_readers():
            return super().load_tensors_metadata(checkpoint_dir, *args, **kwargs)

    def load_sharded_metadata(self, checkpoint_dir: str | os.PathLike[str], *args: Any, **kwargs: Any) -> Any:
        with engine_readers():
            return super().load_sharded_metadata(checkpoint_dir, *args, **kwargs)

    def remove_sharded_tensors(self, checkpoint_dir: str | os.PathLike[str], key_prefix: str) -> None:
        """Replaces the checkpoint by one without what has a key with that prefix, in one step. Of all ranks one calls.
        What is kept passes through the memory of this process.
        """
        if not holds_checkpoint(checkpoint_dir):
            super().remove_sharded_tensors(checkpoint_dir, key_prefix)
            return
        path = engine_path(checkpoint_dir)
        kept: dict[str, Any] = {OBJECTS: {}}
        with Checkpoint.open(path) as checkpoint:
            step, metadata = checkpoint.step, dict(checkpoint.metadata)
            for name in checkpoint.keys():  # noqa: SIM118
                key = name.removeprefix(OBJECTS + ".")
                if not key.startswith(key_prefix):
                    (kept if key == name else kept[OBJECTS])[key] = checkpoint.get_tensor(name)
        save(kept, checkpoint_id=path, step=step, metadata=metadata, overwrite=True, no_dist=True)
