"""Lightning 2.6 (`import lightning`): checkpoints through the engine, asynchronous, durable, verified.

    Trainer(plugins=[CheckpointIO()])                 one process or DDP
    Trainer(strategy=ModelParallelStrategy())         FSDP2 and tensor parallelism: each rank saves its shards
    Trainer(strategy=FSDPStrategy())                  the same for FSDP1

ModelCheckpoint and `ckpt_path=` work as ever; random generators are saved per rank and restored. A job that imports
`pytorch_lightning` takes the module of that name beside this one.
"""

from __future__ import annotations

from typing import Any

from .versions import require

VERSION = require("lightning", "2.6", "2.7")

from lightning.fabric.plugins import CheckpointIO as _CheckpointIO  # noqa: E402
from lightning.fabric.plugins import TorchCheckpointIO  # noqa: E402
from lightning.pytorch import strategies  # noqa: E402

from .lightning_base.checkpoint_io import EngineIO  # noqa: E402
from .lightning_base.directory import export  # noqa: E402
from .lightning_base.hooks import Hooks  # noqa: E402
from .lightning_base.sharded import FullyShardedSaves, ModelParallelSaves  # noqa: E402

__all__ = ["CheckpointIO", "FSDPStrategy", "ModelParallelStrategy", "export", "install", "uninstall"]

_hooks = Hooks("lightning.pytorch")


def install() -> None:
    """Lets `LightningModule.load_from_checkpoint` read directories, and the rest of Lightning know of saves in flight.

    Making a plugin or a strategy of this module does it too.
    """
    _hooks.install()


def uninstall() -> None:
    """Puts back every name that `install` replaced."""
    _hooks.uninstall()


class CheckpointIO(EngineIO, _CheckpointIO):  # type: ignore[misc]
    __doc__ = EngineIO.__doc__
    stock = TorchCheckpointIO

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        install()


class ModelParallelStrategy(ModelParallelSaves, strategies.ModelParallelStrategy):  # type: ignore[misc]
    """Lightning's ModelParallelStrategy, with the arguments `asynchronous` and `save_options` of `CheckpointIO`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        install()


class FSDPStrategy(FullyShardedSaves, strategies.FSDPStrategy):  # type: ignore[misc]
    """Lightning's FSDPStrategy, saving shards unless state_dict_type="full", with the arguments `asynchronous` and
    `save_options` of `CheckpointIO`.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        install()
