"""Where the engine's checkpoint is in a checkpoint of Megatron.

Megatron makes `iter_0000010/` itself, writes files of its own there before and after the tensors (`common.pt`,
`metadata.json`, states of data loaders), and other processes may; the engine's checkpoint, which is renamed into place
as a whole, is therefore a directory within. That directory is also how a checkpoint of the engine is told from a stock
one: `metadata.json` says "torch_dist" for both, since FullyParallelSaveStrategyWrapper writes that whatever it wraps.
"""

from __future__ import annotations

import os
import re

from ...manifest import is_checkpoint

__all__ = ["NAME", "engine_path", "holds_checkpoint", "step_of"]

NAME = "snapstone"


def engine_path(checkpoint_dir: str | os.PathLike[str]) -> str:
    """The engine's checkpoint in a directory of Megatron's, for `snapstone.Checkpoint.open` and the command line."""
    return os.path.join(os.path.abspath(os.fspath(checkpoint_dir)), NAME)


def holds_checkpoint(checkpoint_dir: str | os.PathLike[str]) -> bool:
    """Whether the engine saved what is there; False for a stock checkpoint."""
    return is_checkpoint(engine_path(checkpoint_dir))


def step_of(checkpoint_dir: str | os.PathLike[str]) -> int | None:
    """The iteration, by Megatron's name for the directory."""
    found = re.fullmatch(r"iter_([0-9]+)", os.path.basename(os.path.normpath(os.fspath(checkpoint_dir))))
    return int(found[1]) if found else None
