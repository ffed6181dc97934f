"""The engine as the storage of `torch.distributed.checkpoint` (DCP): pass these classes to its save and load."""

from __future__ import annotations

from .install import install, installed, uninstall
from .save_planner import SavePlanner
from .storage_reader import StorageReader
from .storage_writer import StorageWriter

__all__ = ["SavePlanner", "StorageReader", "StorageWriter", "install", "installed", "uninstall"]
