"""`save`, `async_save`, `prepare`: the public verbs that write."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch

from . import _native, devices, state, tensors
from .checkpoint import Checkpoint
from .collective import Group
from .config import SaveOptions
from .fence import Fence, Held, OptimizerFence
from .handle import SaveHandle, raise_unreported
from .progress import Progress
from .target import STEPS, Target
from .trace import Trace
from .writer import VOTES, Writer

if TYPE_CHECKING:
    import torch.distributed as dist

__all__ = ["async_save", "prepare", "save"]

PathLike = str | os.PathLike[str]
StateDict = Mapping[str, Any]
ProgressWanted = bool | Callable[[int, int], None]


def save(
    state_dict: StateDict,
    *,
    checkpoint_id: PathLike,
    step: int | None = None,
    process_group: dist.ProcessGroup | None = None,
    no_dist: bool = False,
    metadata: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    base: PathLike | Literal["auto"] | None = None,
    codec: str | None = None,
    full_every: int | None = None,
    keyframe_every: int = 8,
    derive: bool = False,
    on_unchanged: Literal["warn", "raise", "ignore"] = "warn",
    dcp_marker: bool = False,
    verify_after_save: bool = False,
    allow_pickle: bool = False,
    host_memory_budget: int | None = None,
    timeout: timedelta | float | None = None,
    progress: ProgressWanted = False,
) -> Checkpoint:
    """Saves `state_dict`; when it returns, the checkpoint is committed and durable on every rank.

    Args:
        state_dict: tensors, DTensors, nested dicts and lists, Python values, Stateful objects (modules, optimizers).
        checkpoint_id: the directory that the checkpoint becomes. Its parents are made.
        step: recorded in the manifest; default: the state's own "step" if that is an integer.
        process_group: the ranks that save together (default group); every rank of it calls.
        no_dist: save alone even though torch.distributed is initialised.
        metadata: Python values for the manifest, readable without the tensors.
        overwrite: replace an existing checkpoint, which stays intact until the new one is committed.
        base: an earlier checkpoint, on the same file system: what it holds already is not written again but linked
            into this one, which stays whole when the base is removed. "auto": the one committed last in the directory
            of this checkpoint, if any. A rank that cannot link files saves its share in full, with a warning.
        codec: None, "zstd" or "zstd:LEVEL". "xor-zstd" or "xor-zstd:LEVEL": store floating-point chunks that changed
            as what differs from the base's bits, where that is smaller; such a checkpoint holds what it refers to.
        full_every: with a base, make every Nth save a full one all the same.
        keyframe_every: with "xor-zstd", so many chunks at most are read for one: of a chain of differences every Kth
            is stored without. 1 to 64.
        derive: do not write bfloat16 and float16 tensors that are a float32 tensor of the state, rounded: parameters
            beside their master weights. What is found is compared bit for bit first, and loads rebuild it.
        on_unchanged: what to do when the step is higher than in the base, or in the save before, and not one tensor of
            an optimizer's state has changed, as when a stale copy of the state is saved: "raise" fails the save on
            every rank.
        dcp_marker: put a file `.metadata` into the checkpoint, a line of text, for trainers that look for one to find
            finished checkpoints.
        verify_after_save: before the commit every rank reads what it wrote from the device again, past the page cache,
            and compares digests: for storage that loses writes it has acknowledged.
        allow_pickle: pickle Python values that have no typed-JSON form.
        host_memory_budget: bytes of staging memory (SNAPSTONE_HOST_MEMORY_BUDGET, 1 GiB).
        timeout: seconds after which the save fails on every rank (SNAPSTONE_TIMEOUT, 1800 s).
        progress: True for a bar on a terminal, or a callback (bytes_done, bytes_total) of this rank.

    Raises:
        FileExistsError: the target exists and `overwrite` is False, or it is not a checkpoint.
        RankFailedError: another rank raised, died or missed the deadline.
        CorruptCheckpointError: with verify_after_save, the device holds other bytes than were written.
        CheckpointError: the deadline passed; the base that was named cannot be read; nothing has changed, with
            on_unchanged="raise".
        OSError: the file system refused; errno and filename are set.
        TypeError, ValueError: the state or an argument cannot be saved; the message names it and the remedy.
    """
    make_options = partial(
        SaveOptions.of,
        overwrite=overwrite,
        base=base,
        codec=codec,
        full_every=full_every,
        keyframe_every=keyframe_every,
        derive=derive,
        on_unchanged=on_unchanged,
        dcp_marker=dcp_marker,
        verify_after_save=verify_after_save,
        allow_pickle=allow_pickle,
        host_memory_budget=host_memory_budget,
        timeout=timeout,
    )
    writer = _open(state_dict, checkpoint_id, step, process_group, no_dist, metadata, make_options)
    try:
        writer.take(lambda: state.flatten(state_dict))
        writer.open(keep_staged=False)
        writer.start()
        checkpoint = _finish(writer, progress)
    except BaseException as error:
        writer.close(error)
        raise
    writer.close(None)
    return checkpoint


def async_save(
    state_dict: StateDict,
    *,
    checkpoint_id: PathLike,
    fence: Fence = "now",
    step: int | None = None,
    process_group: dist.ProcessGroup | None = None,
    no_dist: bool = False,
    metadata: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    base: PathLike | Literal["auto"] | None = None,
    codec: str | None = None,
    full_every: int | None = None,
    keyframe_every: int = 8,
    derive: bool = False,
    on_unchanged: Literal["warn", "raise", "ignore"] = "warn",
    dcp_marker: bool = False,
    verify_after_save: bool = False,
    allow_pickle: bool = False,
    host_memory_budget: int | None = None,
    timeout: timedelta | float | None = None,
    progress: ProgressWanted = False,
) -> SaveHandle:
    """Saves `state_dict` in the background. The arguments of `save`, and:

    Args:
        fence: "now": the snapshot is taken when this returns. An optimizer, or several: before their next step, which
            waits for it; what they do not own is copied at the call. The state must not change in other ways until
            then. CUDA streams wait for their copies, and the host does not, see docs/gpu.md.

    Returns:
        A SaveHandle. Its errors, if nobody collects them, are raised by the next `save`, `async_save` or `wait`.

    Raises:
        Exception: what `save` raises before bytes are written (`fence="now"`); everything later comes from the handle.
    """
    begin = time.monotonic()
    make_options = partial(
        SaveOptions.of,
        overwrite=overwrite,
        base=base,
        codec=codec,
        full_every=full_every,
        keyframe_every=keyframe_every,
        derive=derive,
        on_unchanged=on_unchanged,
        dcp_marker=dcp_marker,
        verify_after_save=verify_after_save,
        allow_pickle=allow_pickle,
        host_memory_budget=host_memory_budget,
        timeout=timeout,
    )
    writer = _open(state_dict, checkpoint_id, step, process_group, no_dist, metadata, make_options)
    taken: Mapping[str, Any] | None = None
    try:
        if (optimizers := OptimizerFence.of(fence)) is None:
            writer.take(lambda: state.flatten(state_dict))
        else:
            taken = _snapshot(writer, optimizers, state_dict)
        if optimizers is None or writer.failed:
            _stage(writer, deferred=False)
            writer.fence()
    except BaseException as error:
        writer.close(error)
        raise
    handle = SaveHandle(writer.target.step, writer.trace.stats, writer.cancel)
    background = _Background(writer, handle, None if optimizers is None else Future(), taken, progress)
    # Not a daemon: the interpreter waits for it at exit, so a save that was begun ends by its deadline.
    try:
        if background.snapshot is not None and optimizers is not None:
            optimizers.attach(Held(background.snapshot, handle.staging_completion, writer.fence))
        elif writer.staged:
            handle.staged(None)
        threading.Thread(target=background.run, name="snapstone-save").start()
        writer.trace.stats["stall_seconds"] = time.monotonic() - begin
    except BaseException as error:  # no thread can be started, or Ctrl-C: the next step must not wait for nobody
        background.abandoned = True
        background.end(None, error)
        handle.upload_completion.exception()  # the caller gets it here
        raise
    finally:
        background.go.set()
    return handle


def _snapshot(writer: Writer, optimizers: OptimizerFence, state_dict: StateDict) -> Mapping[str, Any] | None:
    """The state as it is now; None when it had to be flattened, and the writer has it already."""
    snapshot: Mapping[str, Any] | state.Flattened | None = None

    def make() -> state.Flattened:
        nonlocal snapshot
        devices.refuse_capture()
        snapshot = optimizers.snapshot(state_dict)
        return snapshot if isinstance(snapshot, state.Flattened) else state.Flattened()

    writer.take(make)
    writer.mark()
    return None if isinstance(snapshot, state.Flattened) else snapshot


def _stage(writer: Writer, *, deferred: bool) -> None:
    writer.open(keep_staged=True, deferred=deferred)
    writer.start()
    writer.wait_snapshot()


@dataclass(slots=True)
class _Background:
    """The rest of an async_save, on a thread of its own."""

    writer: Writer
    handle: SaveHandle
    snapshot: Future[None] | None  # done when it is enqueued, or the save has ended; None: it was before
    taken: Mapping[str, Any] | None
    progress: ProgressWanted
    # Keeps this thread off the interpreter lock until the caller is on its way.
    go: threading.Event = field(default_factory=threading.Event)
    abandoned: bool = False  # the caller has ended the save

    def run(self) -> None:
        self.go.wait()
        if self.abandoned:
            return
        try:
            if self.snapshot is not None:
                with self.writer.beside():
                    self._take()
                    _stage(self.writer, deferred=True)
                self.snapshot.set_result(None)
            self.writer.wait_staged()
            if self.writer.staged:
                self.handle.staged(None)
            checkpoint = _finish(self.writer, self.progress)
        except BaseException as error:
            self.end(None, error)
        else:
            self.end(checkpoint, None)

    def _take(self) -> None:
        if self.taken is not None:
            taken, self.taken = self.taken, None
            self.writer.take(lambda: state.flatten(taken))

    def end(self, checkpoint: Checkpoint | None, error: BaseException | None) -> None:
        try:
            self.writer.close(error)
        finally:
            if self.snapshot is not None and not self.snapshot.done():
                self.snapshot.set_result(None)
            self.handle.settle(checkpoint, error)  # whatever happens: somebody may wait for it


def _finish(writer: Writer, progress: ProgressWanted) -> Checkpoint:
    with Progress(progress, "save", writer.payload_bytes) as bar:
        document = writer.finish(bar)
    writer.trace.close()
    return Checkpoint.committed(writer.target.path, document, writer.trace.stats)


def _open(
    state_dict: StateDict,
    checkpoint_id: PathLike,
    step: int | None,
    process_group: dist.ProcessGroup | None,
    no_dist: bool,
    metadata: Mapping[str, Any] | None,
    make_options: Callable[[], SaveOptions],
) -> Writer:
    group = Group.create(process_group, no_dist=no_dist)
    channel = group.channel("save")  # first, so that the ranks stay in step whatever is raised here on one of them
    try:
        raise_unreported()
        options = make_options()
        target = _target(state_dict, checkpoint_id, step, metadata)
        return Writer(target, options, group, channel, Trace("save", group.rank, group.world_size))
    except BaseException as error:
        channel.abort(VOTES, error)
        channel.close()
        raise


def _target(
    state_dict: StateDict, checkpoint_id: PathLike, step: int | None, metadata: Mapping[str, Any] | None
) -> Target:
    if step is None:
        found: Any = state_dict.get("step") if hasattr(state_dict, "get") else None
        step = found if type(found) is int and found in STEPS else None
    return Target.of(checkpoint_id, step, metadata)


def prepare(device: str | torch.device = "cpu", nbytes: int | None = None) -> None:
    """Allocates staging memory ahead of the first save: `nbytes`, or the whole host memory budget.

    With "cuda" or "cuda:N" the memory is near that device, and registered for its copies, and what else the first save
    from there would have to make is made. Takes a while: about 0.3 s for each GB.

    Raises:
        ValueError: a device that jobs do not copy from. OSError: ENOMEM. CudaError: the device fails.
    """
    where = torch.device(device)
    if where.type not in ("cpu", "cuda"):
        raise ValueError(f"device={device!r}: staging memory is for tensors on cpu and cuda devices")
    if where.type == "cuda" and (why := devices.absence()):
        raise ValueError(f"device={device!r}: CUDA cannot be used: {why}; prepare for cpu instead")
    ordinal = tensors.HOST
    if where.type == "cuda":
        index: int | None = where.index
        ordinal = torch.cuda.current_device() if index is None else index
    options = SaveOptions.of()
    wanted = options.host_memory_budget if nbytes is None else nbytes
    if wanted < 0:
        raise ValueError(f"nbytes={nbytes}: must not be negative")
    _native.reserve(options.chunk_bytes, -(-wanted // options.chunk_bytes), ordinal)
