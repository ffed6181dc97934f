"""Sources: the tensors that a save reads, as its job takes them, kept alive until it has read them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from . import _native, devices, orphans, tensors
from .config import DeviceOptions
from .errors import CheckpointError
from .stall import learn_copy_rate, predict_device_stall
from .tensors import LocalShard
from .trace import Trace

__all__ = ["DRAIN_SECONDS", "Sources"]

DRAIN_SECONDS = 1.0  # after a failure, for requests that the kernel still has


class Sources:
    """`bind` the job, `start` it, `fence` streams against it, `release` when they have been read, `let_go` at the end.

    Tensors on CUDA devices are taken as the current streams of the thread that makes the sources leave them.

    Args:
        shards: what the job reads, in its order.
        alias: hold memory of one's own right to it, whatever becomes of the tensors meanwhile (`p.data = other`).
        trace: `stats` gets what copies from devices came to.

    Raises:
        RuntimeError: a stream is being captured into a CUDA graph.
    """

    def __init__(self, shards: Sequence[LocalShard], options: DeviceOptions, trace: Trace, *, alias: bool) -> None:
        self._options = options
        self._trace = trace
        self._shards = [devices.plain(shard) for shard in shards]
        if alias:
            self._shards = [LocalShard(item, tensor.detach()) for item, tensor in self._shards]
        self.ordinals = devices.ordinals_of(self._shards)  # of each, for the job; None when all are on the host
        self._devices: list[int] = []
        self._nbytes = 0  # on devices
        if self.ordinals is not None:
            on_device = self.ordinals != tensors.HOST
            self._devices = np.unique(self.ordinals[on_device]).tolist()
            self._nbytes = sum(self._shards[position].item.nbytes for position in np.flatnonzero(on_device))
            if options.digest == "device":  # else a first save does without them, rather than load them here
                for ordinal in self._devices:
                    _native.cuda_load_kernels(ordinal)
            self._mark = devices.mark_streams(self._devices)
        elif any(shard.tensor.is_cuda for shard in shards):
            trace.stats["cuda_unused"] = devices.absence() or "no memory on the device for a copy"
        self._job: Any = None
        self._begin = 0.0

    def pointers(self) -> Any:
        """Of each shard the address, as uint64."""
        return np.fromiter((shard.tensor.data_ptr() for shard in self._shards), np.uint64, len(self._shards))

    def strided(self) -> dict[Any, Any]:
        """By position those that are not contiguous."""
        found = {}
        for position, shard in enumerate(self._shards):
            if not shard.tensor.is_contiguous():
                memory = tensors.memory_of(shard.tensor)
                found[position] = (memory.item_bytes, memory.data_ptr, memory.sizes, memory.stride_bytes)
        return found

    def device_options(self, *, kept: bool, two_phase: bool) -> tuple[Any, ...]:
        """As `SaveJob` takes them. `kept`: somebody waits for the snapshot, so it may take memory of the device."""
        options = self._options
        overflow = options.hbm_fraction if kept else 0.0
        return options.dma_bytes, options.dma_gbps, options.digest != "host", overflow, two_phase

    def start(self, job: Any) -> None:
        """Enqueues the copies from devices, as far as there is memory for them, and starts the job."""
        self._job = job
        self._begin = time.monotonic()
        if not self._devices:
            job.start()
            return
        job.start(self._mark)
        del self._mark
        self._predict_stall()
        if _native.fault_skipped("keep", "save/sources"):
            self._shards = []

    def _predict_stall(self) -> None:
        stats = self._job.device_stats()
        enqueued = self._nbytes - stats["late_bytes"] - stats["overflow_bytes"]
        self._trace.stats["predicted_stall_seconds"] = predict_device_stall(enqueued, stats["late_bytes"])

    def fence(self) -> None:
        """What this thread's current streams are given from now on may change the tensors; once the job says
        `snapshot_enqueued`.

        Raises:
            RuntimeError: one of the streams is being captured into a CUDA graph, and the tensors are still being read.
        """
        if self._devices and self._job is not None:
            for ordinal, stream in devices.current_streams(self._devices).items():
                self._job.fence(ordinal, stream)

    def release(self) -> None:
        """Lets go of the tensors, if the job has read them."""
        if not self._job.staged:
            return
        self._shards = []
        if self._devices:
            stats = self._job.device_stats()
            if not stats["late_bytes"]:
                learn_copy_rate(stats["copied_bytes"], time.monotonic() - self._begin)

    def note(self) -> None:
        """Puts into the stats what copies from devices came to; after the job.

        Raises:
            CheckpointError: digests on the device were demanded, and kernels do not run there.
        """
        if not self._devices:
            return
        stats = self._job.device_stats()
        facts = _native.ring_facts()
        self._trace.stats["devices"] = {
            "ordinals": self._devices,
            "bytes": self._nbytes,
            **stats,
            "registered_bytes": facts["registered_bytes"],
            "refusal": facts["refusal"],
        }
        if self._options.digest == "device" and stats["no_kernels"]:
            raise CheckpointError(f"SNAPSTONE_DIGEST=device, but no kernels run: {stats['no_kernels']}")

    def let_go(self) -> None:
        """Lets go of the tensors, at the latest when nothing reads them any more; for what may be read for ever, never.
        The job has ended, or been cancelled.
        """
        job = self._job
        if job is not None and job.started:
            orphans.let_go(job, self._shards, _is_free, DRAIN_SECONDS)
        self._shards = []


def _is_free(job: Any) -> bool:
    return _native.fault_skipped("keep", "save/hung_sources") or bool(job.finished and job.device_drained)
