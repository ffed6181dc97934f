"""snapstone's own verbs."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

from states import State

import snapstone as ss
from engines.contestant import Engine, Setting, nothing_left, waiting_for

__all__ = ["Snapstone", "SnapstoneAsync"]

BUDGET_VARIABLE = "SNAPSTONE_HOST_MEMORY_BUDGET"
BUDGET_DEFAULT = 1 << 30


class Snapstone(Engine):
    label = "snapstone save / load"
    family = "snapstone"
    package = "snapstone"
    unsynced = "nothing"

    def __init__(self, setting: Setting) -> None:
        self.memory_budget = BUDGET_DEFAULT

    def begin(self, state: State, directory: Path) -> Callable[[], None]:
        ss.save(state, checkpoint_id=directory)
        return nothing_left

    def fill(self, target: State, directory: Path) -> None:
        ss.load(target, checkpoint_id=directory)


class SnapstoneAsync(Snapstone):
    label = 'snapstone async_save, fence="now"'
    asynchronous: ClassVar[bool] = True
    loads = False

    def __init__(self, setting: Setting) -> None:
        self.memory_budget = setting.host_memory_budget
        self._prepared = False

    def begin(self, state: State, directory: Path) -> Callable[[], None]:
        self._prepare()
        handle = ss.async_save(state, checkpoint_id=directory, host_memory_budget=self.memory_budget)
        handle.staging_completion.result()
        return waiting_for(handle.upload_completion)

    def _prepare(self) -> None:
        """Once, in the warm-up: `prepare` gives at most what the variable allows."""
        if self._prepared:
            return
        before = os.environ.get(BUDGET_VARIABLE)
        os.environ[BUDGET_VARIABLE] = str(self.memory_budget)
        try:
            ss.prepare(nbytes=self.memory_budget)
        finally:
            if before is None:
                del os.environ[BUDGET_VARIABLE]
            else:
                os.environ[BUDGET_VARIABLE] = before
        self._prepared = True
