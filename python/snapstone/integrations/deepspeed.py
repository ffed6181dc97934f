"""DeepSpeed 0.19: `engine.save_checkpoint` through the engine, asynchronous, durable, verified.

    engine, *_ = deepspeed.initialize(...)
    attach(engine)

`save_checkpoint` and `load_checkpoint` stay what they are called. A save returns when the snapshot is taken; `latest`
names it once every rank's files are durable. Random generators are saved per rank and restored.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

import snapstone as ss

from .. import _native
from ..collective import Deadline, Group
from ..config import SaveOptions
from ..errors import CheckpointError, CorruptCheckpointError
from .directories import make_directories
from .patches import Patches
from .versions import require

VERSION = require("deepspeed", "0.19", "0.20")

from deepspeed.runtime.checkpoint_engine import CheckpointCommitInfo, TorchCheckpointEngine  # noqa: E402
from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointEngine as _CheckpointEngine  # noqa: E402
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler  # noqa: E402
from deepspeed.runtime.zero.config import ZeroStageEnum  # noqa: E402
from deepspeed.utils import fragment_address  # noqa: E402

from .deepspeed_base.files import FOLDER, Collected, Files  # noqa: E402
from .deepspeed_base.stub import is_stub, mend, write_latest, write_stubs  # noqa: E402

__all__ = ["CheckpointEngine", "attach", "detach", "export"]

_SAFE = (LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address)
_OPTIONS = ("codec", "derive", "on_unchanged", "host_memory_budget", "timeout")
_log = logging.getLogger("snapstone")


def attach(
    engine: Any,
    *,
    asynchronous: bool = True,
    rng: bool = True,
    safe_classes: Iterable[type] = (),
    save_options: Mapping[str, Any] | None = None,
) -> CheckpointEngine:
    """Makes `engine` save and load through the engine, on every rank. What stock DeepSpeed saved still loads.

    Args:
        engine: what `deepspeed.initialize` returned first.
        asynchronous: save_checkpoint returns when the snapshot is taken. An error is raised on every rank by the next
            save_checkpoint or load_checkpoint, or by `wait` of the result.
        rng: save random generators, and restore them in load_checkpoint, unless it loads no optimizer states.
        safe_classes: classes of yours in `client_state` that may be unpickled; DeepSpeed's own are known.
        save_options: arguments of `snapstone.save`: codec, derive, on_unchanged, host_memory_budget, timeout.

    Returns:
        The checkpoint engine that is now `engine.checkpoint_engine`.

    Raises:
        ValueError: attached already; configured in a way that would not be durable or complete: with a decoupled
            writer, node-local checkpoints, or an optimizer on NVMe.
    """
    if isinstance(engine.checkpoint_engine, CheckpointEngine):
        raise ValueError("attached already")
    refusals = {
        "checkpoint.writer or a decoupled checkpoint engine": engine.checkpoint_engine.is_decoupled(),
        "checkpoint.use_node_local_storage": engine.use_node_local_storage(),
        "offload_optimizer to nvme": engine.zero_nvme_offload_optimizer(),
    }
    if refused := [name for name, present in refusals.items() if present]:
        raise ValueError(f"snapstone does not save with {', '.join(refused)} in DeepSpeed's configuration")
    options = dict(save_options or {})
    if unknown := sorted(options.keys() - set(_OPTIONS)):
        raise TypeError(f"save_options: {', '.join(unknown)}: not among {', '.join(_OPTIONS)}")
    timeout_seconds = SaveOptions.of(**options).timeout_seconds
    attached = CheckpointEngine(engine, asynchronous, rng, (*_SAFE, *safe_classes), options, timeout_seconds)
    attached.patches.set(engine, "save_checkpoint", attached.save_checkpoint)
    attached.patches.set(engine, "load_checkpoint", attached.load_checkpoint)
    attached.patches.set(engine, "checkpoint_engine", attached)
    return attached


def detach(engine: Any) -> None:
    """Ends saves, on every rank, and puts back what `attach` replaced.

    Raises:
        ValueError: nothing is attached. CheckpointError, OSError: a save failed; all is put back nevertheless.
    """
    attached = engine.checkpoint_engine
    if not isinstance(attached, CheckpointEngine):
        raise ValueError("not attached")
    try:
        attached.wait()
    finally:
        attached.patches.undo()


def export(
    directory: str | os.PathLike[str], into: str | os.PathLike[str], *, safe_classes: Iterable[type] = ()
) -> None:
    """Writes stock files of DeepSpeed, from the checkpoint in `directory` (save_dir/TAG) into another directory.

    In one process, one file after the other in memory. Put a file `latest` with the tag beside `into`.

    Raises:
        CheckpointError: as from `snapstone.load`. FileExistsError: a file is there already.
    """
    files = Files(directory)
    os.makedirs(into, exist_ok=True)
    with torch.serialization.safe_globals([*_SAFE, *safe_classes]):
        for name in files.names():
            path = os.path.join(into, name)
            os.makedirs(os.path.dirname(path), exist_ok=True)
            with open(path, "xb") as file:
                torch.save(files.load(name), file)


@dataclass(slots=True)
class _Running:
    """A save that has begun. `error` is set before `ended`."""

    info: CheckpointCommitInfo
    ended: threading.Event = field(default_factory=threading.Event)
    error: BaseException | None = None


class CheckpointEngine(_CheckpointEngine):  # type: ignore[misc]
    """What DeepSpeed calls. Made by `attach`.

    To DeepSpeed it is a decoupled engine with nothing to commit: that way DeepSpeed leaves `latest` to it.
    """

    def __init__(
        self,
        engine: Any,
        asynchronous: bool,
        rng: bool,
        safe_classes: tuple[type, ...],
        options: Mapping[str, Any],
        timeout_seconds: float,
    ) -> None:
        super().__init__()
        self.name = "snapstone"
        self.asynchronous = asynchronous
        self.patches = Patches()
        self._replaced = engine.checkpoint_engine
        self._engine = engine
        self._stock = TorchCheckpointEngine()
        self._stock_save, self._stock_load = engine.save_checkpoint, engine.load_checkpoint
        self._rng = rng
        self._safe_classes = safe_classes
        self._options = options
        self._timeout_seconds = timeout_seconds
        self._saving = False  # inside of save_checkpoint
        self._collected: Collected | None = None
        self._refused: Exception | None = None  # why this rank cannot store what DeepSpeed gave it
        self._info: CheckpointCommitInfo | None = None
        self._running: _Running | None = None
        self._opened: Files | None = None  # while load_checkpoint reads
        self._read: set[bytes] = set()  # which kinds of files it has read

    # ---- what takes the place of the methods of DeepSpeedEngine --------------------------------------------------

    def save_checkpoint(
        self,
        save_dir: Any,
        tag: Any = None,
        client_state: Any = None,
        save_latest: bool = True,
        exclude_frozen_parameters: bool = False,
    ) -> Any:
        """`DeepSpeedEngine.save_checkpoint`. When it returns the snapshot is taken, and the save before is durable."""
        self.wait()
        self._saving = True
        result: Any = None

        def collect() -> bytes:
            nonlocal result
            state = {} if client_state is None else client_state
            result = self._stock_save(save_dir, tag, state, save_latest, exclude_frozen_parameters)
            if self._refused is not None:
                raise self._refused
            return b""

        try:
            self._together("collected", collect)
            collected, info = self._collected, self._info
        finally:
            self._saving, self._collected, self._info, self._refused = False, None, None, None
        assert collected is not None
        assert info is not None
        self._begin(collected, info)
        if not self.asynchronous:
            self.wait()
        return result

    def load_checkpoint(
        self,
        load_dir: Any,
        tag: Any = None,
        load_module_strict: bool = True,
        load_optimizer_states: bool = True,
        load_lr_scheduler_states: bool = True,
        load_module_only: bool = False,
        custom_load_fn: Any = None,
    ) -> Any:
        """`DeepSpeedEngine.load_checkpoint`, once saves in flight have ended.

        Raises:
            CheckpointError: as from `snapstone.load`; the files are of two saves, one of them stock.
        """
        self.wait()
        self._read = set()
        path: Any = None
        client_state: Any = None

        def load() -> bytes:
            nonlocal path, client_state
            path, client_state = self._stock_load(
                load_dir,
                tag,
                load_module_strict=load_module_strict,
                load_optimizer_states=load_optimizer_states,
                load_lr_scheduler_states=load_lr_scheduler_states,
                load_module_only=load_module_only,
                custom_load_fn=custom_load_fn,
            )
            return b" ".join(self._read)

        try:
            self._together("mended", lambda: self._mend(load_dir, tag))
            kinds = {kind for read in self._together("loaded", load) for kind in read.split()}
            if len(kinds) > 1:
                raise CorruptCheckpointError(
                    "holds files of two saves: some of stock DeepSpeed, and stubs of an earlier save", path=path
                )
            if path is not None and self._rng and load_optimizer_states and not load_module_only and is_stub(path):
                generators = self._files(path).generators(dist.get_rank(), dist.get_world_size())
                if generators is not None:
                    ss.restore_rng(generators)
        finally:
            self._opened = None
        return path, client_state

    def wait(self) -> None:
        """Waits until the save begun last is durable and `latest` names it. Every rank calls.

        Raises:
            CheckpointError, OSError: it failed, on this rank or on another (`RankFailedError`).
        """
        self._together("ended", self._end)

    def _together(self, label: str, step: Callable[[], bytes]) -> list[bytes]:
        """Runs `step` on every rank; where it raises on one, every rank raises. What it returned, in rank order."""
        channel = Group.create().channel("deepspeed")
        error: BaseException | None = None
        payload = b""
        try:
            payload = step()
        except BaseException as failure:
            error = failure
        try:
            return channel.vote(label, error, payload, Deadline(self._timeout_seconds))
        finally:
            channel.close()

    def _end(self) -> bytes:
        running, self._running = self._running, None
        if running is not None:
            running.ended.wait()
            if running.error is not None:
                raise running.error
        return b""

    def _begin(self, collected: Collected, info: CheckpointCommitInfo) -> None:
        directory = os.path.join(os.path.abspath(info.save_dir), info.tag)
        state = collected.state(ss.capture_rng() if self._rng else None)
        handle = ss.async_save(
            state,
            checkpoint_id=os.path.join(directory, FOLDER),
            step=self._engine.global_steps,
            overwrite=True,
            **self._options,
        )
        self._running = running = _Running(info)
        handle.upload_completion.add_done_callback(partial(self._ended, running, directory))

    def _ended(self, running: _Running, directory: str, upload: Future[Any]) -> None:
        try:
            running.error = upload.exception()
            if running.error is None and dist.get_rank() == 0:
                self._publish(running.info, directory)
        except BaseException as error:
            running.error = error
        finally:
            if running.error is not None:
                _log.error("the save to %s failed: %s", directory, running.error)
            running.ended.set()

    @staticmethod
    def _publish(info: CheckpointCommitInfo, directory: str) -> None:
        """On rank 0, once the ranks have committed."""
        write_stubs(directory)
        if info.save_latest:
            write_latest(info.save_dir, info.tag)

    @staticmethod
    def _mend(load_dir: Any, tag: Any) -> bytes:
        """On rank 0: what a killed job has left in `load_dir` goes, and the names of what it has committed come."""
        if dist.get_rank() != 0 or not os.path.isdir(load_dir):
            return b""
        for entry in os.scandir(load_dir):
            if entry.is_dir(follow_symlinks=False):
                _native.reap(entry.path)
        try:
            if tag is None:
                with open(os.path.join(load_dir, "latest"), encoding="utf-8") as file:
                    tag = file.read().strip()
            mend(os.path.join(load_dir, str(tag)))
        except (CheckpointError, OSError) as error:  # the load says what it cannot do without
            _log.warning("%s is loaded as it is: %s", load_dir, error)
        return b""

    # ---- what DeepSpeed calls ------------------------------------------------------------------------------------

    def create(self, info: CheckpointCommitInfo) -> None:
        if self._saving:
            self._collected, self._info = Collected(), info
        else:
            self._stock.create(info)

    def makedirs(self, path: Any, exist_ok: bool = False) -> None:
        make_directories(path, exist_ok=exist_ok)

    def save(self, state_dict: Any, path: str) -> None:
        """Within save_checkpoint: takes values now, and tensors before that returns. Else, as for
        `save_16bit_model`: a stock file, now.
        """
        if self._collected is None or self._info is None:
            self._stock.save(state_dict, path)
            return
        try:
            self._collected.add(os.path.relpath(path, os.path.join(self._info.save_dir, self._info.tag)), state_dict)
        except Exception as error:  # raised on all ranks together: DeepSpeed has barriers to pass before
            self._refused = self._refused or error

    def load(self, path: str, map_location: Any = None) -> Any:
        """What the file at `path` stands for, without pickle but for known classes; or a stock file, as stock does."""
        if not is_stub(path):
            self._read.add(b"stock")
            return self._stock.load(path, map_location)
        self._read.add(b"stub")
        files = self._files(path)
        device = map_location if isinstance(map_location, str | torch.device) else "cpu"
        name = os.path.relpath(os.path.abspath(path), files.directory)
        with torch.serialization.safe_globals(list(self._safe_classes)):
            return files.load(name, rank=dist.get_rank(), device=device)

    def _files(self, path: str) -> Files:
        directory = os.path.dirname(os.path.abspath(path))
        if self._opened is None or self._opened.directory != directory:
            self._opened = Files(directory)
        return self._opened

    def commit(self, info: CheckpointCommitInfo) -> Any:
        """Only of files that are written already."""
        return self._stock.commit(info)

    def is_data_parallel_writer(self, dp_rank: int) -> bool:
        return bool(self._replaced.is_data_parallel_writer(dp_rank))

    def is_decoupled(self) -> bool:
        return True

    def get_commit_info(self) -> None:
        return None

    def preserves_storage_sharing(self) -> bool:
        return False  # of views only what they show is stored, so there is nothing to clone

    def cleanup(self) -> None:
        """From `engine.destroy()`: waits for the save in flight."""
        self._end()
