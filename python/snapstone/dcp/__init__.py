"""The engine as the storage of `torch.distributed.checkpoint` (DCP): pass these classes to its save and load."""

from __future__ import annotations

from .install import install, installed, uninstall
from .load_planner import LoadPlanner
from .save_planner import SavePlanner
from .stager import Stager
from .storage_reader import StorageReader
from .storage_writer import StorageWriter

__all__ = [
    "LoadPlanner",
    "SavePlanner",
    "Stager",
    "StorageReader",
    "StorageWriter",
    "install",
    "installed",
    "uninstall",
]
