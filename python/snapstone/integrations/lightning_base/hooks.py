"""The few names of Lightning that have to know that a save is still in flight, replaced and put back.

    ModelCheckpoint.file_exists              also of a checkpoint in flight, so that two do not get one name
    ModelCheckpoint._link_checkpoint         save_last="link": the link moves when the checkpoint is durable
    _CheckpointConnector._select_ckpt_path   ckpt_path="last": saves end first, so that all ranks find the same one
    _CheckpointConnector.dump_checkpoint     adds the random generators of the ranks, which Lightning does not save
    _CheckpointConnector.resume_end          restores them
    _FitLoop.on_run_start                    again in the middle of an epoch, where making the loaders has used them
    core.saving.pl_load                      Module.load_from_checkpoint(directory)

Trainers without a plugin or strategy of the engine are left to the stock functions.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
import torch.distributed as dist

import snapstone as ss

from ..patches import Patches
from .directory import is_directory, read
from .saves import Saves

__all__ = ["Hooks"]

_KEY = "snapstone"  # in a checkpoint: {"rng": generators of ranks}
_WAITING = "_snapstone_rng"  # on a trainer that has resumed: generators to be restored once more


class Hooks:
    """Those of one package: "lightning.pytorch" or "pytorch_lightning"."""

    def __init__(self, package: str) -> None:
        self._package = package
        self._patches = Patches()

    def install(self) -> None:
        """Again is nothing.

        Raises:
            AttributeError: this version lacks one of the names; none is replaced then.
        """
        if self._patches:
            return
        try:
            self._install()
        except BaseException:
            self._patches.undo()
            raise

    def uninstall(self) -> None:
        self._patches.undo()

    def _install(self) -> None:
        callback = import_module(f"{self._package}.callbacks.model_checkpoint").ModelCheckpoint
        connector = import_module(f"{self._package}.trainer.connectors.checkpoint_connector")._CheckpointConnector
        loop = import_module(f"{self._package}.loops.fit_loop")._FitLoop
        saving = import_module(f"{self._package}.core.saving")
        self._replace(callback, "file_exists", _file_exists)
        self._replace(callback, "_link_checkpoint", _link_checkpoint)
        self._replace(connector, "_select_ckpt_path", _select_ckpt_path)
        self._replace(connector, "dump_checkpoint", _dump_checkpoint)
        self._replace(connector, "resume_end", _resume_end)
        self._replace(loop, "on_run_start", _on_run_start)
        self._replace(saving, "pl_load", _pl_load)

    def _replace(self, owner: Any, name: str, make: Callable[[Any], Any]) -> None:
        stock = vars(owner)[name] if name in vars(owner) else getattr(owner, name)
        function = stock.__func__ if isinstance(stock, staticmethod) else stock
        ours = functools.wraps(function)(make(function))
        self._patches.set(owner, name, staticmethod(ours) if isinstance(stock, staticmethod) else ours)


def _saves_of(trainer: Any) -> Saves | None:
    """
    Raises:
        TypeError: a plugin around the engine's, such as AsyncCheckpointIO, which would hide it from the rest of
            Lightning, and end without waiting for its saves.
    """
    strategy = trainer.strategy
    outer = strategy.checkpoint_io
    found = getattr(strategy, "snapstone_saves", None) or getattr(outer, "snapstone_saves", None)
    inner = getattr(outer, "checkpoint_io", None)
    while inner is not None and found is None:
        if isinstance(getattr(inner, "snapstone_saves", None), Saves):
            name = type(inner).__name__
            raise TypeError(f"{type(outer).__name__}({name}()): give the Trainer plugins=[{name}()], without a wrapper")
        inner = getattr(inner, "checkpoint_io", None)
    return found if isinstance(found, Saves) else None


def _file_exists(stock: Any) -> Any:
    def file_exists(self: Any, filepath: Any, trainer: Any) -> Any:
        saves = _saves_of(trainer)
        if saves is None:
            return stock(self, filepath, trainer)
        exists = trainer.is_global_zero and saves.exists(filepath, self._fs.exists(filepath))
        return trainer.strategy.reduce_boolean_decision(exists, all=False)

    return file_exists


def _link_checkpoint(stock: Any) -> Any:
    def link_checkpoint(trainer: Any, filepath: str, linkpath: str) -> None:
        saves = _saves_of(trainer)
        if saves is None:
            stock(trainer, filepath, linkpath)
            return
        if trainer.is_global_zero and os.path.abspath(filepath) != os.path.abspath(linkpath):
            saves.link(filepath, linkpath)
        trainer.strategy.barrier()

    return link_checkpoint


def _select_ckpt_path(stock: Any) -> Any:
    def select_ckpt_path(self: Any, *args: Any, **kwargs: Any) -> Any:
        saves = _saves_of(self.trainer)
        if saves is not None:
            try:
                saves.wait()
            finally:
                self.trainer.strategy.barrier("snapstone: saves have ended")
        return stock(self, *args, **kwargs)

    return select_ckpt_path


def _dump_checkpoint(stock: Any) -> Any:
    def dump_checkpoint(self: Any, weights_only: bool | None = None) -> dict[str, Any]:
        checkpoint: dict[str, Any] = stock(self, weights_only)
        saves = _saves_of(self.trainer)
        if saves is not None:
            saves.foreground = self.trainer.state.status != "running"
            if not weights_only:
                checkpoint[_KEY] = {"rng": _generators(self.trainer)}
        return checkpoint

    return dump_checkpoint


def _generators(trainer: Any) -> dict[str, Any]:
    """This rank's where each rank saves, else those of all ranks."""
    own = ss.capture_rng()
    if getattr(trainer.strategy, "saves_shards", False) or not (dist.is_available() and dist.is_initialized()):
        return own
    everybody: list[dict[str, Any]] = [{}] * dist.get_world_size()
    dist.all_gather_object(everybody, own)
    return {key: generators for one in everybody for key, generators in one.items()}


def _resume_end(stock: Any) -> Any:
    def resume_end(self: Any) -> None:
        saved = (self._loaded_checkpoint or {}).get(_KEY)
        stock(self)
        generators = saved.get("rng") if isinstance(saved, dict) else None
        if generators and self.trainer.training:
            ss.restore_rng(generators)
            setattr(self.trainer, _WAITING, generators)

    return resume_end


def _on_run_start(stock: Any) -> Any:
    def on_run_start(self: Any) -> None:
        stock(self)
        generators = vars(self.trainer).pop(_WAITING, None)
        if generators is not None and not self.epoch_loop.batch_progress.is_last_batch:
            ss.restore_rng(generators)

    return on_run_start


def _pl_load(stock: Any) -> Any:
    def pl_load(path_or_url: Any, map_location: Any = None, weights_only: bool | None = None) -> Any:
        if not isinstance(path_or_url, str | os.PathLike) or not is_directory(path_or_url):
            return stock(path_or_url, map_location=map_location, weights_only=weights_only)
        device = map_location if isinstance(map_location, str | torch.device) else "cpu"
        return read(path_or_url, weights_only=True if weights_only is None else weights_only, device=device)

    return pl_load
