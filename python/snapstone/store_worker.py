"""The thread that talks to the key-value store of a process group, so that a store that hangs holds nobody up."""

from __future__ import annotations

import atexit
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Final, TypeVar
from weakref import WeakKeyDictionary

from .wire import Store

__all__ = ["StoreWorker"]

T = TypeVar("T")

LEAVE_S: Final = 2.0  # at exit, for store calls that are under way


class StoreWorker:
    """One daemon thread with a connection of its own. A call that hangs in it can be left behind."""

    def __init__(self, connect: Callable[[], Store]) -> None:
        self._jobs: queue.SimpleQueue[tuple[Callable[[Store], Any], Future[Any]] | None] = queue.SimpleQueue()
        thread = threading.Thread(target=self._serve, args=(self._jobs, connect), name="snapstone-store", daemon=True)
        _threads[thread] = self._jobs
        thread.start()

    def submit(self, operation: Callable[[Store], T]) -> Future[T]:
        future: Future[T] = Future()
        self._jobs.put((operation, future))
        return future

    def stop(self) -> None:
        self._jobs.put(None)  # the thread ends after the jobs that it has

    @staticmethod
    def _serve(jobs: queue.SimpleQueue[Any], connect: Callable[[], Store]) -> None:
        store: Store | None = None
        while (job := jobs.get()) is not None:
            operation, future = job
            if future.set_running_or_notify_cancel():
                try:
                    # Connecting hangs like any other call when the store's host is stopped, so it happens here.
                    if store is None:
                        store = connect()
                    future.set_result(operation(store))
                except BaseException as error:
                    future.set_exception(error)
            del job, operation, future  # they may hold the last reference to a group


_threads: WeakKeyDictionary[threading.Thread, queue.SimpleQueue[Any]] = WeakKeyDictionary()


@atexit.register
def _end_threads() -> None:
    """A daemon thread that comes back from torch while the interpreter ends is unwound through a C++ destructor, which
    aborts the process.
    """
    for jobs in list(_threads.values()):
        jobs.put(None)
    end = time.monotonic() + LEAVE_S
    for thread in list(_threads):
        thread.join(max(0.0, end - time.monotonic()))
