"""StorageReader: what `dcp.load` reads through."""

from __future__ import annotations

import os
import uuid
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal, cast

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.storage import StorageReader as StorageReaderInterface
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.placement_types import _StridedShard
from torch.futures import Future

from .. import manifest, tensors
from ..collective import Deadline, Group
from ..config import LoadOptions
from ..fabric import Fabric
from ..joint import FIRST_VOTE, fill_jointly
from ..opening import VOTES as OPENING_VOTES
from ..opening import open_together
from ..plan import Box, TensorItem, overlap
from ..reader import Reader
from ..tensors import LocalShard
from ..trace import Trace
from .background import saves
from .metadata import metadata_of, stream_of
from .stock import StockReader, is_stock
from .storage_writer import rank_directory

__all__ = ["StorageReader"]


@dataclass(frozen=True, slots=True)
class _Wanted:
    request: ReadItem
    tensor: torch.Tensor  # the planner's


class StorageReader(StorageReaderInterface):
    """Reads a checkpoint of snapstone's format in a `dcp.load`: verified, only the chunks that overlap what this rank
    needs, no pickle. A checkpoint of the stock writer is read too, see `StockReader`.

    Args:
        path: the checkpoint; `checkpoint_id` of a load takes its place.
        cast: convert where the saved dtype differs from the target's, as stock does silently. False refuses.
        verify: check the digest of every chunk that is read.
        strategy, process_group: who reads what, as in `snapstone.load`, and the ranks that load together (default
            group). They must be the ranks of the `dcp.load`, which does not tell its reader; with no_dist, "direct".
        allow_pickle: load values that were saved with `allow_pickle=True`, or as streams of `torch.save` that need
            `weights_only=False`. They can run code.
        timeout: seconds for the reads of one load (SNAPSTONE_TIMEOUT, 1800 s).

    Raises:
        CheckpointError, OSError: from the load, inside the CheckpointException that DCP raises on every rank.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] = "",
        *,
        cast: bool = True,
        verify: bool = True,
        strategy: Literal["auto", "direct", "scatter", "broadcast"] = "direct",
        process_group: dist.ProcessGroup | None = None,
        allow_pickle: bool = False,
        timeout: timedelta | float | None = None,
    ) -> None:
        super().__init__()
        self.path: str | os.PathLike[str] = path
        self.load_id = uuid.uuid4().hex
        self.rank: int | None = None
        self.use_collectives = True
        options = LoadOptions.of(strategy=strategy, timeout=timeout)
        self.cast = cast
        self.verify = verify
        self.strategy = options.strategy
        self.allow_pickle = allow_pickle
        self.timeout_seconds = options.timeout_seconds
        self.stats: dict[str, Any] = {}
        self._process_group = process_group
        self._reader: Reader | None = None
        self._stock: StockReader | None = None
        self._metadata: Metadata | None = None
        self._failure: Exception | None = None  # of the metadata, until DCP asks again

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_reader": None, "_stock": None, "_process_group": None, "_failure": None}

    @property
    def checkpoint_id(self) -> str | os.PathLike[str]:
        return self.path

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Whether it is a path of a mounted file system; what stands there is seen when it is read."""
        return "://" not in str(checkpoint_id)

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        if checkpoint_id:
            self.path = checkpoint_id
        self._reader = self._stock = self._failure = None
        self.stats = {}
        self.load_id = uuid.uuid4().hex

    # The literal names `kwargs` are how DCP tells that a reader knows saves without collectives and wants its rank.
    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        failure, self._failure = self._failure, None
        try:
            return self._read_metadata(kwargs.get("rank"), failure, kwargs)
        except Exception as error:
            self._failure = None if "rank" in kwargs else error
            raise

    def _read_metadata(self, rank: int | None, failure: Exception | None, kwargs: dict[str, Any]) -> Metadata:
        path = os.path.abspath(os.fspath(self.path))
        saves.finish(path)
        if rank is not None and os.path.isdir(os.path.join(path, rank_directory(rank))):
            path = os.path.join(path, rank_directory(rank))
        elif rank is not None and failure is not None:
            # After a failure DCP asks once more, with the rank, for a checkpoint of that rank's own. With any other
            # answer it would leave the rank out of what all do together, and the others would wait for it.
            raise failure
        if is_stock(path, rank) and not manifest.is_checkpoint(path):
            self._stock = StockReader(path, allow_pickle=self.allow_pickle)
            self._stock.load_id = self.load_id
            return self._stock.read_metadata(**kwargs)
        self._stock = None
        reader = self._reader = self._open(path, rank)
        meta = StorageMeta(checkpoint_id=self.path, save_id=reader.manifest.save_id, load_id=self.load_id)
        return metadata_of(reader, 0, meta)

    def _open(self, path: str, rank: int | None) -> Reader:
        if self.strategy == "direct" or rank is not None:
            return Reader(path)
        group = Group.create(self._process_group)
        channel = group.channel("dcp.load")
        deadline, trace = Deadline(self.timeout_seconds), Trace("open", group.rank, group.world_size)
        try:
            return open_together(path, group, channel, Fabric(self._process_group, group), deadline, trace)
        except BaseException as error:
            channel.abort(OPENING_VOTES, error)
            raise
        finally:
            channel.close()
            trace.close()

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        self.rank = kwargs.get("rank")
        self.use_collectives = kwargs.get("use_collectives", True)
        if self._stock is not None:
            self._stock.set_up_storage_reader(metadata, is_coordinator, *args, **kwargs)
        elif self._reader is None:
            self.read_metadata(**({} if self.use_collectives else {"rank": self.rank}))
        self._metadata = metadata

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        if self._stock is not None:
            return self._stock.read_data(plan, planner)
        reader = self._reader
        assert reader is not None
        wanted = self._fill(reader, plan, planner)
        for one in wanted:
            planner.commit_tensor(one.request, one.tensor)
        self._read_values(reader, plan, planner)
        future: Future[None] = Future()
        future.set_result(None)
        return future

    def _fill(self, reader: Reader, plan: LoadPlan, planner: LoadPlanner) -> list[_Wanted]:
        """Without the engine's own votes unless ranks read for each other: DCP gathers the failures."""
        alone = self.strategy == "direct" or not self.use_collectives
        group = Group.create(self._process_group, no_dist=alone)
        channel = group.channel("dcp.load")
        deadline = Deadline(self.timeout_seconds)
        trace = Trace("load", group.rank, group.world_size)
        try:
            wanted = [
                _Wanted(item, planner.resolve_tensor(item).detach())
                for item in plan.items
                if item.type is LoadItemType.TENSOR
            ]
            targets = [self._target(one) for one in wanted]
            _check_strided(targets, getattr(planner, "state_dict", {}))
            stats = fill_jointly(
                reader,
                targets,
                self.strategy,
                group,
                channel,
                Fabric(self._process_group, group),
                deadline,
                cast=self.cast,
                verify=self.verify,
                trace=trace,
            )
        except BaseException as error:
            channel.abort([FIRST_VOTE], error)
            raise
        finally:
            channel.close()
            trace.close()
        self.stats = trace.stats | stats
        return wanted

    def _read_values(self, reader: Reader, plan: LoadPlan, planner: LoadPlanner) -> None:
        items = [item for item in plan.items if item.type is LoadItemType.BYTE_IO]
        if not items:
            return
        objects = reader.objects(self.rank or 0)
        for item in items:
            _, encoded = objects[item.storage_index.fqn]
            planner.load_bytes(item, stream_of(encoded, allow_pickle=self.allow_pickle))

    def _target(self, wanted: _Wanted) -> LocalShard:
        """A request counts from the start of a saved shard, which its storage index names."""
        request, tensor = wanted.request, wanted.tensor
        name = request.storage_index.fqn
        if tuple(tensor.shape) != tuple(request.lengths):
            raise ValueError(
                f"req {request.storage_index} mismatch sizes {tuple(tensor.shape)} vs {tuple(request.lengths)}"
            )
        assert self._metadata is not None
        entry = cast(TensorStorageMetadata, self._metadata.state_dict_metadata[name])
        start = request.storage_index.offset or (0,) * len(entry.size)
        offsets = tuple(a + b for a, b in zip(start, request.storage_offsets, strict=True))
        dtype = tensors.dtype_name(tensor.dtype, name)
        return LocalShard(
            TensorItem(name, dtype, tuple(entry.size), offsets, tuple(request.lengths), tensor.nbytes), tensor
        )


def _check_strided(targets: list[LocalShard], state_dict: dict[str, Any]) -> None:
    """DCP's own planner takes the local part of a DTensor for one box. A strided shard can be several, and bytes would
    go where they do not belong.
    """
    boxes: dict[str, list[Box]] = {}
    for name in {target.item.name for target in targets}:
        tensor = state_dict.get(name)
        if isinstance(tensor, DTensor) and any(isinstance(one, _StridedShard) for one in tensor.placements):
            boxes[name] = [Box(shard.item.offsets, shard.item.sizes) for shard in tensors.describe(name, tensor)]
    for target in targets:
        wanted = Box(target.item.offsets, target.item.sizes)
        held = boxes.get(target.item.name)
        if held is not None and wanted.volume and not any(overlap(wanted, box) == wanted for box in held):
            raise ValueError(
                f"{target.item.name}: the planner wants {list(wanted.sizes)} elements at {list(wanted.offsets)}, which "
                "this rank does not hold: it cannot plan this strided placement; use snapstone.dcp.LoadPlanner"
            )
