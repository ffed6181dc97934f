"""SaveStrategy: what `dist_checkpointing.save` writes through."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch.distributed as dist
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

from ... import async_save, save
from ...config import SaveOptions
from ...handle import SaveHandle
from .common import keep_common, metadata_of
from .layout import engine_path, step_of
from .sharded import engine_state
from .version import MEGATRON_CORE

__all__ = ["Commit", "DefaultSaveStrategy", "SaveStrategy", "set_save_options"]

_OPTIONS = ("codec", "derive", "on_unchanged", "host_memory_budget", "timeout")
_defaults: dict[str, Any] = {}


def set_save_options(options: Mapping[str, Any] | None) -> None:
    """Options of strategies that are made without: Megatron-LM makes its own. TypeError, ValueError for wrong ones."""
    checked = _checked(options)
    _defaults.clear()
    _defaults.update(checked)


def _checked(options: Mapping[str, Any] | None) -> dict[str, Any]:
    unknown = sorted(set(options or {}) - set(_OPTIONS))
    if unknown:
        raise TypeError(f"save_options={unknown}: only {', '.join(_OPTIONS)} can be given")
    SaveOptions.of(**(options or {}))
    return dict(options or {})


class Commit:
    """The first finalize function of an asynchronous save: waits until it is committed, on every rank.

    Raises:
        CheckpointError, OSError: what the save raised; RankFailedError where another rank failed.
    """

    def __init__(self, handle: SaveHandle) -> None:
        self.handle = handle

    def __call__(self) -> None:
        self.handle.result()


class SaveStrategy(TorchDistSaveShardedStrategy):  # type: ignore[misc]
    """Writes the sharded state through the engine: atomic, durable on every rank when `save` returns, checked.

    Args:
        backend, version: for `metadata.json`.
        save_options: codec, derive, on_unchanged, host_memory_budget, timeout, as in `snapstone.save`.
        args, kwargs: those of TorchDistSaveShardedStrategy. `keep_only_main_replica` means the same;
            `thread_count`, `cached_metadata`, `separation_hint` and `cpu_shm_mode` have no effect: files are one per
            rank, structures are always remembered, and no process is started.

    Raises:
        ValueError, TypeError: a wrong option.
    """

    def __init__(
        self,
        backend: str = "torch_dist",
        version: int = 1,
        *args: Any,
        save_options: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(backend, version, *args, **kwargs)
        self._own_options = None if save_options is None else _checked(save_options)

    @property
    def save_options(self) -> dict[str, Any]:
        return dict(_defaults if self._own_options is None else self._own_options)

    @property
    def can_handle_sharded_objects(self) -> bool:
        """Asked by Megatron-core 0.16."""
        return True

    def save(self, sharded_state_dict: dict[str, Any], checkpoint_dir: str | os.PathLike[str]) -> None:
        """Returns when the checkpoint is committed and durable on every rank."""
        state, arguments = self._prepared(sharded_state_dict, checkpoint_dir)
        save(state, **arguments)

    def async_save(
        self,
        sharded_state_dict: dict[str, Any],
        checkpoint_dir: str | os.PathLike[str],
        async_strategy: str = "nvrx",
    ) -> AsyncRequest:
        """Begins the save: when this returns, the state may change. Writing goes on in the background of this process.

        The request has no function to run elsewhere, whatever `async_strategy` says. Its first finalize function waits
        for the commit, so use this package's AsyncCallsQueue, which finalizes when the save has ended; another queue
        finalizes at its next opportunity, and waits there.
        """
        state, arguments = self._prepared(sharded_state_dict, checkpoint_dir)
        return AsyncRequest(None, (), [Commit(async_save(state, **arguments))])

    def _prepared(
        self, sharded_state_dict: dict[str, Any], checkpoint_dir: str | os.PathLike[str]
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        leads = not dist.is_initialized() or dist.get_rank() == 0
        digest = keep_common(sharded_state_dict, checkpoint_dir) if leads else None
        state = engine_state(sharded_state_dict, keep_only_main_replica=self.keep_only_main_replica)
        return state, {
            "checkpoint_id": engine_path(checkpoint_dir),
            "step": step_of(checkpoint_dir),
            "metadata": metadata_of(digest, MEGATRON_CORE),
            "overwrite": True,
            **self.save_options,
        }


class _Default(type(SaveStrategy)):  # type: ignore[misc]
    def __call__(cls, *args: Any, **kwargs: Any) -> SaveStrategy:
        return SaveStrategy(*args, **kwargs)

    def __instancecheck__(cls, instance: object) -> bool:
        return isinstance(instance, TorchDistSaveShardedStrategy)


class DefaultSaveStrategy(SaveStrategy, metaclass=_Default):
    """For the name from which Megatron-core makes a strategy where it got none, and by which it tells its own. A caller
    who names a stock strategy keeps it.
    """
