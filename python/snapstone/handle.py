"""SaveHandle: a save in flight, its two futures, and where its errors surface."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from concurrent.futures import wait as wait_for_futures
from typing import Any

from .errors import CheckpointError

__all__ = ["SaveHandle", "raise_unreported", "wait"]

_lock = threading.Lock()
_in_flight: set[SaveHandle] = set()
_unreported: list[SaveHandle] = []


def _forget_in_child() -> None:
    """The threads that save did not come along into a forked process: who waits there for a save waits for ever."""
    global _lock
    _lock = threading.Lock()
    inherited = list(_in_flight)
    _in_flight.clear()
    _unreported.clear()
    for handle in inherited:
        handle.disown()


os.register_at_fork(after_in_child=_forget_in_child)


class _Upload(Future[Any]):
    """A future that tells when somebody has looked at how the save ended."""

    def __init__(self, seen: Callable[[], None]) -> None:
        super().__init__()
        self._seen = seen

    def result(self, timeout: float | None = None) -> Any:
        try:
            return super().result(timeout)
        finally:
            self._tell()

    def exception(self, timeout: float | None = None) -> BaseException | None:
        try:
            return super().exception(timeout)
        finally:
            self._tell()

    def _tell(self) -> None:
        if self.done():
            self._seen()


class SaveHandle:
    """A save in flight, from `async_save`.

    Attributes:
        staging_completion: done when the state may change; raises what staging raised.
        upload_completion: done when the checkpoint is committed and durable; its result is the Checkpoint.
        step: the step given to `async_save`.

    An error that nobody collects from `result()` or `upload_completion` is raised by the next `save`, `async_save` or
    `wait`, unless the save was cancelled.
    """

    def __init__(self, step: int | None, stats: Mapping[str, Any], cancel: Callable[[], bool]) -> None:
        self.staging_completion: Future[None] = Future()
        self.upload_completion: Future[Any] = _Upload(self._mark_reported)
        self.step = step
        self._stats = stats
        self._cancel = cancel
        self._cancelled = False
        for future in (self.staging_completion, self.upload_completion):
            future.set_running_or_notify_cancel()  # Future.cancel() cannot stop a save; SaveHandle.cancel() can
        with _lock:
            _in_flight.add(self)

    @property
    def stats(self) -> Mapping[str, Any]:
        """Seconds, bytes and counts per stage, the rung, and the stall; complete when the save is done."""
        return self._stats

    def result(self, timeout: float | None = None) -> Any:
        """The committed Checkpoint. Raises what the save raised, or TimeoutError after `timeout` seconds."""
        return self.upload_completion.result(timeout)

    def done(self) -> bool:
        return self.upload_completion.done()

    @property
    def cancelled(self) -> bool:
        """Whether `cancel` stopped this save."""
        return self._cancelled

    def cancel(self) -> bool:
        """Stops the save before its commit point: nothing becomes visible. False if it is too late."""
        if self.done() or not self._cancel():
            return False
        self._cancelled = True
        return True

    def settle(self, checkpoint: Any, error: BaseException | None) -> None:
        """Ends the save, from the thread that ran it."""
        self.staged(error)
        if error is None:
            self.upload_completion.set_result(checkpoint)
        else:
            with _lock:
                _unreported.append(self)
            self.upload_completion.set_exception(error)
        with _lock:
            _in_flight.discard(self)  # last, so that `wait` never returns before the futures are done

    def staged(self, error: BaseException | None) -> None:
        if self.staging_completion.done():
            return
        if error is None:
            self.staging_completion.set_result(None)
        else:
            self.staging_completion.set_exception(error)

    def disown(self) -> None:
        """In a forked process: the save is its parent's, which alone knows how it ends."""
        error = CheckpointError("this save belongs to the process that forked this one; ask there how it ended")
        upload = self.upload_completion
        Future.__init__(self.staging_completion)  # their locks may have been held by another thread at the fork
        Future.__init__(upload)
        for future in (self.staging_completion, upload):
            future.set_exception(error)

    def raise_unseen(self) -> None:
        """Waits for the save, and raises its error if nobody has seen it."""
        wait_for_futures([self.upload_completion])
        with _lock:
            unseen = self in _unreported
        if unseen and not self._cancelled:
            self.result()

    def _mark_reported(self) -> None:
        with _lock:
            if self in _unreported:
                _unreported.remove(self)


def raise_unreported() -> None:
    """Raises the error of an earlier background save that nobody has seen."""
    while True:
        with _lock:
            handle = _unreported.pop(0) if _unreported else None
        if handle is None:
            return
        error = handle.upload_completion.exception()
        assert error is not None
        if handle.cancelled:
            continue
        error.add_note(f"raised by an earlier async_save (step {handle.step}) whose result nobody collected")
        raise error


def wait(timeout: float | None = None) -> None:
    """Waits for every save of this process that is still in flight; raises the first error that nobody has seen.

    Raises:
        TimeoutError: a save is still in flight after `timeout` seconds.
    """
    with _lock:
        uploads = [handle.upload_completion for handle in _in_flight]
    if wait_for_futures(uploads, timeout).not_done:
        raise TimeoutError(f"a save is still in flight after {timeout:g} s")
    raise_unreported()
