"""How a save ends: rank 0 commits and says so; the others hear it from rank 0, or find it on the disk."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from . import _native, manifest
from .collective import Channel, Deadline, Group
from .errors import CheckpointError, RankFailedError
from .manifest import Manifest
from .target import Target

__all__ = ["Outcome"]

_WITHDRAWN_BY = "WITHDRAWN"  # in what is left of a save that a rank took from a silent rank 0
_LATE = " late"  # after the rank: it had waited until the deadline


@dataclass(frozen=True, slots=True)
class Outcome:
    target: Target
    save_id: str
    staging: Any
    group: Group
    channel: Channel
    deadline: Deadline

    def commit(self, document: Manifest, *, overwrite: bool, dcp_marker: bool = False, read_back: bool = False) -> None:
        """Steps 5 to 8 of the protocol in `csrc/store/staging.cc`."""
        data = document.to_bytes()
        if dcp_marker:
            self.staging.write_file(manifest.DCP_MARKER_NAME, manifest.DCP_MARKER, "marker")
        self.staging.keep_shared([(os.path.basename(entry.name), entry.nbytes) for entry in document.shared])
        try:
            self.staging.commit(data, manifest.digest_line(data), self.target.name, overwrite, read_back)
        except Exception:
            self._disown()
            raise

    def _disown(self) -> None:
        """Before anybody is told of a failed commit: a rank that is not told may find what is visible of it."""
        if self.group.world_size > 1 and self._visible() is not None:
            with suppress(OSError):
                _native.make_directory(*os.path.split(self._disowned_mark()))

    def _is_disowned(self) -> bool:
        return os.path.lexists(self._disowned_mark())

    def _disowned_mark(self) -> str:
        """Trash, so that a later save removes it; never under the name that withdrawn or replaced files get."""
        return os.path.join(self.target.parent, f".trash-{self.save_id[::-1]}")

    def announce(self, error: BaseException | None) -> None:
        if self.group.world_size == 1:
            return
        # Ctrl-C is seen when the native call is over, which may well have committed.
        failed = error is not None and (isinstance(error, Exception) or self.committed() is None)
        blamed = error.failed_ranks if isinstance(error, RankFailedError) else ()
        outcome = {"error": f"{type(error).__name__}: {error}" if failed else None, "failed_ranks": blamed}
        with suppress(RankFailedError):  # the others look at the disk then, where the outcome stands
            self.channel.broadcast("outcome", json.dumps(outcome).encode(), self.deadline)

    def hear(self) -> None:
        """Rank 0 may die or hang between the rename and its announcement; then the disk says what happened."""
        try:
            outcome = json.loads(self.channel.broadcast("outcome", None, self.deadline))
        except RankFailedError:
            if self.on_disk() is None:
                raise
            return
        if outcome["error"] is not None:
            raise RankFailedError(
                f"rank 0 could not commit: {outcome['error']}",
                path=self.target.path,
                failed_ranks=outcome["failed_ranks"] or self.group.ranks[:1],
            )

    def on_disk(self) -> Manifest | None:
        """For a rank that cannot hear rank 0: the manifest if the save is committed, else None for good.

        An undecided save is withdrawn first. Whoever renames the staging directory first decides, rank 0 or this rank,
        so that no rank reports a failure of what becomes visible a moment later.
        """
        if self.group.rank == 0:
            return None
        committed = self.committed()
        if committed is None and not self._is_disowned():
            self.staging.withdraw()
            committed = self.committed()
            if committed is None:  # and never will be: the directory is nobody's now
                when = _LATE if self.deadline.expired else ""
                with suppress(OSError):
                    rank = self.group.ranks[self.group.rank]
                    self.staging.write_file(_WITHDRAWN_BY, f"{rank}{when}".encode(), "withdrawn_by")
        return None if self._is_disowned() else committed

    def withdrawal(self) -> CheckpointError | None:
        """Says which rank has withdrawn this save from rank 0, if it is known; that it is too late, when any may."""
        try:
            trash = os.path.join(self.target.parent, f".trash-{self.save_id}")
            by = _native.read_file(trash, _WITHDRAWN_BY, 32).decode()
            rank = int(by.removesuffix(_LATE))
        except (OSError, ValueError):
            return None
        if by.endswith(_LATE):
            return self.too_late()
        message = f"not committed: rank {rank} lost the store, and withdrew the save"
        return RankFailedError(message, path=self.target.path, failed_ranks=(rank,))

    def explain_withdrawal(self, failure: BaseException) -> BaseException:
        """For rank 0, which may find nothing to commit any more."""
        if not isinstance(failure, FileNotFoundError) or os.path.lexists(self.staging.path):
            return failure
        late = self.withdrawal() or self.too_late()
        late.__cause__ = failure
        return late

    def too_late(self) -> CheckpointError:
        message = f"not committed: the save took longer than {self.deadline.seconds:g} s"
        return CheckpointError(message, path=self.target.path, rank=self.group.rank)

    def explain_removal(self, failure: BaseException | None, label: str) -> BaseException | None:
        """A failed save's directory goes from under the ranks that still write: rank 0 removes it, also when it could
        not tell them why, or another rank has withdrawn it. `label`: the vote that this rank is to take part in.
        """
        staging = os.path.join(self.target.parent, f".staging-{self.save_id}")
        if self.group.rank == 0 or not isinstance(failure, FileNotFoundError):
            return failure
        if os.path.lexists(staging) and not str(failure.filename).startswith(staging):
            return failure
        lead = self.group.ranks[0]
        why: CheckpointError
        removed = RankFailedError(f"rank {lead} has removed the save's files", path=staging, failed_ranks=(lead,))
        try:
            self.channel.raise_if_failed(label, self.deadline)
            if os.path.lexists(staging):
                return failure
            why = self.withdrawal() or removed
        except RankFailedError as known:
            why = known
        why.__context__ = failure
        return why

    def committed(self) -> Manifest | None:
        """The manifest, if this save is visible; it is made durable then, which rank 0 may have left undone."""
        found = self._visible()
        if found is not None:
            _native.sync_directory(self.target.parent, "heard")
        return found

    def _visible(self) -> Manifest | None:
        try:
            found = manifest.read(self.target.path)
        except (CheckpointError, OSError):
            return None
        return found if found.save_id == self.save_id else None
