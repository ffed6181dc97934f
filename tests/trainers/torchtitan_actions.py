"""What tests do inside a job, between its checkpoint being loaded and its training."""

from __future__ import annotations

import os
from typing import Any

__all__ = ["resave", "see_no_folder"]


def resave(trainer: Any) -> None:
    """Saves what was loaded under "resaved", unchanged, then trains on."""
    manager = trainer.checkpointer
    stock_load = manager.load

    def load(step: int = -1) -> bool:
        loaded = bool(stock_load(step))
        path = os.path.join(os.path.dirname(manager.folder), "resaved", f"step-{trainer.step}")
        manager.dcp_save(manager._flattened_model_states_sd(), path, type(manager.async_mode).DISABLED)
        return loaded

    manager.load = load


def see_no_folder(trainer: Any) -> None:
    from torchtitan.tools import filesystem

    exists, folder = filesystem.exists, trainer.checkpointer.folder
    filesystem.exists = lambda path: path != folder and exists(path)
