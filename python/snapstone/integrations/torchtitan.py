"""torchtitan's checkpoints through the engine: `--override.imports snapstone.integrations.torchtitan.use`.

The trainer calls a checkpoint manager, and this is another one, with the same configuration, names of directories and
lines in the log. It saves through `snapstone.async_save` and not through `dcp.async_save` with the engine's storage,
for what a user gets from that:

- The training thread describes the state and goes on. Parameters and optimizer state are copied behind the next
  forward and backward pass, and the optimizers' own step waits for what is missing then: on the host without
  accelerators, in a stream with them. `maybe_wait_for_staging`, which the trainer calls before the step, has nothing
  left to do. torch's stagers copy everything first, or keep a second copy of it all in pinned or shared memory.
- Ranks agree through the key-value store: no process group is made, and no collective runs beside those of the
  training.
- base, codec, derive, full_every and on_unchanged are options of the same call.

What it costs: DCP's planners and their subclasses have no part in it. `snapstone.dcp.StorageReader` reads the result.

One mode is as good as the other: async and async_with_pinned_mem do the same here, since staging memory is the
engine's; what is pinned with them is pinned where there is an accelerator, and both run without one.
"""

from __future__ import annotations

import copy
import os
import queue
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.stateful import Stateful

from .. import (
    Checkpoint,
    IncompatibleCheckpointError,
    SaveHandle,
    async_save,
    capture_rng,
    load,
    manifest,
    restore_rng,
    save,
)
from ..collective import Deadline, Group
from ..config import HOST_MEMORY_BUDGET_DEFAULT, LoadOptions, SaveOptions, seconds_of
from ..dcp import StorageReader
from .step_folder import StepFolder
from .versions import require

require("torchtitan", "0.3", "0.4")

from torchtitan.components.checkpointer import (  # noqa: E402
    DATALOADER,
    MODEL,
    OPTIMIZER,
    AsyncMode,
    BaseCheckpointManager,
    CheckpointManager,
)
from torchtitan.components.checkpointer.base import purge_thread  # noqa: E402
from torchtitan.config.override import derive as derived_config  # noqa: E402
from torchtitan.config.override import override  # noqa: E402
from torchtitan.observability import structured_logger  # noqa: E402
from torchtitan.tools import filesystem  # noqa: E402
from torchtitan.tools.logging import logger  # noqa: E402

__all__ = ["SnapstoneCheckpointManager", "use"]

RNG = "rng"  # a state like torchtitan's own: exclude_from_loading takes it
_CHUNK_BYTES = 1 << 20
_LAST_WORDS_SECONDS = 60.0  # for a save in flight, when the training has failed


class SnapstoneCheckpointManager(CheckpointManager):  # type: ignore[misc]
    """torchtitan's CheckpointManager, with the engine in the place of DCP for everything but Hugging Face's format."""

    @dataclass(kw_only=True, slots=True)
    class Config(CheckpointManager.Config):  # type: ignore[misc]
        """What torchtitan's has, and the engine's options, which docs/tuning.md explains."""

        fence: Literal["optimizer", "now"] = "optimizer"
        """Until when an asynchronous save may still read the state: the next step, or the return of the call."""

        base: str | None = None
        """An earlier checkpoint, or "auto": what it has already is not written again."""

        codec: str | None = None
        full_every: int | None = None
        keyframe_every: int = 8
        derive: bool = False
        on_unchanged: Literal["warn", "raise", "ignore"] = "warn"

        host_memory_budget: int | None = None
        """Bytes of staging memory. Without it SNAPSTONE_HOST_MEMORY_BUDGET counts, or for asynchronous saves what this
        rank's state needs, as with torch's stagers, so that no step waits for a disk."""

        verify: bool = True
        """Check the digest of every chunk that is loaded."""

        strategy: Literal["auto", "direct", "scatter", "broadcast"] = "auto"
        """Which rank reads what when a checkpoint is loaded."""

        allow_pickle: bool = False
        """Save and load Python values that only pickle can store; for DCP's checkpoints, those that need
        weights_only=False."""

        timeout: float | None = None
        """Seconds after which a save or load fails on every rank."""

        rng: Literal["reseed", "keep", "raise", "off"] = "reseed"
        """Random generators are saved per rank, and restored when as many ranks resume. On another number of ranks:
        seeded anew from the saved ones, left alone, or an error. "off": neither saved nor restored."""

        def __post_init__(self) -> None:
            CheckpointManager.Config.__post_init__(self)
            if self.fence not in ("optimizer", "now"):
                raise ValueError(f"fence={self.fence!r}: use 'optimizer' or 'now'")
            if self.rng not in ("reseed", "keep", "raise", "off"):
                raise ValueError(f"rng={self.rng!r}: use 'reseed', 'keep', 'raise' or 'off'")
            SaveOptions.of(**_save_options(self))
            LoadOptions.of(strategy=self.strategy, timeout=self.timeout)

    def __init__(self, config: Config, **components: Any) -> None:
        stock = copy.copy(config)
        stock.async_mode, stock.keep_latest_k = "disabled", 0  # no process group, and a thread for removing of our own
        super().__init__(stock, **components)
        if not self.enable:
            return
        if filesystem.is_remote(self.folder):
            raise ValueError(f"checkpoint.folder={self.folder}: the engine saves to mounted file systems alone")
        if dist.is_initialized() and dist.get_backend() == "fake":
            raise ValueError("comm.mode: ranks that are not there cannot agree on a checkpoint; use torchtitan's own")
        self.config = config
        self.async_mode = AsyncMode(config.async_mode)
        self.steps = StepFolder(self.folder)
        self.save_future: Future[Any] | None = None
        self._handle: SaveHandle | None = None
        self._begins_anew = False
        if config.rng != "off":
            self.states[RNG] = _Generators(config.rng)
        self.keep_latest_k = config.keep_latest_k
        self.purge_queue: queue.Queue[str | None] = queue.Queue()
        self.purge_thread = threading.Thread(
            target=purge_thread, args=(self.purge_queue, _remove), name="snapstone-purge", daemon=True
        )
        self.purge_thread.start()

    # Saving -----------------------------------------------------------------------------------------------------------

    @structured_logger.log_trace_span("checkpoint_save")  # type: ignore[untyped-decorator]
    @torch.no_grad()
    def _save(self, curr_step: int, last_step: bool = False) -> bool:
        if not self._should_save(curr_step, last_step):
            return False
        structured_logger.add_step_tag("checkpoint_save")
        self.maybe_wait_for_saving()
        begin = time.monotonic()
        phase = "saving" if self.async_mode == AsyncMode.DISABLED else "staging"
        logger.info(f"{phase.capitalize()} the checkpoint.")
        if last_step:
            self._save_last_step(curr_step)
            logger.info(f"Last step checkpoint completed in {time.monotonic() - begin:.2f}s")
            return True
        states = self._flattened_model_states_sd()
        self.dcp_save(states, self._create_checkpoint_id(curr_step), self.async_mode)
        if self.async_mode == AsyncMode.DISABLED:
            self._retire(curr_step)
        # Parameters and optimizer state may still be copied until the optimizers' next step.
        logger.info(f"Finished {phase} the checkpoint in {time.monotonic() - begin:.2f} seconds.")
        return True

    @torch.no_grad()
    def dcp_save(
        self,
        state_dict: dict[str, Any],
        checkpoint_id: str,
        async_mode: AsyncMode,
        enable_garbage_collection: bool = False,
        to_hf: bool = False,
    ) -> Future[Any] | None:
        """One save. In the asynchronous modes the future of the durable checkpoint, which is also `save_future`."""
        step = int(os.path.basename(checkpoint_id).rpartition("-")[2])
        if self._leads:
            self.steps.make_room(os.path.basename(checkpoint_id), for_others=to_hf)
        if to_hf:
            _together("torchtitan.hf", None, b"", self.config)  # nobody writes before there is room
            super().dcp_save(state_dict, checkpoint_id, AsyncMode.DISABLED, enable_garbage_collection, to_hf=True)
            self._settle(step)
            return None
        plain = {key: _plain(value) for key, value in state_dict.items()}
        arguments: dict[str, Any] = {
            **_save_options(self.config),
            "checkpoint_id": checkpoint_id,
            "step": step,
            "dcp_marker": True,
        }
        if async_mode == AsyncMode.DISABLED:
            save(plain, **arguments)
            self._settle(step)
            return None
        arguments["host_memory_budget"] = _budget(self.config, plain)
        self._handle = async_save(plain, fence=self._fence(), **arguments)
        # Set when retention is done too, so that whoever waits for it finds the folder as it stays.
        told: Future[Any] = Future()
        self.save_future = told
        self._handle.upload_completion.add_done_callback(partial(self._ended, step, told))
        return told

    def _fence(self) -> Any:
        optimizers = list(getattr(self.states[OPTIMIZER], "optimizers", ()))
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        # A step that may be replayed from a CUDA graph calls no hooks.
        if self.config.fence == "now" or not groups or any(group.get("capturable") for group in groups):
            return "now"
        return optimizers

    def _ended(self, step: int, told: Future[Any], upload: Future[Any]) -> None:
        error = upload.exception()
        if error is not None:
            logger.error(f"The checkpoint of step {step} was not saved: {error}")
            told.set_exception(error)
            return
        try:
            self._settle(step)
            self._retire(step)
        finally:
            told.set_result(upload.result())

    def _maybe_wait_for_staging(self) -> None:
        """Nothing: the optimizers' step waits by itself, and no longer than it has to."""

    def _wait_for_saving(self) -> None:
        future, self.save_future, self._handle = self.save_future, None, None
        if future is not None:
            future.result()

    # Retention --------------------------------------------------------------------------------------------------------

    @property
    def _leads(self) -> bool:
        return not dist.is_initialized() or dist.get_rank() == 0

    def _retire(self, durable: int) -> None:
        """Older checkpoints go, now that the one of step `durable` is there to stay."""
        if self._leads and self.keep_latest_k > 0:
            self._remove_all(lambda: self.steps.prune(self.keep_latest_k, durable))

    def _settle(self, step: int) -> None:
        if self._leads:
            self._remove_all(lambda: self.steps.settle(f"step-{step}"))

    def _remove_all(self, take_away: Any) -> None:
        """A checkpoint that cannot be removed is no reason to fail one that was saved."""
        try:
            for path in take_away():
                self.purge_queue.put(path)
        except OSError as error:
            logger.warning(f"Old checkpoints stay: {error}")

    def _purge_stale_checkpoints(self) -> None:
        """What torchtitan calls while a save is in flight: nothing is old enough to go yet."""

    # Loading ----------------------------------------------------------------------------------------------------------

    def _load(self, step: int = -1) -> bool:
        """Rank 0 alone looks what is there. torchtitan asks every rank for the folder, and where the answers differ
        some would begin anew.
        """
        found = self._find_load_step() if step == -1 else step
        self._begins_anew = found == -1
        try:
            return bool(super()._load(found))
        finally:
            self._begins_anew = False

    def _find_load_step(self, folder: str = "") -> int:
        """The step to resume from, as rank 0 sees it; an error there is one on every rank."""
        if self._begins_anew:
            return -1  # asked again, and only where the folder exists
        found, error = -1, None
        if self._leads:
            try:
                found = (StepFolder(folder) if folder else self.steps).newest()
            except Exception as failure:
                error = failure
        votes = _together("torchtitan.find", error, str(found).encode(), self.config)
        return int(votes[0])

    @torch.no_grad()
    def dcp_load(self, state_dict: dict[str, Any], checkpoint_id: str, from_hf: bool, from_quantized: bool) -> None:
        """Fills `state_dict` from the engine's checkpoints, from DCP's, or from Hugging Face's."""
        if from_hf or filesystem.is_remote(checkpoint_id):
            super().dcp_load(state_dict, checkpoint_id, from_hf, from_quantized)
            return
        wanted = {key: value for key, value in state_dict.items() if key != RNG}
        if manifest.is_checkpoint(checkpoint_id):
            self._load_own(wanted, state_dict.get(RNG), checkpoint_id)
        else:
            dcp_load(wanted, storage_reader=StorageReader(checkpoint_id, allow_pickle=self.config.allow_pickle))
            if RNG in state_dict:
                logger.info(
                    "The checkpoint is of torch's format, which has no random generators: they stay as they are."
                )
        # Model state is flattened into the state, where nothing calls its load_state_dict.
        if MODEL in self.states:
            self.states[MODEL].load_state_dict(wanted)

    def _load_own(self, state_dict: dict[str, Any], generators: _Generators | None, checkpoint_id: str) -> None:
        plain = {key: _plain(value) for key, value in state_dict.items()}
        target = dict(plain)
        if generators is not None:
            target[RNG] = generators.state_dict()
        loaded = load(
            target,
            checkpoint_id=checkpoint_id,
            strict=False,  # what is in the checkpoint and not wanted stays there, as under DCP
            cast=True,  # as under DCP
            verify=self.config.verify,
            strategy=self.config.strategy,
            allow_pickle=self.config.allow_pickle,
            timeout=self.config.timeout,
        )
        missing = [name for name in loaded.missing_keys if generators is None or not name.startswith(f"{RNG}.")]
        _together("torchtitan.load", _missing_error(missing, checkpoint_id), b"", self.config)
        for key, value in state_dict.items():
            if isinstance(value, Stateful):
                value.load_state_dict(target[key])
            else:
                state_dict[key] = target[key]
        if generators is not None:
            generators.restore(target[RNG], loaded)
            _draw_apart(self.states[DATALOADER])

    # The end ----------------------------------------------------------------------------------------------------------

    def _close(self) -> None:
        future, handle = getattr(self, "save_future", None), getattr(self, "_handle", None)
        self.save_future = self._handle = None
        failing = sys.exception() is not None
        try:
            if future is not None:
                future.result(_LAST_WORDS_SECONDS if failing else None)
        except FutureTimeoutError:
            if handle is not None:
                handle.cancel()
            logger.error("The checkpoint in flight was given up.")
        except Exception:  # logged when it came up
            if not failing:
                raise
        finally:
            super()._close()


@override(target=BaseCheckpointManager.Config, description="snapstone's engine for checkpoints")  # type: ignore[untyped-decorator]
def use(config: Any, **options: Any) -> SnapstoneCheckpointManager.Config:
    """The override: `--override.imports 'snapstone.integrations.torchtitan.use={"codec": "zstd"}'`.

    Raises:
        TypeError: the job has another checkpoint manager than torchtitan's DCP one.
        ValueError: an option that there is not, or that is wrong.
    """
    if type(config) not in (CheckpointManager.Config, SnapstoneCheckpointManager.Config):
        raise TypeError(
            f"{type(config).__qualname__}: snapstone takes the place of torchtitan's CheckpointManager, not of this one"
        )
    return derived_config(config, SnapstoneCheckpointManager.Config, **options)  # type: ignore[no-any-return]


class _Generators:
    """The random generators as one of the trainer's states."""

    def __init__(self, on_change: Any) -> None:
        self._on_change = on_change

    def state_dict(self) -> dict[str, Any]:
        return capture_rng()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        restore_rng(state_dict, on_change=self._on_change)

    def restore(self, own: dict[str, Any], checkpoint: Checkpoint) -> None:
        """`own`: what `state_dict` gave, filled as far as `checkpoint` has it."""
        keys = sorted({name.split(".")[1] for name in checkpoint.keys() if name.startswith(f"{RNG}.")})  # noqa: SIM118
        if not keys:
            logger.info("The checkpoint has no random generators: they stay as they are.")
            return
        saved: dict[str, Any] = own if own.keys() <= set(keys) else dict.fromkeys(keys)
        if saved is not own and self._on_change == "reseed":
            saved[keys[0]] = {"torch": checkpoint.get_tensor(f"{RNG}.{keys[0]}.torch")}
        self.load_state_dict(saved)


def _draw_apart(dataloader: Any) -> None:
    """An iterator of torch's loaders draws a seed when it is made. The run that was saved had made its own before: this
    one draws from a copy of the generator, which the training then finds as it was.
    """
    if getattr(dataloader, "generator", False) is None:
        dataloader.generator = torch.Generator().set_state(torch.get_rng_state())


def _missing_error(names: list[str], path: str) -> IncompatibleCheckpointError | None:
    if not names:
        return None
    return IncompatibleCheckpointError(
        f"{len(names)} names are missing from the checkpoint: {', '.join(names[:5])}{', ...' if names[5:] else ''}; "
        "checkpoint.exclude_from_loading leaves whole states out, such as dataloader when the number of data-parallel "
        "ranks has changed",
        path=path,
    )


def _save_options(config: SnapstoneCheckpointManager.Config) -> dict[str, Any]:
    names = ["base", "codec", "full_every", "keyframe_every", "derive", "on_unchanged", "host_memory_budget"]
    names += ["allow_pickle", "timeout"]
    return {"overwrite": True, **{name: getattr(config, name) for name in names}}


def _plain(value: Any) -> Any:
    return value.state_dict() if isinstance(value, Stateful) else value


def _budget(config: SnapstoneCheckpointManager.Config, state: Mapping[str, Any]) -> int | None:
    if config.host_memory_budget is not None or "SNAPSTONE_HOST_MEMORY_BUDGET" in os.environ:
        return config.host_memory_budget
    sizes = [getattr(one, "_local_tensor", one).nbytes for one in _tensors(state)]
    # Each tensor may end in a chunk of its own.
    return max(HOST_MEMORY_BUDGET_DEFAULT, sum(sizes) + len(sizes) * _CHUNK_BYTES)


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)


def _together(
    kind: str, error: Exception | None, payload: bytes, config: SnapstoneCheckpointManager.Config
) -> list[bytes]:
    """What every rank says, when they are all here; an error of one fails all."""
    channel = Group.create().channel(kind)
    try:
        return channel.vote("done", error, payload, Deadline(seconds_of(config.timeout)))
    finally:
        channel.close()


def _remove(path: str) -> None:
    filesystem.rmtree(path)
