"""Votes, agreement and exchange between the ranks of a process group, each of which ends by its deadline.

Guarantees  Every call returns or raises at its deadline plus at most 1.5 s, whatever the peers do: raise, die, stop, or
            take the key-value store down with them. All ranks of a vote, exchange or agreement see the same outcome.
Ownership   One `Group` per process group, one `Channel` per operation. A channel is taken on the calling thread, in the
            same order on every rank, and may then be used by one other thread at a time.
Threads     One daemon thread per group talks to the store, so a store call that hangs never holds up its caller.
Limits      Only the c10d store of the process group is used, polled and never waited on; no NCCL, no gloo collective.
            Large values are compressed and split into several keys (`wire`), since a TCPStore refuses more than 8 MiB.
Failure     `RankFailedError`, naming ranks by their global number. The one exception to "the same outcome" is a rank
            that loses its connection to the store: it raises without knowing what its peers decided.

A decision is taken in these steps, and the third one fixes it:

1. A rank that is well posts its vote. Rank 0 waits for all votes, the others for the decision.
2. Whoever knows an outcome posts it under its own rank: rank 0 when all votes are there (success) or are not there at
   the deadline, a rank that has an error at once, and any other rank when the deadline has passed and rank 0 is silent.
3. It claims the decision key with compare-and-set. The first claim wins, and is what every rank, the losers too, obeys.

Success needs the vote of every rank, and a rank with an error never votes, so it may raise without reading the rest.
"""

from __future__ import annotations

import hashlib
import json
import math
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import wait as wait_for_futures
from contextlib import suppress
from typing import Any, Final, TypeAlias, TypeVar, cast
from weakref import WeakKeyDictionary

import torch.distributed as dist
from torch.distributed import distributed_c10d
from torch.distributed.distributed_c10d import PrefixStore, Store

from . import inherited, wire
from .errors import RankFailedError
from .store_worker import StoreWorker

T = TypeVar("T")
_Combine: TypeAlias = Callable[[list[bytes]], list[bytes]]

GRACE_S: Final = 0.75  # past its deadline: for a peer's verdict to arrive, then for one more answer of the store
WAKE_S: Final = 0.1  # longest wait that does not look for Ctrl-C
CUT_OFF_S: Final = 0.25  # who waits so long for one answer, past its deadline, was cut off and is late itself
POLL_MIN_S: Final = 0.001
POLL_MAX_S: Final = 0.05
EAGER_POLL_MAX_S: Final = 0.004  # where ranks wait for each other again and again
POLL_S_PER_RANK: Final = 0.0001  # all ranks together ask a store at most 10,000 times per second
LINGER_S: Final = 2.0  # rank 0 may serve the store: how long close() keeps it for slower readers; after a failure,
FAILED_LINGER_S: Final = 0.5  # of which some ranks may never hear, that long
RETIRED_COUNT_MAX: Final = 32  # closed channels whose keys wait for slower ranks
REASON_CHARS_MAX: Final = 2000
NAMED_RANKS_MAX: Final = 16


class Deadline:
    """An instant of the monotonic clock, `seconds` from now; `None` never comes."""

    def __init__(self, seconds: float | None) -> None:
        self.seconds: Final = math.inf if seconds is None else max(0.0, seconds)
        self._end: Final = time.monotonic() + self.seconds

    def remaining(self) -> float:
        """Seconds left, never negative, infinite when there is no limit."""
        return max(0.0, self._end - time.monotonic())

    @property
    def expired(self) -> bool:
        return time.monotonic() >= self._end

    def extended(self, seconds: float) -> Deadline:
        """`seconds` after this deadline, or from now when it has already passed."""
        return Deadline(self.remaining() + seconds)


_groups: WeakKeyDictionary[dist.ProcessGroup, Group] = WeakKeyDictionary()
_incarnations: Counter[str] = Counter()  # of groups, by name: one built again on the same store must not meet old keys
_create_lock = threading.Lock()


class Group:
    """The ranks that save or load together. `ranks` are their global numbers, in the order of the group."""

    def __init__(self, rank: int, ranks: Sequence[int], store: Store | None = None, prefix: str = "") -> None:
        self.rank: Final = rank
        self.world_size: Final = len(ranks)
        self.ranks: Final = tuple(ranks)
        self.poll_max_s: Final = max(POLL_MAX_S, POLL_S_PER_RANK * len(ranks))
        self.eager_poll_max_s: Final = max(EAGER_POLL_MAX_S, POLL_S_PER_RANK * len(ranks))
        self._store = store
        self._prefix = prefix
        self._worker: StoreWorker | None = None
        self._worker_lock = threading.Lock()
        self._lost = False
        self._sequence = 0
        self._retired: deque[tuple[str, list[str]]] = deque()  # touched by store workers only

    @classmethod
    def create(cls, process_group: dist.ProcessGroup | None = None, *, no_dist: bool = False) -> Group:
        """The group of `process_group` (default: all ranks); one rank alone if `no_dist` or nothing is initialised.

        Raises ValueError if this rank is no member, the backend has no store, or the group is a forking parent's.
        """
        if no_dist or not (dist.is_available() and dist.is_initialized()):
            return cls(0, [0])
        inherited.refuse()
        group = dist.group.WORLD if process_group is None else process_group
        rank = dist.get_rank(group)
        if group is None or rank < 0:
            raise ValueError("process_group: this rank is not a member; call only on the ranks that belong to it")
        with _create_lock:
            if group not in _groups:
                store = distributed_c10d._get_process_group_store(group)
                if store is None:
                    raise ValueError("process_group: its backend has no key-value store; pass a gloo or NCCL group")
                _incarnations[group.group_name] += 1
                prefix = f"snapstone/{_incarnations[group.group_name]}"
                _groups[group] = cls(rank, dist.get_process_group_ranks(group), store, prefix)
            return _groups[group]

    @classmethod
    def meeting(cls, token: str, rank: int, world_size: int) -> Group:
        """Ranks that have nothing in common but a token, not used before; they meet in the store of all ranks."""
        return cls(rank, range(world_size), distributed_c10d._get_default_store(), f"snapstone/meeting/{token}")

    def channel(self, kind: str) -> Channel:
        """A conversation of its own. Take it in the same order on every rank; `kind` is for messages."""
        with self._worker_lock:
            self._sequence += 1
            return Channel(self, kind, self._sequence)

    def call(self, operation: Callable[[wire.Store], T], limit: Deadline) -> T:
        """Run `operation` on the store's thread; RankFailedError when the store breaks, or is silent until `limit`."""
        future = (worker := self._live_worker()).submit(operation)
        while not future.done():
            if limit.expired:
                future.cancel()  # what has not begun must not happen after its caller has given up
                self._abandon(worker)
                raise self._unreachable(f"gave no answer within {limit.seconds:.1f} s")
            wait_for_futures([future], timeout=min(limit.remaining(), WAKE_S))
        try:
            return future.result()
        except RuntimeError as error:  # c10d's DistError family
            self._abandon(worker)
            reason = str(error).partition("\n")[0]  # the rest is a C++ stack
            raise self._unreachable(f"broke the connection ({reason})") from error

    def retire(self, done: str, posted: list[str]) -> None:
        """Say that this rank has finished with a channel; its keys go when every rank has. Best effort, never blocks.

        The last rank to finish deletes the counter `done`, and each rank its own keys once the counter is gone.
        """

        def sweep(store: wire.Store) -> None:
            if store.add(done, 1) == self.world_size:
                store.delete_key(done)
            self._retired.append((done, posted))
            for _ in range(len(self._retired)):
                waiting, keys = self._retired.popleft()
                if len(self._retired) < RETIRED_COUNT_MAX and store.check([waiting]):
                    self._retired.append((waiting, keys))
                else:  # all ranks are done, or one is so far behind that it has failed
                    for key in [*keys, waiting]:
                        store.delete_key(key)

        with self._worker_lock:
            if self._worker is not None:  # else the store is gone
                self._worker.submit(sweep)

    def _live_worker(self) -> StoreWorker:
        with self._worker_lock:
            if self._worker is None:
                self._worker = StoreWorker(self._connect)
            return self._worker

    def _connect(self) -> wire.Store:
        # The trainer's own connection has one lock: polling through a clone never makes the trainer wait.
        store: Any = self._store
        if self._lost:  # a dead store says so at once on the old connection; a new one is retried for minutes
            store.check([self._prefix])
        with suppress(AttributeError, RuntimeError):  # older torch and stores written in Python cannot clone
            store = store.clone()
        return cast(wire.Store, PrefixStore(self._prefix, store))

    def _abandon(self, worker: StoreWorker) -> None:
        worker.stop()
        with self._worker_lock:
            self._lost = True
            if self._worker is worker:
                self._worker = None

    def _unreachable(self, reason: str) -> RankFailedError:
        base = self._store
        while isinstance(base, PrefixStore):
            base = base.underlying_store
        host = getattr(base, "host", None)  # of a TCPStore; a FileStore is served by no rank
        place = "" if host is None else f" at {host}, served by rank 0 or its launcher,"
        message = f"the process group's {type(base).__name__}{place} {reason}; what the other ranks decided is unknown"
        return RankFailedError(message, failed_ranks=() if host is None else (0,))

    def __del__(self) -> None:
        if self._worker is not None:
            self._worker.stop()


class Channel:
    """One operation's conversation. Every rank makes the same calls in the same order; a label is used once.

    `number`: of the group's channels, from 1, the same on every rank. `failed`: a vote ended in failure. `lost`: the
    store broke or was silent, so that what the other ranks decided is unknown here.
    """

    def __init__(self, group: Group, kind: str, number: int) -> None:
        self.group: Final = group
        self.kind: Final = kind
        self.number: Final = number
        self._prefix: Final = f"{number}.{kind}"
        self._labels: set[str] = set()
        self._posted: list[str] = []
        self.failed = self.lost = self._closed = False
        self._came_late = False  # to the vote that it is in, after the deadline
        self.poll_max_s = group.poll_max_s

    def exchange(self, label: str, payload: bytes, deadline: Deadline) -> list[bytes]:
        """Every rank gets every rank's payload, in rank order; fails on all ranks when one is missing."""
        return self._decide(label, None, payload, deadline, lambda votes: votes)

    def vote(self, label: str, error: BaseException | None, payload: bytes, deadline: Deadline) -> list[bytes]:
        """`exchange` in which a rank may say that it failed: it raises `error`, the others RankFailedError, at once.

        When another rank had failed before, that RankFailedError becomes the cause of `error`. A RankFailedError given
        as `error` blames the ranks that it names.
        """
        return self._decide(label, error, payload, deadline, lambda votes: votes)

    def agree(self, label: str, payload: bytes, deadline: Deadline) -> bool:
        """Whether every rank passed the same bytes; only digests travel."""
        digest = hashlib.blake2b(payload, digest_size=16).digest()
        same, *_ = self._decide(label, None, digest, deadline, lambda votes: [b"1" if len(set(votes)) == 1 else b""])
        return bool(same)

    def raise_if_failed(self, label: str, deadline: Deadline) -> None:
        """Raise the RankFailedError that the vote `label` has ended in already, if it has."""
        decided = self._call(lambda store: self._decided(store, label), deadline)
        if decided and (verdict := wire.unframe(wire.unpack(decided))[0]):
            raise self._failure(verdict)

    def gather(self, label: str, payload: bytes, deadline: Deadline, vote: str) -> list[bytes] | None:
        """Rank 0 gets every rank's payload, the others None at once. `vote` comes next, and tells who is missing."""
        self._take(label)
        if self.group.rank != 0:
            self._cast(label, payload, deadline)
            return None
        if self.group.world_size == 1:
            return [payload]
        names, decision = self._vote_names(label)[1:], self._key(f"{vote}/decision")
        self._came_late = deadline.expired
        self._poll(lambda store: store.check(names) or store.check([decision]) or None, deadline)
        self.raise_if_failed(vote, deadline)
        if missing := self._call(lambda store: wire.absent(store, names, 1), deadline):
            raise self._failure(self._silent(label, missing, deadline))
        return [payload, *map(wire.unpack, self._call(lambda store: wire.fetch(store, names), deadline))]

    def broadcast(self, label: str, payload: bytes | None, deadline: Deadline) -> bytes:
        """Every rank gets rank 0's payload; what the others pass is ignored."""
        self._take(label)
        key = self._key(name := f"{label}/broadcast")
        if self.group.rank == 0:
            if payload is None:
                raise ValueError(f"broadcast {label!r}: rank 0 must pass a payload")
            if self.group.world_size > 1:
                self._call(self._post(name, payload), deadline)
            return payload
        late, unreachable = deadline.extended(GRACE_S), None
        try:
            if packed := self._poll(lambda store: wire.fetch(store, [key])[0] if store.check([key]) else None, late):
                return wire.unpack(packed)
        except RankFailedError as error:
            if error.failed_ranks or not deadline.expired:
                raise
            unreachable = error  # served by no rank; until the deadline it had nothing from rank 0
        raise self._failure(self._silent(label, [0], deadline)) from unreachable

    def abort(self, labels: Sequence[str], error: BaseException) -> None:
        """Fail those of the votes `labels` that are not decided, because this rank leaves. Never raises `error`.

        For what ends an operation elsewhere than in a vote, Ctrl-C above all: the others hear of it in the vote that
        they are in, or come to. Does nothing after a failure, which they know already.
        """
        if not self.failed:
            for label in labels:
                if not self.lost:
                    self._report(label, error, Deadline(0))

    def close(self) -> None:
        """Let the keys go once every rank is done with them. Never raises. Rank 0, who may serve the store, waits."""
        if self._closed or self.group.world_size == 1:
            return
        self._closed = True
        self.group.retire(done := self._key("done"), self._posted)
        if self.group.rank == 0 and not self.lost:
            seconds = FAILED_LINGER_S if self.failed else LINGER_S
            with suppress(RankFailedError):  # nobody can read from a store that is gone
                self._poll(lambda store: None if store.check([done]) else True, Deadline(seconds))

    def _decide(
        self, label: str, error: BaseException | None, payload: bytes, deadline: Deadline, combine: _Combine
    ) -> list[bytes]:
        """The numbered steps at the top of this file; `combine` makes the common result out of all votes."""
        self._take(label)
        if error is not None:
            first = self._report(label, error, deadline)
            error.__cause__ = error.__cause__ or first
            raise error
        if self.group.world_size == 1:
            return combine([payload])
        lead_or_follow = self._lead if self.group.rank == 0 else self._follow
        verdict, *results = wire.unframe(lead_or_follow(label, payload, deadline, combine))
        if verdict:
            raise self._failure(verdict)
        return results

    def _lead(self, label: str, payload: bytes, deadline: Deadline, combine: _Combine) -> bytes:
        names = self._vote_names(label)
        decision = self._key(f"{label}/decision")

        def tally(store: wire.Store) -> tuple[bytes | None, list[int], list[bytes]]:
            decided = self._decided(store, label)
            missing = [] if decided else wire.absent(store, names)
            return decided, missing, [] if decided or missing else wire.fetch(store, names[1:])

        self._cast(label, b"", deadline)  # present, for a peer that asks who is missing
        self._poll(lambda store: store.check([decision]) or store.check(names) or None, deadline)
        decided, missing, votes = self._call(tally, deadline)
        if decided:
            return wire.unpack(decided)
        if missing:
            return self._settle(label, self._silent(label, missing, deadline), deadline)
        return self._settle(label, b"", deadline, combine([payload, *map(wire.unpack, votes)]))

    def _follow(self, label: str, payload: bytes, deadline: Deadline, _: _Combine) -> bytes:
        self._cast(label, payload, deadline)
        if decided := self._poll(lambda store: self._decided(store, label), deadline.extended(GRACE_S)):
            return wire.unpack(decided)
        names = self._vote_names(label)
        missing = self._call(lambda store: wire.absent(store, names), deadline) or [0]  # all voted, so rank 0 is stuck
        return self._settle(label, self._silent(label, missing, deadline), deadline)

    def _cast(self, label: str, payload: bytes, deadline: Deadline) -> None:
        self._call(self._post(f"{label}/vote/{self.group.rank}", payload), deadline)
        self._came_late = deadline.expired

    def _report(self, label: str, error: BaseException, deadline: Deadline) -> RankFailedError | None:
        """Tells the other ranks of `error`. Returns how the vote had failed before, if it had."""
        self.failed = True
        if self.group.world_size == 1:
            return None
        rank = self.group.ranks[self.group.rank]
        reason = f"{type(error).__qualname__}: {error}"[:REASON_CHARS_MAX]
        blamed = [*error.failed_ranks] if isinstance(error, RankFailedError) else []
        if self.lost:  # who hears this has the store: the fault may be here, not with who serves it
            blamed = sorted({rank, *blamed})
        mine = _verdict(f"{self.kind} ({label}): rank {rank} failed: {reason}", blamed or [rank])
        try:
            verdict, *_ = wire.unframe(self._settle(label, mine, deadline))
        except RankFailedError as unreachable:
            error.add_note(f"the other ranks could not be told: {unreachable}")
            return None
        return self._failure(verdict) if verdict not in (b"", mine) else None

    def _settle(self, label: str, verdict: bytes, deadline: Deadline, results: Sequence[bytes] = ()) -> bytes:
        """Propose a failure, or results with an empty verdict; returns the outcome that was decided."""
        outcome = wire.frame([verdict, *results])
        me = str(self.group.rank).encode()
        decision = self._key(f"{label}/decision")
        post = self._post(f"{label}/outcome/{self.group.rank}", outcome)

        def claim(store: wire.Store) -> bytes | None:
            if decided := self._decided(store, label):
                return decided  # perhaps this rank's own outcome, which must not be overwritten
            post(store)
            if store.compare_set(decision, b"", me) == me:
                self._posted.append(decision)
                return None
            return self._decided(store, label)

        return wire.unpack(decided) if (decided := self._call(claim, deadline)) else outcome

    def _decided(self, store: wire.Store, label: str) -> bytes | None:
        decision = self._key(f"{label}/decision")
        if not store.check([decision]):
            return None
        outcome = f"{label}/outcome/{store.get(decision).decode()}"
        return wire.fetch(store, [self._key(outcome)])[0]

    def _post(self, name: str, payload: bytes) -> Callable[[wire.Store], None]:
        key = self._key(name)
        first, *rest = wire.pack(payload)

        def post(store: wire.Store) -> None:
            for index, part in enumerate(rest, 1):
                self._posted.append(f"{key}#{index}")
                store.set(f"{key}#{index}", part)
            self._posted.append(key)
            store.set(key, first)  # last: whoever sees the key finds all parts

        return post

    def _poll(self, ready: Callable[[wire.Store], T | None], deadline: Deadline) -> T | None:
        """Ask until the answer is not None, or None at the deadline."""
        pause = POLL_MIN_S
        while True:
            last = deadline.expired  # taken first, so that there is always one question after the deadline
            asked = time.monotonic()
            answer = self._call(ready, deadline)
            self._came_late |= deadline.expired and time.monotonic() - asked > CUT_OFF_S
            if answer is not None or last:
                return answer
            time.sleep(min(pause, deadline.remaining()))
            pause = min(pause * 1.5, self.poll_max_s)

    def _call(self, operation: Callable[[wire.Store], T], deadline: Deadline) -> T:
        try:
            return self.group.call(operation, deadline.extended(GRACE_S))
        except RankFailedError:
            self.failed = self.lost = True
            raise

    def _take(self, label: str) -> None:
        if self._closed or label in self._labels:
            raise ValueError(f"{self.kind}: label {label!r} is used twice, or after close()")
        self._labels.add(label)

    def _key(self, name: str) -> str:
        return f"{self._prefix}/{name}"

    def _vote_names(self, label: str) -> list[str]:
        return [self._key(f"{label}/vote/{rank}") for rank in range(self.group.world_size)]

    def _silent(self, label: str, missing: Sequence[int], deadline: Deadline) -> bytes:
        own = [self.group.rank] * self._came_late  # the others may have given this rank up
        ranks = [self.group.ranks[index] for index in sorted({*missing, *own})]
        named = ", ".join(map(str, ranks[:NAMED_RANKS_MAX])) + (", ..." if len(ranks) > NAMED_RANKS_MAX else "")
        who = f"rank {named}" if len(ranks) == 1 else f"{len(ranks)} ranks ({named})"
        return _verdict(f"{self.kind} ({label}): no answer from {who} within {deadline.seconds:g} s", ranks)

    def _failure(self, verdict: bytes) -> RankFailedError:
        self.failed = True
        failure = json.loads(verdict)
        return RankFailedError(failure["message"], failed_ranks=tuple(failure["failed_ranks"]))


def _verdict(message: str, ranks: Sequence[int]) -> bytes:
    return json.dumps({"message": message, "failed_ranks": list(ranks)}).encode()
