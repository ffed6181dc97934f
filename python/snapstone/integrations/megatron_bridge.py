"""CheckpointManager: the engine in Megatron-Bridge, chosen by name in its configuration.

register_allowed_target_prefix("snapstone.")  # of megatron.bridge.utils.instantiate_utils
cfg.checkpoint.custom_manager_class = "snapstone.integrations.megatron_bridge.CheckpointManager"
"""

from __future__ import annotations

from typing import Any

from .versions import require

BRIDGE = require("megatron-bridge", "0.6", "0.7")

from megatron.bridge.training.checkpointing import DefaultCheckpointManager  # noqa: E402

from . import megatron  # noqa: E402

__all__ = ["BRIDGE", "CheckpointManager"]


class CheckpointManager(DefaultCheckpointManager):  # type: ignore[misc]
    """Bridge's own manager, with the engine's strategies and queue beneath it: `megatron.install` has been called."""

    def __init__(self, checkpoint_config: Any) -> None:
        megatron.install()
        super().__init__(checkpoint_config)

    def save(self, ctx: Any, callback_manager: Any = None) -> None:
        if self.checkpoint_config.async_save:
            _use_queue(ctx.state)
        super().save(ctx, callback_manager)


def _use_queue(state: Any) -> None:
    """In the place of the queue that Bridge made when it started, once that has nothing left to finalize."""
    queue = state._async_calls_queue
    if isinstance(queue, megatron.AsyncCallsQueue):
        return
    if queue is not None:
        queue.close()
    state._async_calls_queue = megatron.AsyncCallsQueue()
