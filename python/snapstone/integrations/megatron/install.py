"""The engine under Megatron-LM, which takes its strategies from names of its modules; there is no hook.

`install` puts the engine's under these names:

| module | name | is then |
|---|---|---|
| core strategies.torch | `_get_filesystem_reader` | a reader for each of both formats |
| core serialization | the same, which 0.19 imports | the same |
| core serialization | `TorchDistLoadShardedStrategy` | LoadStrategy: of loads that name no strategy |
| core serialization | `TorchDistSaveShardedStrategy` | makes SaveStrategy: of saves that name none |
| core strategies.torch, 0.16 | `register_default_torch_strategies` | the engine's: of calls that name none |
| training.checkpointing | `TorchDistSaveShardedStrategy`, `TorchDistLoadShardedStrategy` | the engine's |
| training.checkpointing, 0.16 | `get_default_save_sharded_strategy`, `..._load_...` | functions that make them |
| training.async_utils | `_async_calls_queue`, `_get_async_calls_queue` | AsyncCallsQueue |
| training.async_utils, .initialize | `init_persistent_async_worker` | nothing: there is no worker |
| bridge.training.checkpointing | both strategies, `_get_filesystem_reader` | the engine's |

Modules of training and of Bridge that are not imported yet are imported.
"""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any

from megatron.core.dist_checkpointing import serialization
from megatron.core.dist_checkpointing.strategies import torch as torch_strategies

from ..patches import Patches
from .calls import AsyncCallsQueue
from .load_strategy import LoadStrategy, set_allow_pickle
from .reader import engine_readers, get_filesystem_reader
from .save_strategy import DefaultSaveStrategy, SaveStrategy, set_save_options

__all__ = ["install", "installed", "uninstall"]

_log = logging.getLogger("snapstone")
_lock = threading.Lock()
_patches = Patches()
_stack = ExitStack()


def install(*, save_options: Mapping[str, Any] | None = None, allow_pickle: bool = False) -> None:
    """From now on Megatron-LM, or Megatron-Bridge, saves and loads `torch_dist` checkpoints through the engine, in this
    process. Before `pretrain()`, on every rank. Again is nothing but other options.

    Args:
        save_options: as in SaveStrategy, for the strategies that Megatron makes.
        allow_pickle: as in LoadStrategy.

    Raises:
        AttributeError: a name that should be replaced is missing; nothing is replaced then.
    """
    with _lock:
        set_save_options(save_options)
        set_allow_pickle(allow_pickle)
        if _patches:
            return
        try:
            _stack.enter_context(engine_readers())
            _install_core()
            if (checkpointing := _module("megatron.training.checkpointing")) is not None:
                _install_training(checkpointing)
            if (checkpointing := _module("megatron.bridge.training.checkpointing")) is not None:
                _install_strategies(checkpointing)
                _patches.set(checkpointing, "_get_filesystem_reader", get_filesystem_reader)
        except BaseException:
            _undo()
            raise


def uninstall() -> None:
    """Undoes `install`. Saves in flight end; finalize them first, so that Megatron's tracker file names them."""
    with _lock:
        _undo()


@contextmanager
def installed(*, save_options: Mapping[str, Any] | None = None, allow_pickle: bool = False) -> Iterator[None]:
    """`install` for the length of a `with` block."""
    install(save_options=save_options, allow_pickle=allow_pickle)
    try:
        yield
    finally:
        uninstall()


def _undo() -> None:
    _patches.undo()
    _stack.close()
    set_save_options(None)
    set_allow_pickle(False)


def _module(name: str) -> ModuleType | None:
    """None where the package lacks it: Megatron-core's wheel of 0.16 has no training, and Bridge is one of its own."""
    found: ModuleType | None = sys.modules.get(name)
    if found is not None:
        return found
    package = ".".join(name.split(".")[:2])
    if find_spec(package) is None:
        return None
    try:
        return import_module(name)
    except ImportError as error:
        _log.warning("%s cannot be imported, so it stays as it is: %s", name, error)
        return None


def _install_core() -> None:
    if hasattr(serialization, "_get_filesystem_reader"):
        _patches.set(serialization, "_get_filesystem_reader", get_filesystem_reader)
    if hasattr(serialization, "TorchDistLoadShardedStrategy"):
        _patches.set(serialization, "TorchDistLoadShardedStrategy", LoadStrategy)
        _patches.set(serialization, "TorchDistSaveShardedStrategy", DefaultSaveStrategy)
        return
    _patches.set(torch_strategies, "register_default_torch_strategies", _register_strategies)


def _register_strategies() -> None:
    """Megatron-core 0.16 calls this whenever it looks for a default."""
    base = import_module("megatron.core.dist_checkpointing.strategies.base")
    base.register_default_strategy(base.StrategyAction.SAVE_SHARDED, "torch_dist", 1, SaveStrategy())
    base.register_default_strategy(base.StrategyAction.LOAD_SHARDED, "torch_dist", 1, LoadStrategy())


def _install_training(checkpointing: ModuleType) -> None:
    _install_strategies(checkpointing)
    async_utils = import_module("megatron.training.async_utils")

    def queue() -> AsyncCallsQueue:
        if async_utils._async_calls_queue is None:
            async_utils._async_calls_queue = AsyncCallsQueue()  # type: ignore[attr-defined]
        return async_utils._async_calls_queue  # type: ignore[no-any-return]

    _patches.set(async_utils, "_get_async_calls_queue", queue)
    _patches.set(async_utils, "_async_calls_queue", AsyncCallsQueue())
    for name in ("megatron.training.async_utils", "megatron.training.initialize"):
        module = sys.modules.get(name)
        if module is not None and hasattr(module, "init_persistent_async_worker"):
            _patches.set(module, "init_persistent_async_worker", _no_worker)


def _install_strategies(checkpointing: ModuleType) -> None:
    if hasattr(checkpointing, "get_default_save_sharded_strategy"):
        _patches.set(checkpointing, "get_default_save_sharded_strategy", _save_strategy)
        _patches.set(checkpointing, "get_default_load_sharded_strategy", _load_strategy)
    else:
        _patches.set(checkpointing, "TorchDistSaveShardedStrategy", SaveStrategy)
        _patches.set(checkpointing, "TorchDistLoadShardedStrategy", LoadStrategy)


def _save_strategy(backend: str = "torch_dist", version: int = 1) -> SaveStrategy:
    return SaveStrategy(backend, version)


def _load_strategy(checkpoint_dir: str) -> LoadStrategy:
    return LoadStrategy()


def _no_worker(*args: Any, **kwargs: Any) -> None:
    """The engine's saves need no process that writes."""
