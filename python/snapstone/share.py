"""Share: what one rank writes of a checkpoint, its data file and its index."""

from __future__ import annotations

from typing import Any

import numpy as np

from . import _native, garbage, index, manifest, tensors
from .collective import Deadline
from .config import PIPELINE_SLOTS, SaveOptions
from .errors import CheckpointError
from .manifest import FileEntry
from .progress import Progress
from .stall import learn_rates, predict_stall
from .structure import Structure
from .tensors import LocalShard
from .trace import Trace

__all__ = ["Share"]

_POLL_SECONDS = 0.1
_DRAIN_SECONDS = 1.0  # after a failure, for requests that the kernel still has


class Share:
    """Step 2 of the protocol in `csrc/store/staging.cc` for one rank: `start`, `wait_staged`, `wait_written`,
    `write_index`, `close`.

    `shards` are all of the rank's; the structure names those that it writes. With `keep_staged` the whole state gets
    staging memory if the budget allows. OSError when the file cannot be made or the disk is full.
    """

    def __init__(
        self,
        structure: Structure,
        shards: list[LocalShard],
        staging: Any,
        rank: int,
        rung: str,
        options: SaveOptions,
        trace: Trace,
        *,
        keep_staged: bool,
    ) -> None:
        self._structure = structure
        self._staging = staging
        self._rank = rank
        self._trace = trace
        with trace.span("plan"), garbage.paused():
            self._shards = [tensors.on_host(shards[position]) for position in structure.positions]
            if keep_staged:
                # An alias owns the memory that is copied, whatever becomes of the tensor meanwhile (`p.data = other`).
                self._shards = [LocalShard(item, tensor.detach()) for item, tensor in self._shards]
            pointers = np.fromiter((shard.tensor.data_ptr() for shard in self._shards), np.uint64, len(self._shards))
            strided: Any = {}
            for position, shard in enumerate(self._shards):
                if not shard.tensor.is_contiguous():
                    memory = tensors.memory_of(shard.tensor)
                    strided[position] = (memory.item_bytes, memory.data_ptr, memory.sizes, memory.stride_bytes)
            layout = structure.layout
            slots = min(options.host_memory_budget // layout.chunk_bytes, layout.chunk_count)
            if not keep_staged:
                slots = min(slots, PIPELINE_SLOTS)
            trace.stats["rung"] = rung
            trace.stats["predicted_stall_seconds"] = predict_stall(layout.payload_bytes, slots * layout.chunk_bytes)
            self._job = _native.SaveJob(
                layout,
                pointers,
                strided,
                staging,
                self.data_name,
                rung,
                options.zstd_level,
                structure.item_bytes if options.zstd_level else [],
                None,
                slots,
                keep_staged,
                trace.detailed,
            )

    @property
    def data_name(self) -> str:
        return f"rank-{self._rank:05d}.data"

    @property
    def staged(self) -> bool:
        """Whether the state may change."""
        return bool(self._job.staged)

    def start(self) -> None:
        self._job.start()

    def cancel(self) -> None:
        self._job.cancel()

    def wait_staged(self, deadline: Deadline) -> bool:
        """Returns when the state may change; False if the kernel holds on to it at the deadline. Other errors surface
        in `wait_written`.
        """
        while not self._job.wait_staged(_POLL_SECONDS):
            if deadline.expired:
                self._job.cancel()
                return bool(self._job.wait_staged(_DRAIN_SECONDS))
        return True

    def wait_written(self, deadline: Deadline, progress: Progress) -> None:
        """Returns when the data file is written, synced and closed.

        Raises:
            CheckpointError: the deadline passed. CancelledError: somebody called `cancel`. OSError: a write failed.
        """
        while not self._job.wait(_POLL_SECONDS):
            progress.at(self._job.bytes_done)
            if deadline.expired:
                self._job.cancel()
                raise CheckpointError("the data file was not written in time", path=self._staging.path, rank=self._rank)
        self._job.rethrow()
        progress.at(self._job.bytes_done)
        self._trace.add_job(self._job)
        learn_rates(self._trace.stats)

    def write_index(self, save_id: str, world_size: int, objects: dict[str, Any]) -> manifest.Writer:
        """Writes and syncs the index file; this rank's entry for the manifest."""
        table = self._job.chunk_table()
        data = index.encode(
            save_id=save_id,
            rank=self._rank,
            world_size=world_size,
            files=[self.data_name],
            chunk_bytes=self._structure.layout.chunk_bytes,
            tensors_json=self._structure.tensors_json,
            objects=objects,
            table=table,
        )
        name = f"rank-{self._rank:05d}.index"
        with self._trace.span("sync", len(data)):
            self._staging.write_file(name, data)
        return manifest.Writer(
            self._rank,
            FileEntry(name, len(data), _native.digest_hex(data)),
            (FileEntry(self.data_name, self._job.file_bytes, _native.digest_hex(table)),),
        )

    def close(self) -> None:
        """Ends what still runs and lets go of the tensors."""
        if not self._job.finished:
            self._job.cancel()
            if not self._job.wait(_DRAIN_SECONDS):
                _orphans.append((self._job, self._shards))  # the kernel still holds its buffers: neither may be freed
        _orphans[:] = [orphan for orphan in _orphans if not orphan[0].finished]
        self._shards = []
        self._staging = None


_orphans: list[Any] = []
