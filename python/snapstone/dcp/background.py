"""Saves that go on when `dcp.save` has returned.

1. The call waits for what must have ended: an earlier save of the same path, and more of them than may be in flight.
   Ranks make the same calls in the same order, and errors of earlier saves are raised here and nowhere else but in
   `wait` and in loads of their path. So a save begins on every rank or on none.
2. It copies the state into memory of its own, which is kept for later saves, and returns.
3. One thread saves what was copied, in the order of the calls, over a process group of its own. A rank that could not
   copy takes part all the same, with its error, which ends the save on every rank.
"""

from __future__ import annotations

import os
import threading
import time
import traceback
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch.distributed import distributed_c10d
from torch.distributed.checkpoint import state_dict_saver
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.planner import SavePlanner

from ..handle import SaveHandle
from ..trace import Trace
from .buffer import SharedBuffer
from .snapshot import Snapshot
from .storage_writer import StorageWriter

__all__ = ["Saves", "saves"]


@dataclass(slots=True, eq=False)
class _Job:
    path: str
    writer: StorageWriter
    planner: SavePlanner | None
    group: dist.ProcessGroup | None
    no_dist: bool
    use_collectives: bool
    handle: SaveHandle
    state: dict[str, Any] | None = None
    buffer: SharedBuffer | None = None
    told: bool = False  # its error was raised already


class _Failed(DefaultSavePlanner):
    """The planner of a rank that has nothing to save but an error."""

    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self._error = error

    def set_up_planner(self, state_dict: Any, storage_meta: Any = None, is_coordinator: bool = False) -> None:
        raise self._error


class Saves:
    """The saves of this process that are on their way. `save` and `finish` are for the thread that trains."""

    def __init__(self) -> None:
        self.in_flight_max = 2
        self.forget()

    def forget(self) -> None:
        """In a forked process: the thread and the saves are its parent's."""
        self._lock = threading.Lock()
        self._jobs: deque[_Job] = deque()
        self._running = False
        self._idle: list[SharedBuffer] = []
        self._begun: deque[tuple[str, SaveHandle]] = deque()
        self._groups: list[tuple[dist.ProcessGroup, dist.ProcessGroup]] = []

    def save(
        self,
        state_dict: Mapping[str, Any],
        path: str,
        writer: StorageWriter,
        planner: SavePlanner | None,
        process_group: dist.ProcessGroup | None,
        no_dist: bool,
        use_collectives: bool,
    ) -> SaveHandle:
        """Begins a save and returns when the state may change.

        Raises:
            Exception: the state cannot be copied; the save fails on every rank.
            CheckpointException: of an earlier save; this one does not begin.
        """
        self.finish(path)
        while len(self._begun) >= self.in_flight_max:
            self._begun.popleft()[1].raise_unseen()
        no_dist = no_dist or not (dist.is_available() and dist.is_initialized())
        group = None if no_dist else self._group(process_group)
        trace = Trace("save", 0 if no_dist else dist.get_rank(group), 1)
        handle = SaveHandle(writer.step, trace.stats, lambda: False)
        job = _Job(path, writer, planner, group, no_dist, use_collectives, handle)
        try:
            self._stage(job, state_dict, trace)
        except BaseException as error:
            job.planner, job.state, job.told = _Failed(error), {}, True
            self._submit(job)
            raise
        self._begun.append((path, handle))
        self._submit(job)
        return handle

    def finish(self, path: str) -> None:
        """Waits for the saves of `path`; raises their errors if nobody has seen them."""
        path = os.path.abspath(path)
        mine = [handle for begun, handle in self._begun if begun == path]
        self._begun = deque(one for one in self._begun if one[0] != path)
        for handle in mine:
            handle.raise_unseen()

    def take(self, directory: str) -> list[SaveHandle]:
        """The handles of saves below `directory`; whoever takes them looks after them."""
        below = os.path.abspath(directory) + os.sep
        taken = [handle for path, handle in self._begun if path.startswith(below)]
        self._begun = deque(one for one in self._begun if not one[0].startswith(below))
        return taken

    def free(self) -> None:
        """Gives back the memory that no save uses."""
        with self._lock:
            idle, self._idle = self._idle, []
        for buffer in idle:
            buffer.free(release=True)

    def _stage(self, job: _Job, state_dict: Mapping[str, Any], trace: Trace) -> None:
        begin_ns = time.monotonic_ns()
        snapshot = Snapshot.of(state_dict_saver._stateful_to_state_dict(dict(state_dict)))
        job.buffer = self._take_buffer(snapshot.nbytes)
        job.state = snapshot.take(job.buffer.reserve(snapshot.nbytes, pinned=snapshot.on_cuda))
        trace.add("stage", begin_ns, time.monotonic_ns(), snapshot.nbytes)
        job.handle.staged(None)
        trace.tell("staged", job.path, snapshot.nbytes)

    def _take_buffer(self, nbytes: int) -> SharedBuffer:
        """The smallest that is large enough, else the largest, which grows."""
        with self._lock:
            self._idle.sort(key=lambda buffer: buffer.nbytes)
            for position, buffer in enumerate(self._idle):
                if buffer.nbytes >= nbytes:
                    return self._idle.pop(position)
            return self._idle.pop() if self._idle else SharedBuffer()

    def _group(self, process_group: dist.ProcessGroup | None) -> dist.ProcessGroup:
        """One of the same ranks, which nobody else uses; made in the first save."""
        known: Any = distributed_c10d._world.pg_map
        self._groups = [pair for pair in self._groups if pair[0] in known]
        wanted = process_group if process_group is not None else distributed_c10d._get_default_group()
        for theirs, own in self._groups:
            if theirs is wanted:
                return own
        if process_group is None:
            made: Any = dist.new_group(backend="gloo")
        else:
            ranks = dist.get_process_group_ranks(wanted)
            made = dist.new_group(ranks, backend="gloo", use_local_synchronization=True)
        self._groups.append((wanted, made))
        return self._groups[-1][1]

    def _submit(self, job: _Job) -> None:
        with self._lock:
            self._jobs.append(job)
            if self._running:
                return
            self._running = True
        # Not a daemon: the interpreter waits for it at exit, so a save that was begun ends.
        threading.Thread(target=self._work, name="snapstone-save").start()

    def _work(self) -> None:
        while True:
            with self._lock:
                if not self._jobs:
                    self._running = False
                    return
                job = self._jobs.popleft()
            self._run(job)

    def _run(self, job: _Job) -> None:
        error: BaseException | None = None
        metadata: Any = None
        try:
            metadata = state_dict_saver.save(
                job.state or {},
                checkpoint_id=job.path,
                storage_writer=job.writer,
                planner=job.planner,
                process_group=job.group,
                no_dist=job.no_dist,
                use_collectives=job.use_collectives,
            )
        except BaseException as failure:
            traceback.clear_frames(failure.__traceback__)  # whoever keeps the error keeps no tensors
            error = failure
        job.state = job.planner = None
        buffer, job.buffer = job.buffer, None
        if buffer is not None:
            with self._lock:
                self._idle.append(buffer)
        job.handle.settle(metadata, error)
        if job.told:
            job.handle.upload_completion.exception()


saves = Saves()
os.register_at_fork(after_in_child=saves.forget)
