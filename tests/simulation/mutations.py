"""What the simulation must notice: each takes one rule of the engine away, for as long as the context lasts."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

from simulation import engine
from simulation.scenario import FOREVER, Fault, Scenario
from snapstone import collective, fabric, outcome, wire, writer
from snapstone.collective import Channel, Deadline, Group
from snapstone.errors import RankFailedError

__all__ = ["MUTATIONS", "UNDISTURBED", "Mutation", "mutated"]


@dataclass(frozen=True)
class Mutation:
    place: Any
    name: str
    replacement: Callable[[Any], Any]  # of what was there
    scenario: Scenario | None = None  # else the histories of the first seeds


def _without_vote(label: str, kind: str = "save") -> Callable[[Any], Any]:
    """The ranks still wait for what each has to say, but nobody says that it failed, and the silent count as there."""

    def replace(vote: Any) -> Any:
        def instead(self: Channel, name: str, error: Any, payload: bytes, deadline: Deadline) -> Any:
            if (name, self.kind) != (label, kind):
                return vote(self, name, error, payload, deadline)
            if error is not None:
                raise error
            self._take(name)
            if self.group.world_size == 1:
                return [payload]
            self._call(self._post(f"{name}/vote/{self.group.rank}", payload), deadline)
            return _votes_there(self, name, payload, deadline)

        return instead

    return replace


def _without_waiting(label: str, kind: str) -> Callable[[Any], Any]:
    def replace(vote: Any) -> Any:
        def instead(self: Channel, name: str, error: Any, payload: bytes, deadline: Deadline) -> Any:
            if (name, self.kind) != (label, kind):
                return vote(self, name, error, payload, deadline)
            if error is not None:
                raise error
            self._take(name)
            return [payload] * self.group.world_size

        return instead

    return replace


def _votes_there(channel: Channel, label: str, payload: bytes, deadline: Deadline, stop: str = "") -> list[bytes]:
    """All votes, at the deadline those that are there: `payload` stands for the others. `stop`: a key that ends it."""
    names, stopped = channel._vote_names(label), channel._key(f"{label}/{stop}")
    channel._poll(lambda store: store.check(names) or (stop and store.check([stopped])) or None, deadline)
    missing = set(channel._call(lambda store: wire.absent(store, names), deadline))
    return [
        payload
        if rank in missing or rank == channel.group.rank
        else wire.unpack(channel._call(lambda store, name=name: wire.fetch(store, [name])[0], deadline))
        for rank, name in enumerate(names)
    ]


def _counts_the_missing(lead: Any) -> Any:
    def instead(self: Channel, label: str, payload: bytes, deadline: Deadline, combine: Any) -> bytes:
        """Success at the deadline, whoever is missing."""
        self._call(self._post(f"{label}/vote/0", b""), deadline)
        votes = _votes_there(self, label, payload, deadline, "decision")
        return self._settle(label, b"", deadline, combine(votes))

    return instead


def _without_claim(settle: Any) -> Any:
    def instead(self: Channel, label: str, verdict: bytes, deadline: Deadline, results: Any = ()) -> bytes:
        """Everybody obeys what it found itself; the last one to say it is heard."""
        mine = wire.frame([verdict, *results])
        post = self._post(f"{label}/outcome/{self.group.rank}", mine)
        me = str(self.group.rank).encode()

        def say(store: Any) -> None:
            post(store)
            store.set(self._key(f"{label}/decision"), me)

        self._call(say, deadline)
        return mine

    return instead


def _claimed_before_posted(settle: Any) -> Any:
    def instead(self: Channel, label: str, verdict: bytes, deadline: Deadline, results: Any = ()) -> bytes:
        mine = wire.frame([verdict, *results])
        me = str(self.group.rank).encode()

        def claim(store: Any) -> bytes | None:
            if store.compare_set(self._key(f"{label}/decision"), b"", me) == me:
                self._post(f"{label}/outcome/{self.group.rank}", mine)(store)
                return None
            return self._decided(store, label)

        found = self._call(claim, deadline)
        return wire.unpack(found) if found else mine

    return instead


def _never_expires(poll: Any) -> Any:
    return lambda self, ready, deadline: poll(self, ready, Deadline(None))


def _waits_for_the_store(call: Any) -> Any:
    return lambda self, operation, limit: call(self, operation, Deadline(None))


def _late_followers(follow: Any) -> Any:
    def instead(self: Channel, label: str, payload: bytes, deadline: Deadline, combine: Any) -> bytes:
        return bytes(follow(self, label, payload, deadline.extended(30.0), combine))

    return instead


def _nothing(*_: Any, **__: Any) -> None:
    return None


def _committed_only(on_disk: Any) -> Any:
    return lambda self: None if self.group.rank == 0 else self.committed()


def _withdraws_blindly(on_disk: Any) -> Any:
    def instead(self: Any) -> Any:
        if self.group.rank == 0:
            return None
        self.staging.withdraw()
        return None

    return instead


def _hears_or_fails(hear: Any) -> Any:
    def instead(self: Any) -> None:
        self.channel.broadcast("outcome", None, self.deadline)

    return instead


def _believes_in_success(hear: Any) -> Any:
    def instead(self: Any) -> None:
        try:
            hear(self)
        except RankFailedError:
            return

    return instead


def _announces_success(announce: Any) -> Any:
    return lambda self, error: announce(self, None)


def _blames_itself(report: Any) -> Any:
    def instead(self: Channel, label: str, error: BaseException, deadline: Deadline) -> Any:
        if isinstance(error, RankFailedError):
            error = ValueError(str(error))
        return report(self, label, error, deadline)

    return instead


def _blames_nobody(silent: Any) -> Any:
    return lambda self, label, missing, deadline: silent(self, label, [self.group.world_size - 1], deadline)


def _names_others(silent: Any) -> Any:
    def instead(self: Any, *arguments: Any) -> Any:
        self._came_late = False
        return silent(self, *arguments)

    return instead


def _aborts_only(tell: Any) -> Any:
    return lambda self, error: self.channel.abort(writer.VOTES, error)


def _waits_on(wait_for: Any) -> Any:
    return lambda self, value, seconds: wait_for(self, value, math.inf)


# Rank 0 stops before its commit, and wakes when the others have given it up.
SLOW_LEAD = Scenario(1, 3, "save", "launcher", 1.0, 1e-4, 1.0, "auto", 1, 2, [Fault("stop", 0, "commit", seconds=4.0)])

# Ctrl-C on a rank whose vote is there, while rank 0 counts.
VOTED = Scenario(1, 3, "load", "launcher", 1.0, 1e-4, 1.0, "auto", 1, 2, [Fault("interrupt", 1, "set fill/vote/1")])
# Rank 0 serves the store, and its process ends with the operation, which another rank fails or does not.
STUCK = Scenario(
    1, 4, "save", "rank 0", 1.0, 1e-4, 1.0, "auto", 1, 2, [Fault("stop", 2, "start", FOREVER), Fault("leave", 0, 0)]
)
LAST = Scenario(1, 4, "load", "rank 0", 1.0, 5e-5, 1.0, "auto", 1, 2, [Fault("leave", 0, 0)])
# Ctrl-C between two votes, and inside a load.
INTERRUPTED = Scenario(1, 3, "save", "launcher", 2.0, 1e-4, 1.0, "auto", 1, 2, [Fault("interrupt", 1, "start")])
INTERRUPTED_LOAD = Scenario(
    1, 3, "load", "launcher", 2.0, 1e-4, 1.0, "scatter", 1, 2, [Fault("interrupt", 1, "post 1")]
)
INTERRUPTED_LEAD = Scenario(
    1, 3, "save", "launcher", 2.0, 1e-4, 1.0, "auto", 1, 2, [Fault("interrupt", 0, "claim written/decision")]
)
MAPPED = Scenario(
    1, 3, "load", "launcher", 2.0, 1e-4, 1.0, "scatter", 1, 2, [Fault("interrupt", 2, "set mapped/vote/2")]
)
STOPPED_LOAD = Scenario(
    1, 3, "load", "launcher", 1.0, 1e-4, 1.0, "scatter", 1, 2, [Fault("stop", 1, "post 1", FOREVER)]
)

# The last sync of the commit fails, and rank 0 dies before it can say so.
UNMARKED = Scenario(
    1,
    3,
    "save",
    "launcher",
    1.0,
    1e-4,
    1.0,
    "auto",
    1,
    2,
    [Fault("commit error", 0, 0, rules="fsync:4:errno=EIO"), Fault("kill", 0, "set outcome/broadcast")],
)
UNDESCRIBED = Scenario(1, 4, "save", "launcher", 2.0, 1e-4, 1.0, "auto", 1, 2, [Fault("read error", 2, "state")])
UNASSIGNED = Scenario(1, 4, "save", "launcher", 2.0, 1e-4, 1.0, "auto", 1, 2, [Fault("read error", 0, "assign")])
# A rank loses what it has to write, before a vote that only a save with a base has.
SHARED = Scenario(1, 4, "delta", "launcher", 2.0, 1e-4, 1.0, "auto", 1, 2, [Fault("write error", 2, "start")])
# Rank 1 cannot write, says so, and dies as it does.
CLAIMED = Scenario(
    1,
    3,
    "save",
    "launcher",
    2.0,
    1e-4,
    1.0,
    "auto",
    1,
    2,
    [Fault("write error", 1, "start"), Fault("kill", 1, "set written/outcome/1")],
)
# Rank 0 waits for what it sends, and tells the others in the vote that they are in.
UNSENT = Scenario(1, 3, "save", "launcher", 1.0, 1e-4, 1.0, "auto", 1, 2, [Fault("kill", 2, "set items/vote/2")])
# Rank 0 comes back after the deadline, when the others have had nothing to answer to.
CUT_OFF_LEAD = Scenario(
    1, 3, "save", "launcher", 1.0, 1e-4, 1.0, "auto", 1, 2, [Fault("cut", 0, "set plan/vote/0", 1.4)]
)
CUT_OFF_SENDER = Scenario(1, 4, "load", "rank 0", 1.3, 2e-4, 1.0, "scatter", 3, 8, [Fault("cut", 0, "messages", 1.7)])
# A rank that stops for longer than the deadline, and wakes.
ASLEEP = Scenario(1, 4, "save", "launcher", 1.0, 1e-4, 1.0, "auto", 1, 2, [Fault("stop", 1, "start", 3.0)])
ASLEEP_LOAD = Scenario(
    1, 4, "load", "launcher", 1.0, 1e-4, 1.0, "scatter", 1, 2, [Fault("stop", 1, "set boxes/vote/1", 3.0)]
)


def _unread(place: str, nodes: int = 1, writers: int = 2, strategy: str = "scatter") -> Scenario:
    """Rank 2 fails by itself there."""
    fault = Fault("read error", 2, place)
    return Scenario(1, 4, "load", "launcher", 2.0, 1e-4, 1.0, strategy, nodes, writers, [fault])


LOAD_VOTES = {
    "open": _unread("open"),
    "indexes": _unread("indexes", writers=8),
    "gathered": None,
    "plan": _unread("plan"),
    "needs": _unread("needs"),
    "boxes": _unread("boxes"),
    "segment": _unread("segment"),
    "mapped": _unread("mapped"),
    "segments": _unread("segments"),
    "rounds": _unread("rounds"),
    "round-0": _unread("round-0", nodes=2),
    "round-1": _unread("round-1", nodes=2),
    "read": _unread("filled"),
    "fill": _unread("fill"),
}

MUTATIONS: dict[str, Mutation] = {
    "no vote plan": Mutation(Channel, "vote", _without_vote("plan"), UNDESCRIBED),
    "no vote assign": Mutation(Channel, "vote", _without_vote("assign"), UNASSIGNED),
    "no vote open": Mutation(Channel, "vote", _without_vote("open")),
    "no vote shared": Mutation(Channel, "vote", _without_vote("shared"), SHARED),
    "no vote written": Mutation(Channel, "vote", _without_vote("written")),
    "rank 0 counts the missing": Mutation(Channel, "_lead", _counts_the_missing),
    "no claim": Mutation(Channel, "_settle", _without_claim, VOTED),
    "claimed before it is posted": Mutation(Channel, "_settle", _claimed_before_posted, CLAIMED),
    "no deadline of a poll": Mutation(Channel, "_poll", _never_expires),
    "no deadline of a store call": Mutation(Group, "call", _waits_for_the_store),
    "the others never decide": Mutation(Channel, "_follow", _late_followers),
    "no rename away": Mutation(engine._Staging, "withdraw", lambda _: _nothing, SLOW_LEAD),
    "no rename away, the disk is only looked at": Mutation(outcome.Outcome, "on_disk", _committed_only, SLOW_LEAD),
    "no look at the disk": Mutation(outcome.Outcome, "on_disk", _withdraws_blindly),
    "a failed commit leaves no mark": Mutation(outcome.Outcome, "_disown", lambda _: _nothing, UNMARKED),
    "who does not hear fails": Mutation(outcome.Outcome, "hear", _hears_or_fails),
    "who does not hear succeeds": Mutation(outcome.Outcome, "hear", _believes_in_success),
    "a failed commit is announced as a success": Mutation(outcome.Outcome, "announce", _announces_success),
    "the silent are not named": Mutation(Channel, "_silent", _blames_nobody),
    "the silent are not named, one of a save wakes": Mutation(Channel, "_silent", _blames_nobody, ASLEEP),
    "the silent are not named, one of a load wakes": Mutation(Channel, "_silent", _blames_nobody, ASLEEP_LOAD),
    "who comes after the deadline names only others": Mutation(Channel, "_silent", _names_others, CUT_OFF_LEAD),
    "bytes are exchanged after the deadline": Mutation(fabric, "_check_time", lambda _: _nothing, CUT_OFF_SENDER),
    "who names another is named": Mutation(Channel, "_report", _blames_itself, UNSENT),
    "no explanation of removed files": Mutation(
        outcome.Outcome, "explain_removal", lambda _: lambda self, error, label: error
    ),
    "nobody keeps the store after a failure": Mutation(collective, "FAILED_LINGER_S", lambda _: 0.0, STUCK),
    "nobody keeps the store after a success": Mutation(collective, "LINGER_S", lambda _: 0.0, LAST),
    "who leaves tells nobody": Mutation(Channel, "abort", lambda _: _nothing, INTERRUPTED),
    "a lead that leaves announces nothing": Mutation(writer.Writer, "_tell", _aborts_only, INTERRUPTED_LEAD),
    "who waits on a board hears nothing else": Mutation(Channel, "raise_if_failed", lambda _: _nothing, MAPPED),
    "no deadline of a board": Mutation(engine._Board, "wait_for", _waits_on, STOPPED_LOAD),
    **{
        f"no vote {label} of a load": Mutation(Channel, "vote", _without_vote(label, "load"), scenario)
        for label, scenario in LOAD_VOTES.items()
    },
    # What goes wrong before it the next vote tells as well; to wait is what it is for, and when messages are late an
    # undisturbed load fails without it, too.
    "no vote sent-0 of a load": Mutation(Channel, "vote", _without_waiting("sent-0", "load")),
}

# Nothing befalls these.
UNDISTURBED = [
    Scenario(2, 4, "save", "rank 0", 2.0, 1e-4, 1.0, "auto", 1, 2),
    Scenario(3, 3, "overwrite", "launcher", 2.0, 1e-4, 1.0, "auto", 1, 2),
    Scenario(4, 3, "delta", "file", 2.0, 1e-4, 1.0, "auto", 1, 2),
    Scenario(5, 4, "load", "rank 0", 2.0, 1e-4, 1.0, "scatter", 1, 2),
    Scenario(6, 4, "load", "launcher", 2.0, 1e-4, 1.0, "scatter", 2, 8),
    Scenario(7, 3, "load", "launcher", 2.0, 1e-4, 1.0, "auto", 1, 8),
]


@contextmanager
def mutated(mutation: Mutation) -> Iterator[None]:
    original = getattr(mutation.place, mutation.name)
    replacement = mutation.replacement(original)
    if callable(replacement) and callable(original):
        replacement.__wrapped__ = original
    with mock.patch.object(mutation.place, mutation.name, replacement):
        yield
