"""Engines with a fault that a measurement must find: in which row, or that it must refuse them a time."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch.distributed.checkpoint import CheckpointException

from snapstone.bench.engines import Engine, Pending
from snapstone.bench.engines.deepspeed import DeepSpeedFast
from snapstone.bench.results import Option

PLANTED_SECONDS = 0.1


class Honest(Engine):
    """Copies at the call, and writes one file."""

    title = "planted"
    distribution = "torch"
    module = "torch"
    options: ClassVar[tuple[Option, ...]] = ()
    syncs = True

    def save(self, state: Mapping[str, Any], directory: Path, step: int) -> Pending | None:
        self.write({name: tensor.clone() for name, tensor in state.items()}, directory)
        return Pending()

    def write(self, state: Mapping[str, Any], directory: Path) -> None:
        directory.mkdir(exist_ok=True)
        part = directory / f"{self.setting.rank}.part"
        torch.save(dict(state), part)
        part.rename(directory / f"{self.setting.rank}.pt")

    def load(self, state: dict[str, Any], directory: Path) -> None:
        for name, tensor in torch.load(directory / f"{self.setting.rank}.pt").items():
            state[name].copy_(tensor)

    def is_complete(self, directory: Path) -> bool:
        return len(list(directory.glob("*.pt"))) == self.setting.world


class SleepsInCall(Honest):
    def save(self, state: Mapping[str, Any], directory: Path, step: int) -> Pending | None:
        time.sleep(PLANTED_SECONDS)
        return super().save(state, directory, step)


class SleepsInFence(Honest):
    def save(self, state: Mapping[str, Any], directory: Path, step: int) -> Pending | None:
        super().save(state, directory, step)
        return Pending(fence=lambda: time.sleep(PLANTED_SECONDS))


class SleepsInFinish(Honest):
    def save(self, state: Mapping[str, Any], directory: Path, step: int) -> Pending | None:
        super().save(state, directory, step)
        return Pending(finish=lambda: time.sleep(PLANTED_SECONDS))


class SleepsInComplete(Honest):
    """Calls its checkpoint saved when the training thread has done its part."""

    def save(self, state: Mapping[str, Any], directory: Path, step: int) -> Pending | None:
        super().save(state, directory, step)
        completed = threading.Event()

        def complete() -> None:
            time.sleep(PLANTED_SECONDS)
            completed.set()

        return Pending(wait=completed.wait, complete=complete)


class HoldsTheInterpreter(Honest):
    """In the background, in a C call that keeps the interpreter lock."""

    def save(self, state: Mapping[str, Any], directory: Path, step: int) -> Pending | None:
        super().save(state, directory, step)
        begun = threading.Event()

        def hold() -> None:
            begun.wait()
            ctypes.PyDLL(None).usleep(int(PLANTED_SECONDS * 1e6))

        thread = threading.Thread(target=hold, daemon=True)
        thread.start()
        return Pending(fence=begun.set, wait=thread.join)


class Slow(Honest):
    """In the background, and in nobody's way; the next save must wait for it."""

    def save(self, state: Mapping[str, Any], directory: Path, step: int) -> Pending | None:
        super().save(state, directory, step)
        return Pending(wait=lambda: time.sleep(PLANTED_SECONDS))


class Torn(Honest):
    """Writes what the state is after the fence has let go."""

    def save(self, state: Mapping[str, Any], directory: Path, step: int) -> Pending | None:
        return Pending(finish=lambda: self.write(state, directory))


class Hasty(Honest):
    """Calls a checkpoint complete as soon as its directory is there."""

    def write(self, state: Mapping[str, Any], directory: Path) -> None:
        directory.mkdir(exist_ok=True)
        time.sleep(0.05)
        super().write(state, directory)
        time.sleep(0.05)

    def is_complete(self, directory: Path) -> bool:
        return directory.exists()


class Raises(Honest):
    def save(self, state: Mapping[str, Any], directory: Path, step: int) -> Pending | None:
        raise OSError(28, "No space left on device", str(directory))


class RaisesLikeDcp(Honest):
    """What is no Exception, where the training thread waits for a save."""

    def save(self, state: Mapping[str, Any], directory: Path, step: int) -> Pending | None:
        def wait() -> None:
            raise CheckpointException("write", {self.setting.rank: wrapped})

        wrapped: Any = (OSError(28, "No space left on device"), None)
        return Pending(wait=wait)


class Exits(Honest):
    def save(self, state: Mapping[str, Any], directory: Path, step: int) -> Pending | None:
        sys.exit("cannot go on")


class FilesOfDeepSpeed(DeepSpeedFast):
    """With the writer that needs no CUDA."""

    needs_cuda = False
    writer = "python"


class Skips(Honest):
    """Leaves out every other save once training is on its way."""

    def save(self, state: Mapping[str, Any], directory: Path, step: int) -> Pending | None:
        return None if step > 4 and step % 2 else super().save(state, directory, step)


class Dies(Honest):
    """Rank 1 is killed in its sixth save."""

    def save(self, state: Mapping[str, Any], directory: Path, step: int) -> Pending | None:
        if step == 6 and self.setting.rank == 1:
            os.kill(os.getpid(), 9)
        return super().save(state, directory, step)


class Hangs(Honest):
    """Starts a process that nobody ends, and never comes back."""

    def save(self, state: Mapping[str, Any], directory: Path, step: int) -> Pending | None:
        print("the save begins", flush=True)
        subprocess.Popen(["sleep", "987654"], start_new_session=True)
        time.sleep(PLANTED_SECONDS * 10_000)
        return None
