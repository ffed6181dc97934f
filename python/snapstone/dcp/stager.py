"""Stager: how a `dcp.async_save` copies its state, beside the training, into memory that is reused from save to save.

1. `stage` describes the state on the caller's thread (see `snapshot`) and returns a future.
2. The stager's thread waits until the save before has ended, which still reads the buffer.
3. It copies the tensors, and the future has the staged state. DCP's executor takes it from there and saves it.

When a save has ended is not told to a stager. Two observations tell: no tensor of the staged state is alive any more,
whoever wrote it; or the thread of DCP's executor that took the state has left the executor's function. The second
counts when the save fails, since the traceback of its error keeps the state alive, and when the user keeps the planner.
"""

from __future__ import annotations

import os
import sys
import threading
import traceback
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import timedelta
from types import CodeType, FrameType
from typing import Any, Literal

from torch.distributed.checkpoint.staging import AsyncStager

from ..collective import Deadline
from ..config import seconds_of
from .buffer import SharedBuffer
from .snapshot import Snapshot

__all__ = ["Stager"]

State = dict[str, Any]

_EXECUTORS = "torch.distributed.checkpoint._async_"  # the modules of DCP's executors
_SAVER = "torch.distributed.checkpoint.state_dict_saver"
_POLL_SECONDS = 0.01


class _Reading:
    """The time during which a save reads a staged state."""

    def __init__(self) -> None:
        self._by: tuple[threading.Thread, CodeType] | None = None

    def note(self) -> None:
        """Called when a staged state is taken: remembers the thread if it belongs to DCP's executors."""
        code = None
        frame: FrameType | None = sys._getframe(1)
        while frame is not None:
            if str(frame.f_globals.get("__name__")).startswith(_EXECUTORS):
                code = frame.f_code  # the outermost is the executor's function
            frame = frame.f_back
        if code is not None:
            self._by = threading.current_thread(), code

    def ended(self) -> bool:
        """Whether it is known to have ended; False where it is not known."""
        if self._by is None:
            return False
        thread, code = self._by
        frame = sys._current_frames().get(thread.ident or 0) if thread.is_alive() else None
        while frame is not None and frame.f_code is not code:
            frame = frame.f_back
        return frame is None


class _Staging(Future[State]):
    """The future of a staged state."""

    def __init__(self, reading: _Reading) -> None:
        super().__init__()
        self._reading = reading
        self.set_running_or_notify_cancel()

    def result(self, timeout: float | None = None) -> State:
        self._reading.note()
        return super().result(timeout)

    def done(self) -> bool:
        # async_save reports success for a future that is done, and the outcome of one that is not.
        failed = super().done() and self.exception() is not None
        return super().done() and not (failed and sys._getframe(1).f_globals.get("__name__") == _SAVER)


class _Staged(State):
    """A staged state without a future around it: DCP iterates or pickles it first of all."""

    def __init__(self, state: State, reading: _Reading) -> None:
        super().__init__(state)
        self._reading = reading

    def items(self) -> Any:
        self._reading.note()
        return super().items()

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        self._reading.note()
        return dict, (dict(self),)


@dataclass(slots=True, eq=False)
class _Job:
    """A call of `stage` on its way. Lets go of the state when it is finished."""

    snapshot: Snapshot | None
    reading: _Reading
    future: Future[State] | None
    error: BaseException | None = None
    finished: threading.Event = field(default_factory=threading.Event)


class Stager(AsyncStager):
    """Stages the state of `dcp.async_save(..., async_stager=Stager())`, for the thread and the process executor: every
    tensor is copied, into one buffer of shared memory that is kept from save to save and grown when a state needs more.
    One stager per sequence of saves; `close` it after the last has ended.

    `stage` returns a future at once, so `async_save` returns an AsyncSaveResponse: the tensors must not change before
    its `staging_completion` is done. Python values are copied in the call. A save that begins while an earlier one
    still reads the buffer never overwrites it.

    Args:
        blocking: copy before `stage` returns the staged dict, so `async_save` returns the future of the upload.
        on_busy: what happens to a save while an earlier one reads the buffer: "wait" lets the staging wait for it, on
            the stager's thread unless `blocking`; "reject" raises RuntimeError from `stage`, and the save does not
            begin. Other ranks that were not busy then wait for this one in their save.
        timeout: seconds that a staging waits for an earlier save (SNAPSTONE_TIMEOUT, 1800 s).

    Raises:
        ValueError: another `on_busy`, or a timeout that is not positive.
    """

    _synchronize_after_execute = False

    def __init__(
        self,
        *,
        blocking: bool = False,
        on_busy: Literal["wait", "reject"] = "wait",
        timeout: timedelta | float | None = None,
    ) -> None:
        if on_busy not in ("wait", "reject"):
            raise ValueError(f'on_busy={on_busy!r}: must be "wait" or "reject"')
        self.blocking = blocking
        self.on_busy = on_busy
        self.timeout_seconds = seconds_of(timeout)
        self._buffer = SharedBuffer()
        self._reading: _Reading | None = None  # of what is in the buffer
        self._turn = threading.Lock()  # to wait for the buffer and to fill it
        self._calls = threading.Lock()
        self._executor: ThreadPoolExecutor | None = None
        self._last: _Job | None = None
        self._untold: BaseException | None = None
        self._closing = threading.Event()
        self._process = os.getpid()

    def stage(self, state_dict: State) -> Future[State] | State:
        """A copy of `state_dict`: its future, or itself with `blocking`. Its tensors are views of the buffer, valid
        until the next `stage` finds that the save of this one has ended, or that none of them is alive. The error of
        an earlier future is raised here, once, unless `synchronize_staging` has raised it.

        Raises:
            TypeError, ValueError: a tensor that has no plain memory, or a value that cannot be copied. At once.
            RuntimeError: the stager is closed, or busy and told to reject. At once.
            TimeoutError: an earlier save did not end in time. Like the next, from the future unless `blocking`.
            OSError: no memory for the buffer.
        """
        with self._calls:
            self._check_open()
            error, self._untold = self._untold, None
            if error is not None:
                raise error
            if self.on_busy == "reject" and self._busy():
                raise RuntimeError(
                    "an earlier save still reads the staging buffer: wait for its upload, or use on_busy='wait'"
                )
            snapshot, reading = Snapshot.of(state_dict), _Reading()
            if not self.blocking:
                future = _Staging(reading)
                self._last = _Job(snapshot, reading, future)
                if self._executor is None:
                    self._executor = ThreadPoolExecutor(1, thread_name_prefix="snapstone-stage")
                self._executor.submit(self._run, self._last)
                return future
        return _Staged(self._fill(snapshot, reading), reading)

    def synchronize_staging(self) -> None:
        """Waits until the last `stage` has copied its state, and raises its error."""
        job = self._last
        if job is not None:
            job.finished.wait()
            self._untold = None
            if job.error is not None:
                raise job.error

    def close(self) -> None:
        """Gives the memory back, as soon as a save that still reads it has ended. Stagings that wait fail. Again is
        nothing.
        """
        if self._process != os.getpid():
            return  # a fork: the memory is the parent's
        self._closing.set()
        with self._calls:
            executor, self._executor = self._executor, None
        if executor is not None:
            executor.shutdown(wait=True)
        with self._turn:
            self._buffer.free(release=self._is_free())
            self._reading = self._last = self._untold = None

    def _check_open(self) -> None:
        if self._closing.is_set():
            raise RuntimeError("this Stager is closed: use a new one")
        if self._process != os.getpid():
            raise RuntimeError("this Stager belongs to the process that forked this one: use a new one")

    def _busy(self) -> bool:
        job = self._last
        if job is not None:
            future = job.future
            if future is not None and not future.done():
                return True
            job.finished.wait()  # its thread is about to let go of what it staged
        return self._turn.locked() or not self._is_free()

    def _is_free(self) -> bool:
        return self._reading is None or self._reading.ended() or self._buffer.unused()

    def _run(self, job: _Job) -> None:
        assert job.snapshot is not None
        assert job.future is not None
        try:
            job.future.set_result(self._fill(job.snapshot, job.reading))
        except BaseException as error:
            traceback.clear_frames(error.__traceback__)  # whoever keeps the error keeps no tensors
            job.error = self._untold = error
            job.future.set_exception(error)
        finally:
            job.snapshot = job.future = None
            job.finished.set()

    def _fill(self, snapshot: Snapshot, reading: _Reading) -> State:
        with self._turn:
            deadline = Deadline(self.timeout_seconds)
            self._check_open()
            while not self._is_free():
                if deadline.expired:
                    raise TimeoutError(
                        f"an earlier save still reads the staging buffer after {self.timeout_seconds:g} s: let go of "
                        "its state, its error and its planner, or raise the timeout"
                    )
                self._closing.wait(_POLL_SECONDS)
                self._check_open()
            self._reading = reading
            try:
                storage = self._buffer.reserve(snapshot.nbytes, pinned=snapshot.on_cuda)
                state: State = snapshot.take(storage)
            except BaseException:
                self._reading = None  # what is in the buffer is nobody's
                raise
            return state
