"""The engines that the demo runs on, behind one small interface: snapstone, torch.distributed.checkpoint (DCP), and DCP
with snapstone's storage below it, which makes the same calls as DCP and has the promises of snapstone.

DCP alone is used as documented, with its defaults. It has neither a commit point nor a way to tell whole checkpoints
from broken ones, so the two questions the demo asks of a directory are answered from whether `.metadata` exists. It
leaves its metadata and directories unsynced, so rank 0 syncs them, and that counts as part of its time to durable.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver

State = dict[str, Any]


class InFlight:
    """A save that runs while training goes on."""

    def __init__(self, future: Future[Any], started: float, make_durable: Callable[[], None] | None = None) -> None:
        self.call_s = time.perf_counter() - started
        self.durable_s = 0.0  # from the call to durable and committed; known once finish() returns
        self._future = future
        self._done = threading.Event()
        self._error: BaseException | None = None

        def completed(_: Future[Any]) -> None:
            try:
                if make_durable is not None:
                    make_durable()
                self.durable_s = time.perf_counter() - started
            except BaseException as error:
                self._error = error
            finally:
                self._done.set()

        future.add_done_callback(completed)

    def finish(self) -> None:
        """Waits for the save; raises what it raised."""
        self._future.result()
        self._done.wait()
        if self._error is not None:
            raise self._error


class Engine(Protocol):
    name: str

    def save(self, state: State, path: Path) -> None:
        """Returns when the checkpoint is durable."""

    def async_save(self, state: State, path: Path, optimizer: torch.optim.Optimizer) -> InFlight: ...

    def load(self, state: State, path: Path) -> None:
        """Fills all of `state` in place. The checkpoint may hold more, such as what belongs to other ranks."""

    def problem(self, path: Path) -> str | None:
        """Why `path` cannot be resumed from, or None."""

    def unfinished(self, run: Path) -> list[Path]:
        """Directories of saves that have begun and are not committed. Cheap: the demo polls it to time its kill."""


def newest_valid(engine: Engine, run: Path) -> Path | None:
    """The checkpoint to resume from: the highest step that opens and verifies."""
    for path in sorted(run.glob("step-*"), reverse=True):
        if engine.problem(path) is None:
            return path
    return None


class SnapstoneEngine:
    name = "snapstone"

    def __init__(self) -> None:
        import snapstone

        self._snapstone = snapstone

    def save(self, state: State, path: Path) -> None:
        self._snapstone.save(state, checkpoint_id=path)

    def async_save(self, state: State, path: Path, optimizer: torch.optim.Optimizer) -> InFlight:
        started = time.perf_counter()
        handle = self._snapstone.async_save(state, checkpoint_id=path, fence=optimizer)
        return InFlight(handle.upload_completion, started)

    def load(self, state: State, path: Path) -> None:
        loaded = self._snapstone.load(state, checkpoint_id=path, strict=False)
        if loaded.missing_keys:
            raise KeyError(f"{path} lacks {', '.join(loaded.missing_keys)}")

    def problem(self, path: Path) -> str | None:
        try:
            with self._snapstone.Checkpoint.open(path):
                report = self._snapstone.verify(path, level="quick")
        except self._snapstone.CheckpointError as error:
            return type(error).__name__
        return None if report else "; ".join(report.problems)

    def unfinished(self, run: Path) -> list[Path]:
        return staging_directories(run)


class DcpEngine:
    name = "dcp"

    def __init__(self) -> None:
        # DCP runs collectives on a thread of its own, which must not share a group with the trainer's.
        self._group = dist.new_group(backend="gloo") if dist.is_initialized() else None
        self._coordinator = not dist.is_initialized() or dist.get_rank() == 0

    def save(self, state: State, path: Path) -> None:
        state_dict_saver.save(state, checkpoint_id=path, process_group=self._group)
        self._sync(path)

    def async_save(self, state: State, path: Path, optimizer: torch.optim.Optimizer) -> InFlight:
        started = time.perf_counter()
        response = state_dict_saver.async_save(state, checkpoint_id=path, process_group=self._group)
        future = response if isinstance(response, Future) else response.upload_completion
        return InFlight(future, started, lambda: self._sync(path))

    def load(self, state: State, path: Path) -> None:
        state_dict_loader.load(state, checkpoint_id=path, process_group=self._group)

    def problem(self, path: Path) -> str | None:
        return None if (path / ".metadata").exists() else "no .metadata"

    def unfinished(self, run: Path) -> list[Path]:
        newest = sorted(name for name in os.listdir(run) if name.startswith("step-"))[-2:]
        return [run / name for name in newest if not (run / name / ".metadata").exists()]

    def _sync(self, path: Path) -> None:
        if self._coordinator:
            for entry in [*path.iterdir(), path, path.parent]:
                sync(entry)


class SnapstoneDcpEngine(DcpEngine):
    """Every save, load and check is a call of DCP, or one that DCP makes of its storage."""

    name = "snapstone.dcp"

    def __init__(self) -> None:
        import snapstone.dcp

        super().__init__()
        self._storage = snapstone.dcp

    def save(self, state: State, path: Path) -> None:
        state_dict_saver.save(state, storage_writer=self._storage.StorageWriter(path), process_group=self._group)

    def async_save(self, state: State, path: Path, optimizer: torch.optim.Optimizer) -> InFlight:
        started = time.perf_counter()
        writer = self._storage.StorageWriter(path)
        response = state_dict_saver.async_save(state, storage_writer=writer, process_group=self._group)
        return InFlight(response if isinstance(response, Future) else response.upload_completion, started)

    def load(self, state: State, path: Path) -> None:
        state_dict_loader.load(state, storage_reader=self._storage.StorageReader(path), process_group=self._group)

    def problem(self, path: Path) -> str | None:
        try:
            self._storage.StorageReader(path).read_metadata()
        except Exception as error:
            return type(error).__name__
        return None

    def unfinished(self, run: Path) -> list[Path]:
        return staging_directories(run)


ENGINES: dict[str, Callable[[], Engine]] = {
    engine.name: engine for engine in (SnapstoneEngine, DcpEngine, SnapstoneDcpEngine)
}


def staging_directories(run: Path) -> list[Path]:
    """Of snapstone's saves that were begun and not committed."""
    return [run / name for name in os.listdir(run) if name.startswith(".staging-")]


def sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def drop_page_cache(path: Path) -> None:
    """Makes the next read of every file under `path` come from the disk. The files must be synced already."""
    for file in path.rglob("*"):
        if file.is_file():
            descriptor = os.open(file, os.O_RDONLY)
            try:
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(descriptor)


def directory_bytes(path: Path) -> int:
    """Bytes of the files under `path`, while others may be removing them."""
    total = 0
    for file in path.rglob("*"):
        with contextlib.suppress(FileNotFoundError):
            total += file.stat().st_size if file.is_file() else 0
    return total
