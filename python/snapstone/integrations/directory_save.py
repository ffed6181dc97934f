"""Checkpoints that a trainer fills file by file: begun by every rank, finished in the background, published at once.

1. `begin`: the save before has ended, or raises its error here, on every rank. Rank 0 names the directory.
2. The trainer's own code writes into `save.staging`. What takes long goes into `save.work`, or is a handle of the
   engine in `save.handles`.
3. `submit` returns; a thread does the work and waits for the handles, and the ranks vote.
4. The ranks that lead (one per file system) seal and publish the directory, and vote. Then they call `after`, where
   older checkpoints are removed: never before the new one is durable.
"""

from __future__ import annotations

import logging
import os
import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from .. import _native
from ..collective import Channel, Deadline, Group
from ..handle import SaveHandle
from ..trace import Trace
from ..voting import together
from .publication import Publication, recover

__all__ = ["DirectorySave", "DirectorySaves"]

_VOTES = ("written", "published")
_log = logging.getLogger("snapstone")


@dataclass(eq=False)
class DirectorySave:
    """One save. `files` are those that this rank wrote itself and that a leading rank of another machine must see."""

    publication: Publication
    channel: Channel
    deadline: Deadline
    leads: bool
    trace: Trace
    handle: SaveHandle
    thread: int = field(default_factory=threading.get_ident)
    work: list[Callable[[], Any]] = field(default_factory=list)
    handles: list[SaveHandle] = field(default_factory=list)
    files: list[str] = field(default_factory=list)
    staged_bytes: int = 0
    submitted: bool = False

    @property
    def final(self) -> str:
        return self.publication.final

    @property
    def staging(self) -> str:
        return self.publication.staging

    def inside(self, path: str) -> str:
        """`path`, where the target stands for the directory that is filled."""
        return self.staging if os.path.abspath(path) == self.final else path

    def adopt(self, handles: list[SaveHandle]) -> None:
        """Saves of `dcp.save` into the directory, which are under way."""
        self.handles += handles
        self.staged_bytes += sum(handle.stats["stage"]["bytes"] for handle in handles)

    def write_all(self) -> None:
        for work in self.work:
            work()
        for handle in self.handles:
            handle.result()
        for name in self.files:
            with open(os.path.join(self.staging, name), "rb") as file:
                _native.sync_file(file.fileno(), file.name, "handed_file")
        if self.files:
            _native.sync_directory(self.staging, "handed_entries")


class DirectorySaves:
    """The saves of one trainer, one after the other."""

    def __init__(self, *, asynchronous: bool, timeout_seconds: float) -> None:
        self.asynchronous = asynchronous
        self.timeout_seconds = timeout_seconds
        self._last: DirectorySave | None = None

    def begin(
        self,
        final: str,
        *,
        step: int | None,
        leads: bool,
        parent: str | None = None,
        check: Callable[[], None] | None = None,
    ) -> DirectorySave:
        """`check` runs on rank 0 and raises what ends the save on every rank."""
        self.wait()
        final = os.path.abspath(final)
        group = Group.create()
        channel = group.channel("checkpoint")
        deadline = Deadline(self.timeout_seconds)
        trace = Trace("save", group.rank, group.world_size)
        publication: Publication | None = None

        def prepare() -> bytes:
            nonlocal publication
            if leads:
                for directory in {os.path.dirname(final), parent or os.path.dirname(final)}:
                    recover(directory)
            if check is not None and group.rank == 0:
                check()
            name = Publication.name_for(final)
            if leads and group.rank == 0:  # locked before another rank may write into it
                publication = Publication.begin(final, name, parent=parent, leads=True)
            return name.encode()

        try:
            name = together(channel, "name", deadline, trace, prepare)[0].decode()
            publication = publication or Publication.begin(final, name, parent=parent, leads=leads)
        except BaseException as error:
            if publication is not None:
                publication.discard()
            channel.abort(_VOTES, error)
            channel.close()
            raise
        handle = SaveHandle(step, trace.stats, lambda: False)
        self._last = DirectorySave(publication, channel, deadline, leads, trace, handle)
        return self._last

    def submit(self, save: DirectorySave, facts: dict[str, Any], after: Callable[[], object]) -> None:
        """The state may change when this returns. Again is nothing."""
        if save.submitted:
            return
        save.submitted = True
        save.trace.tell("staged", save.final, save.staged_bytes)
        if self.asynchronous:
            # Not a daemon: the interpreter waits for it at exit, so a save that was begun ends.
            threading.Thread(target=self._run, args=(save, facts, after), name="snapstone-save").start()
        else:
            self._run(save, facts, after)
            self.wait()

    def fail(self, save: DirectorySave, error: BaseException) -> None:
        """Ends a save that was not submitted, on every rank; the caller raises `error`."""
        if not save.submitted:
            save.submitted = True
            save.channel.abort(_VOTES, error)
            self._end(save, error)
            save.handle.upload_completion.exception()

    def wait(self) -> None:
        """Returns when the last save is durable; raises its error if nobody has seen it."""
        if self._last is not None:
            last, self._last = self._last, None
            last.handle.raise_unseen()

    def _run(self, save: DirectorySave, facts: dict[str, Any], after: Callable[[], object]) -> None:
        try:
            together(save.channel, "written", save.deadline, save.trace, save.write_all)
            together(save.channel, "published", save.deadline, save.trace, lambda: self._publish(save, facts))
            if save.leads:
                _retain(after)
        except BaseException as error:
            traceback.clear_frames(error.__traceback__)
            self._end(save, error)
        else:
            self._end(save, None)

    def _publish(self, save: DirectorySave, facts: dict[str, Any]) -> None:
        if save.leads:
            save.publication.seal(facts)
            nbytes = _nbytes(save.staging)
            save.publication.publish()
            save.trace.tell("durable", save.final, nbytes)

    def _end(self, save: DirectorySave, error: BaseException | None) -> None:
        if error is not None:
            for handle in save.handles:  # this save's error is the one that is told; theirs follow from it
                handle.upload_completion.add_done_callback(lambda upload: upload.exception())
        save.work, save.handles = [], []
        save.publication.discard()
        save.channel.close()
        save.trace.close()
        save.handle.settle(save.final, error)


def _retain(after: Callable[[], object]) -> None:
    """An older checkpoint that cannot be removed is no reason to fail, on some ranks, one that was published."""
    try:
        after()
    except OSError as error:
        _log.warning("older checkpoints stay: %s", error)


def _nbytes(directory: str) -> int:
    return sum(os.path.getsize(os.path.join(root, name)) for root, _, names in os.walk(directory) for name in names)
