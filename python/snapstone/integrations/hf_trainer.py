"""A transformers Trainer whose checkpoints are the engine's. See `hf` for what they look like.

The trainer's own `_save_checkpoint` runs; the methods that it calls get the hidden directory for the target's. So what
subclasses do in theirs is kept, and lands in the same checkpoint.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping
from typing import Any

import safetensors.torch
import torch
import transformers.modeling_utils
import transformers.trainer
from torch.utils._pytree import tree_leaves
from transformers import Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, SaveStrategy
from transformers.utils.import_utils import is_sagemaker_mp_enabled, is_torch_xla_available

from .. import Checkpoint, async_save, manifest
from ..collective import Deadline, Group
from ..config import SaveOptions
from ..dcp import installed
from ..dcp.background import saves
from ..dcp.buffer import SharedBuffer
from ..dcp.snapshot import Snapshot
from . import safetensors_file
from .directory_save import DirectorySave, DirectorySaves
from .numbered import SENTINEL_NAME, newest_valid, rotate
from .patches import Patches
from .publication import problems_of_load, put_back, recover
from .versions import UnsupportedVersionError

__all__ = ["AttachedTrainer"]

_PREFIX = f"{PREFIX_CHECKPOINT_DIR}-"
_STATE_NAME = "trainer_state.json"
_OPTIMIZER = "optimizer"


class AttachedTrainer:
    """Replaces methods of one trainer, and names of transformers' modules while that trainer saves."""

    def __init__(self, trainer: Any, asynchronous: bool, options: Mapping[str, Any]) -> None:
        if trainer.is_deepspeed_enabled:
            raise ValueError("this Trainer saves through DeepSpeed: see snapstone.integrations.deepspeed")
        if is_torch_xla_available() or is_sagemaker_mp_enabled():
            raise ValueError("Trainers on XLA devices, or of SageMaker, save in ways of their own")
        self._trainer = trainer
        self._options = dict(options)
        self._saves = DirectorySaves(
            asynchronous=asynchronous, timeout_seconds=SaveOptions.of(**options).timeout_seconds
        )
        self._current: DirectorySave | None = None
        self._buffers: list[SharedBuffer] = []
        self._patches = Patches()
        self._stock: dict[str, Callable[..., Any]] = {}
        own = {
            "train": self._train,
            "save_model": self._save_model,
            "_save_checkpoint": self._save_checkpoint,
            "_save_optimizer_and_scheduler": self._save_optimizer_and_scheduler,
            "_save_scaler": self._save_scaler,
            "_save_rng_state": self._save_rng_state,
            "_push_from_checkpoint": self._push_from_checkpoint,
            "_load_from_checkpoint": self._load_from_checkpoint,
            "_load_optimizer_and_scheduler": self._load_optimizer_and_scheduler,
            "_load_best_model": self._load_best_model,
            "_finalize_training": self._finalize_training,
        }
        try:
            for name, method in own.items():
                self._stock[name] = self._patches.set(trainer, name, method)
        except AttributeError as error:
            self._patches.undo()
            raise UnsupportedVersionError(
                f"transformers {transformers.__version__} saves in a way that is not known here: {error}"
            ) from None

    def detach(self) -> None:
        self._patches.undo()
        try:
            self._saves.wait()
        finally:
            for buffer in self._buffers:
                buffer.free(release=True)

    # Saving -----------------------------------------------------------------------------------------------------------

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        trainer = self._trainer
        run = trainer._get_output_dir(trial=trial)
        step = trainer.state.global_step
        save = self._saves.begin(os.path.join(run, f"{_PREFIX}{step}"), step=step, leads=trainer.args.should_save)
        self._current = save
        patches = Patches()
        try:
            patches.set(transformers.trainer, "rotate_checkpoints", lambda *_, **__: None)  # after the commit
            for owner, name in ((transformers.modeling_utils, "safe_save_file"), (safetensors.torch, "save_file")):
                patches.set(owner, name, self._deferring(save, getattr(owner, name)))
            to_json = trainer.state.save_to_json
            patches.set(trainer.state, "save_to_json", lambda path: to_json(self._redirected_file(path)))
            self._stock["_save_checkpoint"](model, trial)
            self._submit()
            if os.path.exists(os.path.join(save.final, SENTINEL_NAME)):  # which its owner is about to remove
                self._saves.wait()
        except BaseException as error:
            self._saves.fail(save, error)
            raise
        finally:
            patches.undo()
            self._current = None

    def _submit(self) -> None:
        save, trainer = self._current, self._trainer
        assert save is not None
        run, best = os.path.dirname(save.final), trainer.state.best_model_checkpoint
        limit = trainer.args.save_total_limit
        self._saves.submit(
            save,
            {"step": trainer.state.global_step, "world_size": trainer.args.world_size},
            lambda: rotate(run, _PREFIX, _STATE_NAME, limit, (save.final, best)),
        )

    def _redirected(self, output_dir: Any) -> Any:
        return output_dir if self._current is None or output_dir is None else self._current.inside(output_dir)

    def _redirected_file(self, path: str) -> str:
        return os.path.join(self._redirected(os.path.dirname(path)), os.path.basename(path))

    def _save_model(self, output_dir: Any = None, _internal_call: bool = False) -> None:
        trainer, save = self._trainer, self._current
        self._stock["save_model"](self._redirected(output_dir), _internal_call=_internal_call)
        if save is None or output_dir is None or self._redirected(output_dir) == output_dir:
            return
        # Stock looks whether the best checkpoint is there, which of this one it is not yet.
        strategies = (SaveStrategy.STEPS, SaveStrategy.EPOCH, SaveStrategy.BEST)
        if trainer.args.save_strategy in strategies and trainer.state.best_global_step == trainer.state.global_step:
            trainer.state.best_model_checkpoint = output_dir

    def _deferring(self, save: DirectorySave, stock: Callable[..., None]) -> Callable[..., None]:
        """safetensors' `save_file` for the files of this checkpoint: copies now, writes later."""

        def save_file(tensors: dict[str, torch.Tensor], filename: Any, metadata: Any = None) -> None:
            path = os.path.abspath(filename)
            ours = self._current is save and save.thread == threading.get_ident()
            if not (ours and self._saves.asynchronous and path.startswith(save.staging + os.sep)):
                return stock(tensors, filename, metadata)
            if not safetensors_file.can_hold(tensors):
                return stock(tensors, filename, metadata)
            snapshot = Snapshot.of(dict(tensors))
            buffer = self._buffer(len(save.work))
            staged = snapshot.take(buffer.reserve(snapshot.nbytes, pinned=snapshot.on_cuda))
            save.staged_bytes += snapshot.nbytes
            save.work.append(lambda: safetensors_file.write(path, staged, metadata))
            return None

        return save_file

    def _buffer(self, position: int) -> SharedBuffer:
        """Kept from save to save; the save before has ended."""
        while len(self._buffers) <= position:
            self._buffers.append(SharedBuffer())
        return self._buffers[position]

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        trainer, save = self._trainer, self._current
        stock = self._stock["_save_optimizer_and_scheduler"]
        where = self._redirected(output_dir)
        if save is None or where == output_dir or not self._saves_plainly():
            with installed(asynchronous=self._saves.asynchronous):
                stock(where)
            if save is not None:
                save.adopt(saves.take(save.staging))
            return
        if trainer.args.should_save:
            state = {_OPTIMIZER: trainer.optimizer.state_dict()}
            save.staged_bytes += sum(one.nbytes for one in tree_leaves(state) if isinstance(one, torch.Tensor))
            path = os.path.join(where, _OPTIMIZER)
            save.handles.append(
                async_save(state, checkpoint_id=path, step=trainer.state.global_step, no_dist=True, **self._options)
            )
            torch.save(trainer.lr_scheduler.state_dict(), os.path.join(where, "scheduler.pt"))

    def _saves_plainly(self) -> bool:
        """Whether the state is one file of one rank, and no subclass has ways of its own."""
        stock = Trainer._save_optimizer_and_scheduler
        return not self._trainer.is_fsdp_enabled and type(self._trainer)._save_optimizer_and_scheduler is stock

    def _save_scaler(self, output_dir: str) -> None:
        self._stock["_save_scaler"](self._redirected(output_dir))

    def _save_rng_state(self, output_dir: str) -> None:
        save, where = self._current, self._redirected(output_dir)
        self._stock["_save_rng_state"](where)
        if save is not None and where != output_dir and not save.leads:
            save.files.append(f"rng_state_{self._trainer.args.process_index}.pth")

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self._current is not None:  # what goes to the Hub must be there
            self._submit()
            self._saves.wait()
        self._stock["_push_from_checkpoint"](checkpoint_folder)

    # Loading ----------------------------------------------------------------------------------------------------------

    def _train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        self._saves.wait()
        if resume_from_checkpoint:
            resume_from_checkpoint = self._found(resume_from_checkpoint)
        return self._stock["train"](resume_from_checkpoint, *args, **kwargs)

    def _found(self, wanted: Any) -> str:
        """The checkpoint to resume from, the same on every rank.

        Raises:
            ValueError: there is none. CorruptCheckpointError: the one that was named is damaged.
        """
        run = self._trainer.args.output_dir
        group = Group.create()
        channel = group.channel("resume")
        error: BaseException | None = None
        path = b""
        try:
            if group.rank == 0:
                recover(run)
                path = os.fsencode(self._valid(run) if wanted is True else self._checked(os.fspath(wanted)))
        except BaseException as failure:
            error = failure
        try:
            return os.fsdecode(channel.vote("path", error, path, Deadline(self._saves.timeout_seconds))[0])
        finally:
            channel.close()

    @staticmethod
    def _valid(run: str) -> str:
        path = newest_valid(run, _PREFIX, _STATE_NAME)
        if path is None:
            raise ValueError(f"No valid checkpoint found in output directory ({run})")
        return path

    @staticmethod
    def _checked(path: str) -> str:
        """Stock checkpoints are taken as they are where somebody names them."""
        put_back(path)
        problems_of_load(path)
        return path

    def _load_from_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        with installed():
            self._stock["_load_from_checkpoint"](*args, **kwargs)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        trainer = self._trainer
        path = None if checkpoint is None else os.path.join(checkpoint, _OPTIMIZER)
        if checkpoint is None or path is None or not manifest.is_checkpoint(path):
            with installed():
                self._stock["_load_optimizer_and_scheduler"](checkpoint)
            return
        with Checkpoint.open(path) as opened:
            allowed = bool(self._options.get("allow_pickle"))
            trainer.optimizer.load_state_dict(opened.state_dict(allow_pickle=allowed)[_OPTIMIZER])
        scheduler = torch.load(os.path.join(checkpoint, "scheduler.pt"), map_location="cpu", weights_only=True)
        trainer.lr_scheduler.load_state_dict(scheduler)

    def _load_best_model(self) -> None:
        self._saves.wait()
        best = self._trainer.state.best_model_checkpoint
        if best is not None:
            self._checked(best)
        with installed():
            self._stock["_load_best_model"]()

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        self._saves.wait()
        return self._stock["_finalize_training"](*args, **kwargs)
