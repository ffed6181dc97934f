"""The saves of one trainer: what is in flight, what has to wait for it, and where errors surface.

A removal waits until the save that came before it is durable, a link until the save that it points to is. Neither ever
waits on the thread that trains: they run when the save ends, on its thread. If that save fails, removals wait for the
next one that succeeds, and the link stays where it is.

What stands at the target of a save and is no checkpoint of the engine (a file or a directory of the stock classes, a
link) is moved aside to NAME-before and removed once the save is durable, or put back when it has failed.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import sys
import threading
import uuid
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import snapstone as ss

from ...run_directory import is_checkpoint

__all__ = ["Saves"]

_OPTIONS = (
    *("base", "codec", "full_every", "keyframe_every", "derive", "on_unchanged"),
    *("host_memory_budget", "timeout"),
)
_REQUEUED = re.compile(r"hpc_ckpt_\d+\.ckpt\Z")  # its job ends as soon as the call returns
_log = logging.getLogger("snapstone")


@dataclass(slots=True)
class _Deferred:
    """Waits until save number `after` is durable, and none writes to `path` any more. `target`: of a link."""

    after: int
    path: str
    target: str | None = None
    number: int = 0  # of a link, in the order of the calls

    def is_older_link(self, other: _Deferred) -> bool:
        return self.target is not None and self.path == other.path and self.number < other.number


@dataclass(slots=True)
class _Running:
    path: str
    aside: str | None
    is_over: bool = False  # durable or failed; what waited for it may still be going on
    ended: threading.Event = field(default_factory=threading.Event)


class Saves:
    """
    Args:
        asynchronous: saves return when the snapshot is taken, not when it is durable.
        options: of `snapstone.save`: base, codec, full_every, keyframe_every, derive, on_unchanged,
            host_memory_budget, timeout.
    """

    def __init__(self, *, asynchronous: bool = True, options: Mapping[str, Any] | None = None) -> None:
        self.options = dict(options or {})
        if unknown := sorted(self.options.keys() - set(_OPTIONS)):
            raise TypeError(f"save_options: {', '.join(unknown)}: not among {', '.join(_OPTIONS)}")
        self.asynchronous = asynchronous
        self.foreground = False  # the trainer is not running, so that nobody would wait for a save
        self._lock = threading.Lock()
        self._count = 0  # saves begun
        self._links = 0
        self._running: dict[int, _Running] = {}
        self._failed: set[int] = set()
        self._deferred: list[_Deferred] = []
        self._errors: list[BaseException] = []

    # A strategy is copied and pickled by launchers before anything is saved.
    def __getstate__(self) -> dict[str, Any]:
        return {"asynchronous": self.asynchronous, "options": self.options}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def save(
        self, state: Mapping[str, Any], path: str | os.PathLike[str], *, step: int | None, no_dist: bool, lead: bool
    ) -> None:
        """Saves `state` to `path`, in place of what stands there. When it returns the snapshot is taken.

        Args:
            no_dist: this process saves alone. lead: it is the one that touches names.

        Raises:
            Exception: what an earlier save raised; what `snapstone.async_save` raises.
        """
        self.raise_error()
        target = _absolute(path)
        with self._lock:
            earlier = [one for one in self._running.values() if one.path == target]
        for one in earlier:
            one.ended.wait()
        with self._lock:
            self._deferred = [one for one in self._deferred if one.path != target]
        aside = _move_aside(target) if lead else None
        try:
            arguments = {"checkpoint_id": target, "step": step, "no_dist": no_dist, "overwrite": True, **self.options}
            wait = not self.asynchronous or self.foreground or _REQUEUED.search(target) is not None
            handle = ss.async_save(state, **arguments)
        except BaseException:
            _put_back(aside, target)
            raise
        with self._lock:
            self._count += 1
            number = self._count
            self._running[number] = running = _Running(target, aside)
        handle.upload_completion.add_done_callback(partial(self._ended, number))
        if wait:
            running.ended.wait()
            self.raise_error()

    def remove(self, path: str | os.PathLike[str]) -> None:
        """Removes the checkpoint, of whichever kind, once the save begun last is durable."""
        with self._lock:
            self._deferred.append(_Deferred(self._after_failures(self._count), _absolute(path)))
        self._run_deferred()

    def link(self, target: str | os.PathLike[str], path: str | os.PathLike[str]) -> None:
        """Makes `path` a link to `target`, in one step, once that is durable."""
        wanted = _absolute(target)
        with self._lock:
            after = max((number for number, one in self._writing() if one.path == wanted), default=0)
            if after or os.path.lexists(wanted):
                self._links += 1
                self._deferred.append(_Deferred(after, _absolute(path), wanted, self._links))
        self._run_deferred()

    def exists(self, path: str | os.PathLike[str], on_disk: bool) -> bool:
        """Whether there will be something at `path`, when all that is in flight has ended."""
        wanted = _absolute(path)
        with self._lock:
            if any(one.path == wanted for _, one in self._writing()):
                return True
            waiting = [one for one in self._deferred if one.path == wanted]
        return any(one.target is not None for one in waiting) or (on_disk and not waiting)

    def wait(self) -> None:
        """Waits for every save and for what waits for it. Raises the first error that nobody has seen."""
        while True:
            with self._lock:
                running = next(iter(self._running.values()), None)
            if running is None:
                break
            running.ended.wait()
        self.raise_error()

    def close(self) -> None:
        """`wait`; under an exception that is on its way already, errors are logged instead of raised."""
        if sys.exc_info()[1] is None:
            self.wait()
            return
        try:
            self.wait()
        except Exception:
            _log.exception("a save failed")

    def raise_error(self) -> None:
        with self._lock:
            error = self._errors.pop(0) if self._errors else None
            self._errors.clear()
        if error is not None:
            raise error

    def _after_failures(self, number: int) -> int:
        return self._count + 1 if number in self._failed else number

    def _ended(self, number: int, upload: Future[Any]) -> None:
        running = self._running[number]
        try:
            error = upload.exception()
            if error is None:
                _discard(running.aside)
            else:
                _log.error("the save to %s failed: %s", running.path, error)
                _put_back(running.aside, running.path)
            with self._lock:
                running.is_over = True
                if error is not None:
                    self._errors.append(error)
                    self._failed.add(number)
                    self._deferred = [one for one in self._deferred if one.after != number or one.target is None]
                    for one in self._deferred:
                        one.after = self._after_failures(one.after)
            self._run_deferred()
        except Exception as failure:
            with self._lock:
                self._errors.append(failure)
        finally:
            with self._lock:
                del self._running[number]
            running.ended.set()

    def _run_deferred(self) -> None:
        with self._lock:  # so that a save to one of these names comes before or after
            written = {one.path for _, one in self._writing()}
            ready = [one for one in self._deferred if self._is_durable(one.after) and one.path not in written]
            self._deferred = [one for one in self._deferred if one not in ready]
            # Saves end in any order: a link to an earlier one must not take the place of one to a later.
            links = [one for one in ready if one.target is not None]
            ready = [one for one in ready if not any(one.is_older_link(link) for link in links)]
            self._deferred = [one for one in self._deferred if not any(one.is_older_link(link) for link in links)]
            ready.sort(key=lambda one: one.target is None)  # links before removals
            trash = [_hide(one.path) if one.target is None else _link(one.target, one.path) for one in ready]
        for hidden in trash:
            _empty(hidden)

    def _writing(self) -> Iterator[tuple[int, _Running]]:
        return ((number, one) for number, one in self._running.items() if not one.is_over)

    def _is_durable(self, number: int) -> bool:
        running = self._running.get(number)
        return number <= self._count and number not in self._failed and (running is None or running.is_over)


def _absolute(path: str | os.PathLike[str]) -> str:
    return os.path.abspath(os.fspath(path))


def _move_aside(path: str) -> str | None:
    """Where the thing at `path` is now, if it was in the way of a save."""
    if not os.path.lexists(path) or (not os.path.islink(path) and is_checkpoint(path)):
        return None
    stem, suffix = os.path.splitext(path)
    aside = f"{stem}-before{suffix}"
    _discard(aside)
    os.rename(path, aside)
    return aside


def _put_back(aside: str | None, path: str) -> None:
    if aside is not None and not os.path.lexists(path):
        os.rename(aside, path)


def _discard(path: str | None) -> None:
    """Removes whatever is at `path`."""
    if path is not None:
        _empty(_hide(path))


def _hide(path: str) -> str | None:
    """Takes `path` away with one rename, so that half of a checkpoint is never seen; returns what is left to remove."""
    if os.path.islink(path) or not os.path.isdir(path):
        with suppress(FileNotFoundError):
            os.unlink(path)
        return None
    trash = os.path.join(os.path.dirname(path), f".trash-{uuid.uuid4().hex}")
    os.rename(path, trash)
    return trash


def _empty(trash: str | None) -> None:
    if trash is not None:
        with suppress(FileNotFoundError):  # saves remove what they find under such names
            shutil.rmtree(trash)


def _link(target: str, path: str) -> str | None:
    """One rename, but for a directory at `path`, which goes first."""
    fresh = os.path.join(os.path.dirname(path), f".link-{uuid.uuid4().hex}")
    os.symlink(os.path.relpath(target, os.path.dirname(path)), fresh)
    trash = _hide(path) if os.path.isdir(path) and not os.path.islink(path) else None
    os.replace(fresh, path)
    return trash
