"""SaveHandle: a save in flight, its two futures, and where its errors surface."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import Any

__all__ = ["SaveHandle", "raise_unreported", "wait"]

_lock = threading.Lock()
_in_flight: set[SaveHandle] = set()
_unreported: list[SaveHandle] = []


class SaveHandle:
    """A save in flight, from `async_save`.

    Attributes:
        staging_completion: done when the state may change; raises what staging raised.
        upload_completion: done when the checkpoint is committed and durable; its result is the Checkpoint.
        step: the step given to `async_save`.

    An error that nobody collects from `result()` or the futures is raised by the next `save`, `async_save` or `wait`.
    """

    def __init__(self, step: int | None, stats: Mapping[str, Any], cancel: Callable[[], bool]) -> None:
        self.staging_completion: Future[None] = Future()
        self.upload_completion: Future[Any] = Future()
        self.step = step
        self._stats = stats
        self._cancel = cancel
        self._reported = False
        with _lock:
            _in_flight.add(self)

    @property
    def stats(self) -> Mapping[str, Any]:
        """Seconds, bytes and counts per stage, the rung, and the stall; complete when the save is done."""
        return self._stats

    def result(self, timeout: float | None = None) -> Any:
        """The committed Checkpoint. Raises what the save raised, or TimeoutError after `timeout` seconds."""
        result = None
        try:
            result = self.upload_completion.result(timeout)
        finally:
            if self.upload_completion.done():
                self._mark_reported()
        return result

    def done(self) -> bool:
        return self.upload_completion.done()

    def cancel(self) -> bool:
        """Stops the save before its commit point: nothing becomes visible. False if it is too late."""
        return self._cancel()

    def settle(self, checkpoint: Any, error: BaseException | None) -> None:
        """Ends the save, from the thread that ran it."""
        with _lock:
            _in_flight.discard(self)
            if error is not None:
                _unreported.append(self)
        if error is None:
            self.staged(None)
            self.upload_completion.set_result(checkpoint)
        else:
            self.staged(error)
            self.upload_completion.set_exception(error)

    def staged(self, error: BaseException | None) -> None:
        if self.staging_completion.done():
            return
        if error is None:
            self.staging_completion.set_result(None)
        else:
            self.staging_completion.set_exception(error)

    def _mark_reported(self) -> None:
        with _lock:
            if self in _unreported:
                _unreported.remove(self)


def raise_unreported() -> None:
    """Raises the error of an earlier background save that nobody has seen."""
    with _lock:
        handle = _unreported.pop(0) if _unreported else None
    if handle is not None:
        error = handle.upload_completion.exception()
        assert error is not None
        error.add_note(f"raised by an earlier async_save (step {handle.step}) whose result nobody collected")
        raise error


def wait(timeout: float | None = None) -> None:
    """Waits for every save of this process that is still in flight; raises the first error that nobody has seen.

    Raises:
        TimeoutError: a save is still in flight after `timeout` seconds.
    """
    with _lock:
        handles = list(_in_flight)
    for handle in handles:
        handle.result(timeout)
    raise_unreported()
