"""An Accelerator whose `save_state` and `load_state` go through the engine.

`save_state` writes what it always does, to a hidden directory; with FSDP and sharded state, model and optimizer are
checkpoints of the engine, written in the background. The directory gets its name when all of it is durable, and only
then older ones go that `total_limit` has no room for, which stock code deletes before it begins to save.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

from ..collective import Deadline, Group
from ..config import SaveOptions
from ..dcp import installed
from ..dcp.background import saves
from .directory_save import DirectorySaves
from .numbered import newest_valid, rotate
from .patches import Patches
from .publication import check_replaceable, problems_of_load, put_back, recover

__all__ = ["AttachedAccelerator"]

_PREFIX = "checkpoint_"
_WITNESS = "random_states_0.pkl"


class AttachedAccelerator:
    def __init__(self, accelerator: Any, asynchronous: bool, options: Mapping[str, Any]) -> None:
        self._accelerator = accelerator
        self._saves = DirectorySaves(
            asynchronous=asynchronous, timeout_seconds=SaveOptions.of(**options).timeout_seconds
        )
        self._patches = Patches()
        self._stock_save = self._patches.set(accelerator, "save_state", self._save_state)
        self._stock_load = self._patches.set(accelerator, "load_state", self._load_state)

    def detach(self) -> None:
        self._patches.undo()
        self._saves.wait()

    def _save_state(self, output_dir: Any = None, *args: Any, **kwargs: Any) -> str:
        """
        Raises:
            ValueError: automatic naming comes to a directory that exists, as stock raises it.
            FileExistsError: `output_dir` holds other things than a checkpoint of this kind, so it is not replaced.
        """
        accelerator = self._accelerator
        configuration = accelerator.project_configuration
        naming = configuration.automatic_checkpoint_naming
        run = os.path.join(accelerator.project_dir, "checkpoints") if naming else None
        final = output_dir if run is None else os.path.join(run, f"{_PREFIX}{accelerator.save_iteration}")
        if final is None:
            raise ValueError("No output_dir provided and automatic checkpoint naming is disabled.")
        final = os.path.abspath(os.path.expanduser(os.fspath(final)))

        def check() -> None:
            if naming and os.path.exists(final):
                raise ValueError(
                    f"Checkpoint directory {final} ({accelerator.save_iteration}) already exists. Please manually "
                    "override `self.save_iteration` with what iteration to start with."
                )
            check_replaceable(final)

        leads = self._leads()
        # Not into the directory of numbered checkpoints, of which stock code counts every entry.
        parent = os.path.abspath(accelerator.project_dir) if naming else None
        save = self._saves.begin(final, step=None, leads=leads, parent=parent, check=check)
        configuration.automatic_checkpoint_naming = False
        try:
            with installed(asynchronous=self._saves.asynchronous):
                self._stock_save(save.staging, *args, **kwargs)
            save.adopt(saves.take(save.staging))
            if not leads:
                save.files.append(f"random_states_{accelerator.process_index}.pkl")
            limit = configuration.total_limit if naming else None

            def retain() -> None:
                if run is not None:
                    rotate(run, _PREFIX, _WITNESS, limit, (final,))

            self._saves.submit(save, {"world_size": accelerator.num_processes}, retain)
        except BaseException as error:
            self._saves.fail(save, error)
            raise
        finally:
            configuration.automatic_checkpoint_naming = naming
        return final

    def _load_state(self, input_dir: Any = None, *args: Any, **kwargs: Any) -> Any:
        self._saves.wait()
        accelerator = self._accelerator
        if input_dir is None and accelerator.project_configuration.automatic_checkpoint_naming:
            input_dir = self._newest(os.path.join(accelerator.project_dir, "checkpoints"))
        elif input_dir is not None:
            path = os.path.expanduser(input_dir)
            self._before_all("put-back", self._leads(), lambda: put_back(path))
            problems_of_load(path)
        with installed():
            return self._stock_load(input_dir, *args, **kwargs)

    def _leads(self) -> bool:
        """Whether this rank publishes: one of a file system."""
        accelerator = self._accelerator
        each = accelerator.project_configuration.save_on_each_node
        return bool(accelerator.is_main_process or (each and accelerator.is_local_main_process))

    def _newest(self, run: str) -> str:
        """The same on every rank."""

        def find() -> str:
            recover(run)
            path = newest_valid(run, _PREFIX, _WITNESS)
            if path is None:
                raise ValueError(f"No valid checkpoint found in {run}")
            return path

        return self._before_all("resume", Group.create().rank == 0, find)

    def _before_all(self, label: str, acts: bool, step: Callable[[], str | None]) -> str:
        """What `step` came to on rank 0, once it has ended on every rank that acts."""
        channel = Group.create().channel(label)
        error: BaseException | None = None
        path: str | None = None
        try:
            if acts:
                path = step()
        except BaseException as failure:
            error = failure
        try:
            payload = os.fsencode(path or "")
            return os.fsdecode(channel.vote("path", error, payload, Deadline(self._saves.timeout_seconds))[0])
        finally:
            channel.close()
