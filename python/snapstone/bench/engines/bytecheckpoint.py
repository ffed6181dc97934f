"""ByteCheckpoint: shards by DTensor, written by threads; a tracker file, written last, names the finished step.

0.0.2 looks for the plan of an earlier save before it has the state's names, never finds one, and therefore writes
within the call, also with fast_saving; what is left for the background is agreeing that all ranks have written. It
syncs data files and its metadata, not the directories and not the tracker: the harness syncs the file system.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Mapping
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, ClassVar

from ..results import Option
from .engine import Engine, Pending, Setting

__all__ = ["ByteCheckpoint"]

TRACKER = "latest_checkpointed_iteration.txt"


class ByteCheckpoint(Engine):
    title = "ByteCheckpoint save, fast_saving"
    distribution = "bytecheckpoint"
    module = "bytecheckpoint"
    needs: ClassVar[tuple[str, ...]] = ("grpc", "google.protobuf")
    options: ClassVar[tuple[Option, ...]] = (
        {"name": "fast_saving", "value": "True", "why": "ranks agree in the background that all have written"},
        {"name": "framework", "value": "fsdp2 with DTensors, else ddp", "why": "each tensor is written once"},
        {
            "name": "checkpoint_state",
            "value": "everything as model",
            "why": "it asks the model and the optimizer for their state one after the other; the state is at hand",
        },
        {"name": "BYTECHECKPOINT_STORE_WORKER_COUNT", "value": "2", "why": "two threads write"},
    )
    syncs = False

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        os.environ.setdefault("BYTECHECKPOINT_STORE_WORKER_COUNT", "2")  # read when it is imported
        os.environ.setdefault("BYTECHECKPOINT_LOGGING_LEVEL", "WARNING")
        import bytecheckpoint  # noqa: F401, now, so that no save pays for it

        self._server: list[BaseProcess] = []  # through which ranks agree; rank 0 has it

    def save(self, state: Mapping[str, Any], directory: Path, step: int) -> Pending | None:
        import bytecheckpoint
        from bytecheckpoint.storage._storage import _local_storage_writer

        framework = _framework_of(state)
        others = multiprocessing.active_children()
        bytecheckpoint.save(
            str(directory),
            {"model": _State(state)},
            framework,
            fast_saving=True,
            global_steps=step,
            ignore_append_global_steps_to_folder=True,
        )
        self._server += [process for process in multiprocessing.active_children() if process not in others]
        queue = _local_storage_writer.get_sync_queue("model", framework, None)

        def wait() -> None:
            queue.join()
            if self.setting.rank == 0 and not self.is_complete(directory):  # which writes it when all have said so
                raise RuntimeError(f"{directory / TRACKER} was not written: a rank failed to write, its log says why")

        return Pending(wait=wait)

    def load(self, state: dict[str, Any], directory: Path) -> None:
        import bytecheckpoint

        bytecheckpoint.load(str(directory), {"model": _State(state)}, _framework_of(state))

    def is_complete(self, directory: Path) -> bool:
        return (directory / TRACKER).exists()

    def close(self) -> None:
        for process in self._server:
            process.terminate()  # nothing else ends it when the ranks leave without cleaning up


class _State:
    """What it saves and loads: an object that gives its tensors by name, and lets them be filled in place."""

    def __init__(self, state: Mapping[str, Any]) -> None:
        self._state = state

    def state_dict(self) -> dict[str, Any]:
        return dict(self._state)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        pass  # the tensors of the state were filled


def _framework_of(state: Mapping[str, Any]) -> str:
    from torch.distributed.tensor import DTensor

    return "fsdp2" if any(isinstance(tensor, DTensor) for tensor in state.values()) else "ddp"
