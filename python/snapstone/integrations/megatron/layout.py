"""Where the engine's checkpoint is in a checkpoint of Megatron.

Megatron makes `iter_0000010/` itself, writes files of its own there before and after the tensors (`common.pt`,
`metadata.json`, states of data loaders), and other processes may; the engine's checkpoint, which is renamed into place
as a whole, is therefore a directory within. That directory is also how a checkpoint of the engine is told from a stock
one: `metadata.json` says "torch_dist" for both, since FullyParallelSaveStrategyWrapper writes that whatever it wraps.
"""

from __future__ import annotations

import os
import re

from ...errors import CorruptCheckpointError
from ...manifest import is_checkpoint

__all__ = ["NAME", "check_one_of_both", "engine_path", "holds_checkpoint", "retire_stock", "step_of"]

NAME = "snapstone"
_STOCK = ".metadata"  # without which nothing loads a stock checkpoint


def engine_path(checkpoint_dir: str | os.PathLike[str]) -> str:
    """The engine's checkpoint in a directory of Megatron's, for `snapstone.Checkpoint.open` and the command line."""
    return os.path.join(os.path.abspath(os.fspath(checkpoint_dir)), NAME)


def holds_checkpoint(checkpoint_dir: str | os.PathLike[str]) -> bool:
    """Whether the engine saved what is there; False for a stock checkpoint."""
    return is_checkpoint(engine_path(checkpoint_dir))


def retire_stock(checkpoint_dir: str | os.PathLike[str]) -> None:
    """Before the engine saves where a stock checkpoint stands: its tensors must never be read with what is now written
    beside them.
    """
    path = os.path.join(os.fspath(checkpoint_dir), _STOCK)
    if os.path.lexists(path):
        os.replace(path, path + ".replaced")


def check_one_of_both(checkpoint_dir: str | os.PathLike[str]) -> None:
    """Raises CorruptCheckpointError where stock code has saved beside a checkpoint of the engine: nothing tells which
    of both is wanted, and they share the files beside them.
    """
    if holds_checkpoint(checkpoint_dir) and os.path.lexists(os.path.join(os.fspath(checkpoint_dir), _STOCK)):
        raise CorruptCheckpointError(
            f"stock Megatron-core has saved beside {NAME}/: remove that and common.pt to keep the stock checkpoint, or "
            f"{_STOCK} to keep the other",
            path=checkpoint_dir,
        )


def step_of(checkpoint_dir: str | os.PathLike[str]) -> int | None:
    """The iteration, by Megatron's name for the directory."""
    found = re.fullmatch(r"iter_([0-9]+)", os.path.basename(os.path.normpath(os.fspath(checkpoint_dir))))
    return int(found[1]) if found else None
