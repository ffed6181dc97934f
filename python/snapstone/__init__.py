"""snapstone: fast, durable, verified checkpoints for large-model training.

The names below are imported when first used: torch takes seconds, and `snapstone --help` and shell completion do not
need it.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from .errors import (
    CheckpointError,
    CheckpointNotFoundError,
    CorruptCheckpointError,
    CudaError,
    IncompatibleCheckpointError,
    IncompleteCheckpointError,
    RankFailedError,
)

if TYPE_CHECKING:
    from .checkpoint import Checkpoint
    from .compaction import compact
    from .handle import SaveHandle, wait
    from .load import load
    from .repair import RepairReport, repair
    from .rng import capture_rng, restore_rng
    from .save import async_save, prepare, save
    from .verify import VerifyReport, verify

__version__ = "0.1.0"

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "CheckpointNotFoundError",
    "CorruptCheckpointError",
    "CudaError",
    "IncompatibleCheckpointError",
    "IncompleteCheckpointError",
    "RankFailedError",
    "RepairReport",
    "SaveHandle",
    "VerifyReport",
    "async_save",
    "capture_rng",
    "compact",
    "load",
    "prepare",
    "repair",
    "restore_rng",
    "save",
    "verify",
    "wait",
]

_HOMES = {
    "Checkpoint": "checkpoint",
    "RepairReport": "repair",
    "SaveHandle": "handle",
    "VerifyReport": "verify",
    "async_save": "save",
    "capture_rng": "rng",
    "compact": "compaction",
    "load": "load",
    "prepare": "save",
    "repair": "repair",
    "restore_rng": "rng",
    "save": "save",
    "verify": "verify",
    "wait": "handle",
}


class _Package(ModuleType):
    def __setattr__(self, name: str, value: Any) -> None:
        # The import system binds a submodule in its package. `save`, `load`, `verify` and `repair` are functions here,
        # whoever imports the modules of these names, and whenever.
        if isinstance(value, ModuleType) and _HOMES.get(name) == name:
            value = getattr(value, name)
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
