"""Megatron-core's torch_dist format: forked processes write and sync the data files, `metadata.json` is written last.

A parameter is described by its place in the whole tensor, so that Megatron can reshard it: DTensors, and replicas of
which one is written. What its plan needs is agreed on in the first saves and kept, as with --ckpt-assume-constant-
structure; a state with other names gets a new plan. It syncs data files, not directories, `common.pt` and
`metadata.json`.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from concurrent.futures import Future
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

from ..results import Option
from .engine import Engine, Pending, Setting

__all__ = ["Megatron", "MegatronAsync"]

_STRATEGIES = "megatron.core.dist_checkpointing.strategies"
_OPTIONS: tuple[Option, ...] = (
    {"name": "thread_count", "value": "2", "why": "two processes write for a rank; its default"},
    {"name": "cached_metadata", "value": "True", "why": "later saves of the same names do not plan again"},
    {
        "name": "FullyParallelSaveStrategyWrapper",
        "value": "over all ranks, cached",
        "why": "ranks that hold the same tensor share its writing",
    },
    {
        "name": "torch.cuda",
        "value": "stood in for on a CPU",
        "why": "it waits for a CUDA device and reduces on one; without any there is nothing to wait for",
    },
)


class Megatron(Engine):
    title = "Megatron-core save"
    distribution = "megatron-core"
    module = "megatron.core"
    options: ClassVar[tuple[Option, ...]] = _OPTIONS
    syncs = False

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        if setting.device == "cpu":
            _stand_in_for_cuda()
        self._names: tuple[str, ...] = ()
        self._strategy: Any = None

    def save(self, state: Mapping[str, Any], directory: Path, step: int) -> Pending | None:
        self._save(state, directory, asynchronous=False)
        return Pending()

    def _save(self, state: Mapping[str, Any], directory: Path, *, asynchronous: bool) -> Any:
        from megatron.core import dist_checkpointing

        directory.mkdir(exist_ok=True)
        names = tuple(state)
        known = names == self._names
        if not known:
            self._names, self._strategy = names, self._new_strategy()
        return dist_checkpointing.save(
            _sharded(state, self.setting.rank),
            str(directory),
            self._strategy,
            validate_access_integrity=not known,
            async_sharded_save=asynchronous,
        )

    def _new_strategy(self) -> Any:
        from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper
        from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

        strategy = TorchDistSaveShardedStrategy("torch_dist", 1, thread_count=2, cached_metadata=True)
        return FullyParallelSaveStrategyWrapper(strategy, self.setting.group, do_cache_distribution=True)

    def load(self, state: dict[str, Any], directory: Path) -> None:
        from megatron.core import dist_checkpointing

        from ..optimizer import local

        loaded: Any = dist_checkpointing.load(_sharded(state, self.setting.rank), str(directory))
        for name, found in loaded.items():
            if found.data_ptr() != local(state[name]).data_ptr():
                local(state[name]).copy_(found)

    def is_complete(self, directory: Path) -> bool:
        from megatron.core import dist_checkpointing

        try:
            return bool(dist_checkpointing.check_is_distributed_checkpoint(str(directory)))
        except ValueError:  # metadata.json is not renamed into place: it can be there and be cut short
            return False


class MegatronAsync(Megatron):
    title = "Megatron-core async save"
    options: ClassVar[tuple[Option, ...]] = (
        *_OPTIONS,
        {"name": "AsyncCallsQueue", "value": "persistent=False", "why": "its default: a process is forked for a save"},
    )

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue

        self._queue: Any = AsyncCallsQueue()
        self._saved: Future[None] = Future()

    def save(self, state: Mapping[str, Any], directory: Path, step: int) -> Pending | None:
        request = self._save(state, directory, asynchronous=True)
        saved: Future[None] = Future()
        self._saved = saved
        request.add_finalize_fn(lambda: saved.set_result(None))
        self._queue.schedule_async_request(request)
        return Pending(wait=saved.result, complete=lambda: self._finalize(blocking=True))

    def poll(self) -> None:
        self._finalize(blocking=False)

    def _finalize(self, *, blocking: bool) -> None:
        """By all ranks, in step: writes the metadata of a save whose processes have ended on every rank."""
        try:
            self._queue.maybe_finalize_async_calls(blocking=blocking)
        except BaseException as error:
            if not self._saved.done():
                self._saved.set_exception(error)
            raise

    def close(self) -> None:
        self._queue.close()


def _sharded(state: Mapping[str, Any], rank: int) -> dict[str, Any]:
    """A ShardedTensor for everything of which this rank holds a part."""
    from megatron.core.dist_checkpointing import ShardedTensor

    from ..optimizer import local

    described: dict[str, Any] = {}
    for name, tensor in state.items():
        piece = local(tensor).detach()
        offset: tuple[int, ...] = (0,) * piece.dim()
        replica: tuple[int, ...] = (rank,)
        if hasattr(tensor, "placements"):
            (chunk,) = tensor.__create_chunk_list__()
            offset, replica = tuple(chunk.offsets), _replica(tensor)
        if piece.numel():
            described[name] = ShardedTensor(
                key=name,
                data=piece,
                dtype=piece.dtype,
                local_shape=tuple(piece.shape),
                global_shape=tuple(tensor.shape),
                global_offset=offset,
                axis_fragmentations=None,  # shards may differ in size
                replica_id=replica,
            )
    return described


def _replica(tensor: Any) -> tuple[int, ...]:
    """Zeros on the rank that holds the first of the replicas of this shard."""
    place = tensor.device_mesh.get_coordinate()
    return tuple(at for at, how in zip(place, tensor.placements, strict=True) if how.is_replicate()) or (0,)


def _stand_in_for_cuda() -> None:
    """Gives those of its modules that talk to CUDA unasked another `torch`, and nobody else."""
    import torch

    without_cuda: Any = ModuleType("torch without CUDA")
    without_cuda.__getattr__ = lambda name: getattr(torch, name)
    without_cuda.cuda = SimpleNamespace(synchronize=lambda: None, current_device=lambda: "cpu")
    for name in ("async_utils", "filesystem_async", "state_dict_saver"):
        module: Any = importlib.import_module(f"{_STRATEGIES}.{name}")
        module.torch = without_cuda
