"""What an adapter is: an engine cut into the parts that a ledger times, the thinnest calls its own documentation gives.

    pending = engine.save(state, directory, step)   row "call"
    ... forward, backward ...                       row "inflation", as far as steps are longer than without saves
    pending.fence()                                 row "fence": returns once the optimizer may change the state
    optimizer.step()
    engine.poll()                                   row "finalize": what must run on the training thread, each step
    pending.wait()                                  on a thread of the harness: returns when the engine calls it saved
    pending.complete()                              row "finalize", or "wait_previous" before the next save: what the
    pending.finish()                                training thread must do for wait to return, and what follows it

Every method is called by all ranks. An error in any of them fails the engine.
"""

from __future__ import annotations

import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from ..environment import version_of
from ..results import Option
from .inner_stages import InnerSpan

__all__ = ["Engine", "Pending", "Setting", "future_pending"]


@dataclass(frozen=True, slots=True)
class Setting:
    """What adapters may need to know of the run."""

    rank: int
    world: int
    device: str  # "cpu" or "cuda"
    nbytes_of_rank: int
    optimizer: Any  # a torch.optim.Optimizer that owns the tensors of the state
    group: Any  # a gloo group of all ranks, of this engine alone
    keep: int  # newest checkpoints that must stay loadable, where an engine deletes old ones itself


def _nothing() -> None:
    pass


@dataclass(frozen=True, slots=True)
class Pending:
    """A save in flight. The defaults are those of an engine that blocks until everything is done."""

    fence: Callable[[], object] = _nothing
    wait: Callable[[], object] = _nothing
    complete: Callable[[], object] = _nothing
    finish: Callable[[], object] = _nothing


def future_pending(staged: Any, saved: Any) -> Pending:
    """Of an engine with futures for "the state may change" (None: already) and "saved"."""

    def wait() -> None:
        saved.result()

    def fence() -> None:
        if staged is not None:
            staged.result()

    return Pending(fence=fence, wait=wait)


class Engine(ABC):
    """One engine, opened once per rank. `save` gets a directory that does not exist and whose parent does."""

    title: ClassVar[str]
    distribution: ClassVar[str]  # whose version is recorded
    module: ClassVar[str]  # looked for, to see whether it is installed
    needs: ClassVar[tuple[str, ...]] = ()  # more modules that it imports, of packages installed apart
    options: ClassVar[tuple[Option, ...]]  # used, and why they are its best
    syncs: ClassVar[bool]  # files, directories and names are synced when it calls a checkpoint saved
    needs_cuda: ClassVar[bool] = False

    def __init__(self, setting: Setting) -> None:
        self.setting = setting

    @classmethod
    def absent(cls, device: str) -> str | None:
        """Why it cannot run here, or None."""
        if cls.needs_cuda and device != "cuda":
            return "needs a CUDA device"
        for module in (cls.module, *cls.needs):
            try:
                found = importlib.util.find_spec(module)
            except (ImportError, ValueError) as error:
                return f"{cls.distribution} cannot be imported: {error}"
            if not found:
                package = cls.distribution if module == cls.module else f"{module}, which {cls.distribution} needs,"
                return f"{package} is not installed"
        return None

    @classmethod
    def version(cls) -> str | None:
        return version_of(cls.distribution)

    @abstractmethod
    def save(self, state: Mapping[str, Any], directory: Path, step: int) -> Pending | None:
        """Begins a save; None when the engine leaves it out, which counts as skipped."""

    @abstractmethod
    def load(self, state: dict[str, Any], directory: Path) -> None:
        """Fills the tensors of `state` in place."""

    @abstractmethod
    def is_complete(self, directory: Path) -> bool:
        """What a job that resumes goes by: whether the engine left its mark of a finished checkpoint."""

    def traced(self) -> AbstractContextManager[list[InnerSpan]] | None:
        """Saves that begin and end in the block note their own stages, which the list has when it is over. None of an
        engine that tells nothing. Noting may cost time: such saves are not measured.
        """
        return None

    def poll(self) -> None:  # noqa: B027, most have nothing to do
        """Once a step, on the training thread."""

    def close(self) -> None:  # noqa: B027, most have nothing to do
        """Ends what runs in the background."""
