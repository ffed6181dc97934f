"""snapstone: fast, durable, verified checkpoints for large-model training."""

from __future__ import annotations

from .checkpoint import Checkpoint
from .errors import (
    CheckpointError,
    CheckpointNotFoundError,
    CorruptCheckpointError,
    IncompatibleCheckpointError,
    IncompleteCheckpointError,
    RankFailedError,
)
from .handle import SaveHandle, wait
from .load import load
from .save import async_save, prepare, save
from .verify import VerifyReport, verify

__version__ = "0.1.0"

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "CheckpointNotFoundError",
    "CorruptCheckpointError",
    "IncompatibleCheckpointError",
    "IncompleteCheckpointError",
    "RankFailedError",
    "SaveHandle",
    "VerifyReport",
    "async_save",
    "load",
    "prepare",
    "save",
    "verify",
    "wait",
]
