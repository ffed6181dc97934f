"""What ranks and coordinator tell each other about a save's plan, inside DCP's own gather and scatter.

A rank proposes (`Proposal`), the coordinator decides (`Decision`). They travel as `planner_data` of plans without
items, since both ends have the items: a rank needs to hear only which of its own it writes.

A rank whose plan was decided on before sends the digest alone. The coordinator may not know it: it has forgotten the
plan, or never saw it, because it is another process, or coordinates another group; a planner is not told its group.
Then nothing is lost: the decision says so, and the ranks meet once more (`meet_again`), in the key-value store that all
processes of the job share, before anything is written.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .. import wire
from ..collective import Deadline, Group
from ..config import seconds_of
from .plan_columns import PlanColumns

__all__ = ["Decision", "Meeting", "Proposal", "meet_again"]


@dataclass(frozen=True, slots=True)
class Proposal:
    """`columns` is None if the rank expects that the digest is known."""

    digest: bytes
    columns: PlanColumns | None
    is_coordinator: bool


@dataclass(frozen=True, slots=True)
class Meeting:
    """Where to meet, as which of how many; number 0 is the coordinator. `must_bring`: its digest was not known."""

    token: str
    number: int
    world_size: int
    must_bring: bool


@dataclass(frozen=True, slots=True)
class Decision:
    """`mask` has a bit for each of the rank's items, set for those that it writes; None sets all. With a `meeting` the
    decision is still to come.
    """

    mask: bytes | None
    meeting: Meeting | None = None


def meet_again(
    meeting: Meeting, mine: PlanColumns, decide: Callable[[list[PlanColumns | None]], Sequence[bytes | None]]
) -> bytes | None:
    """This rank's mask. `decide` runs on the coordinator: the columns of each number, where they had to be brought, to
    the mask of each.

    Raises:
        RankFailedError: another rank failed, or was silent until the deadline.
    """
    group = Group.meeting(meeting.token, meeting.number, meeting.world_size)
    channel = group.channel("save plan")
    deadline = Deadline(seconds_of(None))
    try:
        brought = wire.frame([mine.description, mine.boxes]) if meeting.must_bring else b""
        masks, error = b"", None
        gathered = channel.gather("columns", brought, deadline, "decision")
        if gathered is not None:
            try:
                found = [PlanColumns.packed(*wire.unframe(one)) if one else None for one in gathered]
                masks = wire.frame([b"" if mask is None else b"m" + mask for mask in decide(found)])
            except Exception as raised:
                error = raised
        channel.vote("decision", error, b"", deadline)
        mask = wire.unframe(channel.broadcast("masks", masks, deadline))[meeting.number]
        return mask[1:] if mask else None
    finally:
        channel.close()
