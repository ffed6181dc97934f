"""Progress of a save, load or verify: a callback, or a bar on stderr when that is a terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

__all__ = ["Progress"]


class Progress:
    """Feeds `at(bytes_done)` to a callback `(bytes_done, bytes_total)` or to a rich progress bar. Use as a context
    manager.
    """

    def __init__(self, wanted: bool | Callable[[int, int], None], what: str, total: int) -> None:
        self._callback = wanted if callable(wanted) else None
        self._bar: Any = None
        self._task: Any = None
        self._what = what
        self._total = total
        self._shown = -1
        if wanted is True and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, DownloadColumn, TimeRemainingColumn, TransferSpeedColumn
            from rich.progress import Progress as Bar

            columns = (
                "{task.description}",
                BarColumn(),
                DownloadColumn(),
                TransferSpeedColumn(),
                TimeRemainingColumn(),
            )
            self._bar = Bar(*columns, console=Console(stderr=True))

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
            self._task = self._bar.add_task(self._what, total=self._total)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def at(self, done: int) -> None:
        """Reports when something moved; the last report of a success is (total, total)."""
        if done == self._shown:
            return
        self._shown = done
        if self._callback is not None:
            self._callback(done, self._total)
        if self._bar is not None:
            self._bar.update(self._task, completed=done)
