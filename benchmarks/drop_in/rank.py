"""What one rank process does: it holds its part of the state, and saves, loads and compares it when told to.

Times are from a barrier to the rank's own end; the caller takes the slowest rank's.
"""

from __future__ import annotations

import gc
import inspect
import logging
import os
import resource
import time
import warnings
from collections.abc import Iterator
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import page_cache
import torch
import torch.distributed as dist
from states import bits_differ, flip_bits, tensors_of
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType, AsyncSaveResponse, async_save, save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

import snapstone as ss
import snapstone.dcp
from drop_in.rows import STATE, Contender

__all__ = ["NOT_IN_THIS_VERSION", "serve"]

NOT_IN_THIS_VERSION = "not in this version"
GROUP_SECONDS_MAX = 120
# What of stock's staging works without an accelerator: memory that is kept and shared with the other process.
CACHED_STAGING = StagingOptions(
    use_pinned_memory=False, use_shared_memory=True, use_async_staging=True, use_non_blocking_copy=False
)
EXECUTORS = {"thread": AsyncCheckpointerType.THREAD, "process": AsyncCheckpointerType.PROCESS}


def serve(rank: int, world_size: int, port: int, output: str, pipe: Connection) -> None:
    """The whole life of a rank process: until the pipe is closed. It and its own processes print to the file `output`:
    that of DCP's process executor reports each save.
    """
    descriptor = os.open(output, os.O_WRONLY | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ.update(MASTER_ADDR="127.0.0.1", GLOO_SOCKET_IFNAME="lo")
    if world_size == 1:
        os.environ.pop("OMP_NUM_THREADS", None)  # meant for the fork server, not for DCP's process executor
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    # Alone as in a script, together as under torchrun.
    torch.set_num_threads(len(os.sched_getaffinity(0)) if world_size == 1 else 1)
    # Staged tensors go to another process by file descriptor, one per storage.
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard) if soft < hard else (soft, hard))
    store = dist.TCPStore("127.0.0.1", port, None, False, wait_for_workers=False)
    limit = timedelta(seconds=GROUP_SECONDS_MAX)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=limit)
    self = Rank(rank, world_size)
    while True:
        try:
            method, arguments = pipe.recv()
        except EOFError:
            break
        try:
            answer = (False, getattr(self, method)(*arguments))
        except BaseException as error:  # DCP's own exception is no Exception
            answer = (True, f"{type(error).__name__}: {error}")
        pipe.send(answer)
    self.close()


class Rank:
    def __init__(self, rank: int, world_size: int) -> None:
        self.rank = rank
        self.world_size = world_size
        self.size = 0
        self.dimension: int | None = None
        self.mesh: Any = None
        self.state: dict[str, torch.Tensor] = {}
        self.stagers: dict[str, Any] = {}

    # The state --------------------------------------------------------------------------------------------------------

    def build(self, size: int, dimension: int | None) -> tuple[int, int]:
        """Holds this rank's part of the state: all of it, or DTensors sharded along `dimension`, of vectors along 0.

        Returns the bytes of the whole state and the number of its tensors.
        """
        self.state = {}
        self.size, self.dimension = size, dimension
        if dimension is not None and self.mesh is None:
            self.mesh = init_device_mesh("cpu", (self.world_size,))
        nbytes = 0
        for name, whole in tensors_of(STATE, size):
            nbytes += whole.nbytes
            self.state[name] = self._held(whole)
        return nbytes, len(self.state)

    def clear(self) -> None:
        for tensor in self.state.values():
            _local(tensor).zero_()

    def differences(self) -> list[str]:
        """The names of tensors whose local part is not, bit for bit, what `build` made."""
        return [name for name, part in self._expected() if bits_differ(part, _local(self.state[name]))]

    def _expected(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, whole in tensors_of(STATE, self.size):
            yield name, self._part(whole)

    def _held(self, whole: torch.Tensor) -> torch.Tensor:
        if self.dimension is None:
            return whole
        placement = [Shard(self._dimension_of(whole))]
        part = self._part(whole)
        return DTensor.from_local(part, self.mesh, placement, run_check=False, shape=whole.shape, stride=whole.stride())

    def _part(self, whole: torch.Tensor) -> torch.Tensor:
        if self.dimension is None:
            return whole
        dimension = self._dimension_of(whole)
        chunks = whole.chunk(self.world_size, dimension)
        part = chunks[self.rank] if self.rank < len(chunks) else whole.narrow(dimension, 0, 0)
        return part.clone(memory_format=torch.contiguous_format)

    def _dimension_of(self, whole: torch.Tensor) -> int:
        assert self.dimension is not None
        return min(self.dimension, whole.dim() - 1)

    # Saves ------------------------------------------------------------------------------------------------------------

    def save(self, contender: Contender, directory: Path) -> dict[str, float]:
        writer = _writer(contender, directory)
        begin = self._begin()
        save(self.state, storage_writer=writer)
        self._make_durable(contender, directory)
        return {"save_seconds": time.perf_counter() - begin}

    def async_save(self, contender: Contender, executor: str, directory: Path, flip: bool) -> dict[str, float]:
        """With `flip` the state changes as soon as it may, and back at the end."""
        options: dict[str, Any] = {"async_checkpointer_type": EXECUTORS[executor]}
        if contender.storage == "stock" and contender.stager == "default":
            options["checkpoint_id"] = str(directory)  # a writer given by hand would stage in another way
        else:
            options["storage_writer"] = _writer(contender, directory)
        if contender.stager != "default":
            options["async_stager"] = self._stager(contender.stager)
        begin = self._begin()
        response: Any = async_save(self.state, **options)
        call = stall = time.perf_counter() - begin
        upload = response
        if isinstance(response, AsyncSaveResponse):
            response.staging_completion.result()
            stall = time.perf_counter() - begin
            upload = response.upload_completion
        if flip:
            flip_bits(self.state)
        try:
            upload.result()
            self._make_durable(contender, directory)
            durable = time.perf_counter() - begin
        finally:
            if flip:
                flip_bits(self.state)
        return {"save_seconds": durable, "stall_seconds": stall, "call_seconds": call}

    def _make_durable(self, contender: Contender, directory: Path) -> None:
        """Stock syncs its files and leaves the directories to the kernel."""
        if contender.storage == "stock" and self.rank == 0:
            page_cache.fsync_directories(directory)

    def _stager(self, kind: str) -> Any:
        """One of a kind for all saves: it is the reuse of its memory that both are for."""
        if kind not in self.stagers:
            if kind == "cached":
                self.stagers[kind] = DefaultStager(CACHED_STAGING)
            elif hasattr(snapstone.dcp, "Stager"):
                self.stagers[kind] = snapstone.dcp.Stager()
            else:
                raise RuntimeError(f"snapstone.dcp.Stager is {NOT_IN_THIS_VERSION}")
        return self.stagers[kind]

    # Loads ------------------------------------------------------------------------------------------------------------

    def load(self, contender: Contender, directory: Path) -> dict[str, float]:
        reader = _reader(contender, directory)
        begin, before = self._begin(), _bytes_read()
        load(self.state, storage_reader=reader)
        return _loaded(begin, before)

    def read_once(self, contender: Contender, directory: Path) -> dict[str, float]:
        if contender.strategy == "alone":
            if self.rank > 0:
                return {}
            gc.collect()
            begin, before = time.perf_counter(), _bytes_read()
            ss.load(self.state, checkpoint_id=directory, no_dist=True)
        else:
            strategy: Any = contender.strategy
            begin, before = self._begin(), _bytes_read()
            ss.load(self.state, checkpoint_id=directory, strategy=strategy)
        return _loaded(begin, before)

    # ------------------------------------------------------------------------------------------------------------------

    def _begin(self) -> float:
        gc.collect()
        dist.barrier()
        return time.perf_counter()

    def close(self) -> None:
        for stager in self.stagers.values():
            stager.close()


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _writer(contender: Contender, directory: Path) -> Any:
    if contender.storage == "snapstone":
        return snapstone.dcp.StorageWriter(directory)
    return FileSystemWriter(directory, thread_count=contender.thread_count, sync_files=True)


def _reader(contender: Contender, directory: Path) -> Any:
    if contender.storage == "stock":
        return FileSystemReader(directory)
    if contender.strategy is None:
        return snapstone.dcp.StorageReader(directory)
    if "strategy" not in inspect.signature(snapstone.dcp.StorageReader).parameters:
        raise RuntimeError(f"StorageReader(strategy=) is {NOT_IN_THIS_VERSION}")
    options: dict[str, Any] = {"strategy": contender.strategy}
    return snapstone.dcp.StorageReader(directory, **options)


def _bytes_read() -> dict[str, int]:
    """proc(5): `rchar` is what read calls returned, from files and sockets, `read_bytes` what block devices gave."""
    try:
        lines = Path("/proc/self/io").read_text().splitlines()
    except OSError:  # a kernel without the accounts
        return {}
    books = dict(line.split(": ") for line in lines)
    return {"rchar": int(books["rchar"]), "read_bytes": int(books["read_bytes"])}


def _loaded(begin: float, before: dict[str, int]) -> dict[str, float]:
    seconds = time.perf_counter() - begin
    after = _bytes_read()
    return {"load_seconds": seconds, **{name: after[name] - count for name, count in before.items()}}
