"""The engine in Megatron-core and Megatron-LM: save and load strategies for `torch_dist` checkpoints.

`SaveStrategy` and `LoadStrategy` go to `dist_checkpointing.save` and `load`; `install` puts them where Megatron-LM
takes its own from. A checkpoint is a directory as Megatron makes it, with the engine's checkpoint inside:

    iter_0000010/metadata.json      written by Megatron, last
    iter_0000010/common.pt          what is not sharded
    iter_0000010/snapstone/         tensors and sharded objects; stands there exactly if it is complete
"""

from __future__ import annotations

from .version import MEGATRON_CORE  # first: nothing of another version is imported

from .calls import AsyncCallsQueue  # isort: skip
from .install import install, installed, uninstall  # isort: skip
from .layout import NAME, engine_path, holds_checkpoint  # isort: skip
from .load_strategy import LoadStrategy  # isort: skip
from .save_strategy import SaveStrategy  # isort: skip

__all__ = [
    "MEGATRON_CORE",
    "NAME",
    "AsyncCallsQueue",
    "LoadStrategy",
    "SaveStrategy",
    "engine_path",
    "holds_checkpoint",
    "install",
    "installed",
    "uninstall",
]
