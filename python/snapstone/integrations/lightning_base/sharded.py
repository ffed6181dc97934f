"""Strategies of sharded models without their base classes: every rank saves its own shards, in the background.

A class here stands before the stock strategy in the bases of what a trainer is given.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

import snapstone as ss

from ... import dcp
from ...errors import IncompatibleCheckpointError
from .directory import STATE_DICT, is_directory, optimizer_key, rest_of, unpacked_rest
from .saves import Saves

__all__ = ["FullyShardedSaves", "ModelParallelSaves", "ShardedSaves"]

PathLike = str | os.PathLike[str]


class ShardedSaves:
    """
    Args (besides the stock strategy's):
        asynchronous: return from a save when the snapshot is taken. An error is raised by the next save, by the next
            load, or at the end of `fit`, on every rank.
        save_options: arguments of `snapstone.save`, see `CheckpointIO`.
    """

    def __init__(
        self, *args: Any, asynchronous: bool = True, save_options: Mapping[str, Any] | None = None, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.snapstone_saves = Saves(asynchronous=asynchronous, options=save_options)

    @property
    def saves_shards(self) -> bool:
        """False when the strategy was told to save whole models: then it does what the stock one does."""
        raise NotImplementedError

    def lightning_module_state_dict(self) -> dict[str, Any]:
        if not self.saves_shards:
            return super().lightning_module_state_dict()  # type: ignore[misc, no-any-return]
        return get_model_state_dict(self.model)  # type: ignore[attr-defined] # no copies on the host: saves make theirs

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        if not self.saves_shards:
            return super().optimizer_state(optimizer)  # type: ignore[misc, no-any-return]
        return get_optimizer_state_dict(self.model, _unwrapped(optimizer))  # type: ignore[attr-defined]

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: PathLike, storage_options: Any | None = None
    ) -> None:
        if not self.saves_shards:
            super().save_checkpoint(checkpoint, filepath, storage_options)  # type: ignore[misc]
            return
        if storage_options is not None:
            raise TypeError(f"{type(self).__name__} takes no storage_options; give it save_options when it is made")
        path = self.broadcast(os.fspath(filepath))  # type: ignore[attr-defined]
        rest = dict(checkpoint)
        model = rest.pop(STATE_DICT)
        optimizers = rest.pop("optimizer_states", [])
        state = {STATE_DICT: model, **{optimizer_key(index): one for index, one in enumerate(optimizers)}}
        step = checkpoint.get("global_step")
        self.snapstone_saves.save(
            {**state, **rest_of(rest)},
            path,
            step=step if type(step) is int else None,
            no_dist=False,
            lead=self.is_global_zero,  # type: ignore[attr-defined]
        )

    def load_checkpoint(self, checkpoint_path: PathLike, weights_only: bool | None = None) -> dict[str, Any]:
        """Fills model and optimizers, and returns the rest. Also takes what the stock strategy saved."""
        self.snapstone_saves.wait()
        path = Path(self.broadcast(checkpoint_path))  # type: ignore[attr-defined]
        weights_only = True if weights_only is None else weights_only
        if not is_directory(path):
            with dcp.installed():  # reads DCP's metadata without unpickling what it should not
                return super().load_checkpoint(path, weights_only=weights_only)  # type: ignore[misc, no-any-return]
        opened = self._filled(path)
        same = opened.world_size == self.world_size  # type: ignore[attr-defined]
        rank = self.global_rank if same else 0  # type: ignore[attr-defined]
        return unpacked_rest(opened, weights_only=weights_only, rank=rank)

    def _filled(self, path: Path) -> ss.Checkpoint:
        model: Any = self.model  # type: ignore[attr-defined]
        strict = bool(self.lightning_module.strict_loading)  # type: ignore[attr-defined]
        optimizers = {optimizer_key(index): one for index, one in enumerate(self.optimizers)}  # type: ignore[attr-defined]
        state: dict[str, Any] = {STATE_DICT: get_model_state_dict(model)}
        state.update({key: get_optimizer_state_dict(model, one) for key, one in optimizers.items()})
        opened = ss.load(state, checkpoint_id=path, strict=False, cast=True)
        self._check(opened, optimizers, strict)
        set_model_state_dict(model, state[STATE_DICT], options=StateDictOptions(strict=strict))
        for key, one in optimizers.items():
            set_optimizer_state_dict(model, one, state[key], options=StateDictOptions(strict=strict))
        return opened

    def _check(self, opened: ss.Checkpoint, optimizers: Mapping[str, Any], strict: bool) -> None:
        heads = (*([f"{STATE_DICT}."] if strict else []), *(f"{key}." for key in optimizers))
        problems = [f"missing: {name}" for name in opened.missing_keys if name.startswith(heads)]
        problems += [f"unexpected: {name}" for name in opened.unexpected_keys if name.startswith(heads)]
        if problems:
            more = f" and {len(problems) - 10} more" if len(problems) > 10 else ""
            raise IncompatibleCheckpointError(
                f"{opened.path} does not fit the model: {'; '.join(problems[:10])}{more}", path=opened.path
            )

    def remove_checkpoint(self, filepath: PathLike) -> None:
        """Removes it once the save begun last is durable."""
        if self.is_global_zero:  # type: ignore[attr-defined]
            self.snapstone_saves.remove(filepath)

    def teardown(self) -> None:
        try:
            self.snapstone_saves.close()
        finally:
            super().teardown()  # type: ignore[misc]


def _unwrapped(optimizer: Any) -> torch.optim.Optimizer:
    """Lightning's own wrappers hold the optimizer."""
    inner: torch.optim.Optimizer = getattr(optimizer, "_optimizer", optimizer)
    return inner


class ModelParallelSaves(ShardedSaves):
    """Of FSDP2 and tensor parallelism, applied in `configure_model`."""

    @property
    def saves_shards(self) -> bool:
        return bool(self._save_distributed_checkpoint)  # type: ignore[attr-defined]


class FullyShardedSaves(ShardedSaves):
    """Of FSDP1. Saves shards unless it is told state_dict_type="full"."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("state_dict_type", "sharded")
        super().__init__(*args, **kwargs)

    @property
    def saves_shards(self) -> bool:
        return bool(self._state_dict_type == "sharded")  # type: ignore[attr-defined]
