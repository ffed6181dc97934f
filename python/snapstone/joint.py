"""A load in which each byte that several ranks need is read from storage once, by one of them.

The steps, each of which ends in a vote of all ranks:

1. `needs`: every rank says how much it needs and where it runs; the strategy follows from that (`strategy`). With
   `direct` each rank then reads for itself.
2. `boxes`: the boxes that ranks want are exchanged, and everybody computes the same `Division`.
3. `segment`, `mapped`: one rank per node makes a segment of three regions, the others map it.
4. `round-K`: the readers of round K have read their runs, verified, into the region K mod 3 of their node, as strings
   of the parts that are wanted. Round K+1 is read meanwhile: the vote on round K-1 has said that its region is free.
5. `sent-K`, with several nodes: what ranks of other nodes want of round K has crossed the network, once per node.
6. Every rank copies what it wants of round K from its node's region to its tensors.

A rank that fails votes its error, so nobody enters a transfer that another rank does not. One that fails between two
votes ends those that the others may be in, or come to.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch

from . import garbage, plan, strategy, tensors
from ._native import scatter_pieces
from .collective import Channel, Deadline, Group
from .division import Division, Piece, divide
from .fabric import Fabric, Message
from .plan import Box
from .progress import Progress
from .reader import Reader
from .reads import Part, Reads, packed_strides
from .segment import Segment, node_name
from .strategy import Need, Rates
from .tensors import LocalShard, Memory
from .trace import Trace

__all__ = ["FIRST_VOTE", "fill_jointly"]

FIRST_VOTE = "needs"
_FIRST_VOTES = (FIRST_VOTE, "rates", "fabric", "boxes", "segment", "mapped", "segments", "round-0")

BUCKET_BYTES_MIN = 64 << 20  # of one round on one node
BUCKET_BYTES_MAX = 1 << 30
BUCKET_BYTES_PER_NODE = 32 << 20
REGIONS = 4
PROBE_BYTES = 16 << 20
PROBE_FABRIC_BYTES = 4 << 20


def fill_jointly(
    reader: Reader,
    targets: Sequence[LocalShard],
    wanted_strategy: str,
    group: Group,
    channel: Channel,
    fabric: Fabric,
    deadline: Deadline,
    *,
    cast: bool = False,
    verify: bool = True,
    progress: Progress | None = None,
    trace: Trace | None = None,
) -> dict[str, Any]:
    """`Reader.fill` on all ranks of a group together; every rank calls with the same strategy.

    Raises what `fill` raises on the rank where it happens, RankFailedError on the others.
    """
    channel.poll_max_s = group.eager_poll_max_s
    joint = _JointLoad(reader, targets, group, channel, fabric, deadline, cast, verify, progress, trace)
    try:
        return joint.run(wanted_strategy)
    except BaseException as error:
        channel.abort(joint.labels, error)
        raise
    finally:
        joint.close()


@dataclass(slots=True)
class _Wanted:
    """The parts that all ranks want, and where those of this rank go."""

    parts: list[Part] = field(default_factory=list)
    by: list[frozenset[int]] = field(default_factory=list)
    memories: dict[int, list[Memory]] = field(default_factory=dict)  # by position in `parts`


class _JointLoad:
    def __init__(
        self,
        reader: Reader,
        targets: Sequence[LocalShard],
        group: Group,
        channel: Channel,
        fabric: Fabric,
        deadline: Deadline,
        cast: bool,
        verify: bool,
        progress: Progress | None,
        trace: Trace | None,
    ) -> None:
        self._reader = reader
        self._group = group
        self._channel = channel
        self._fabric = fabric
        self._deadline = deadline
        self._cast = cast
        self._verify = verify
        self._progress = progress
        self._trace = trace or Trace("load", group.rank, group.world_size)
        self._targets = [target for target in targets if target.item.nbytes or 0 not in target.item.sizes]
        self._reads = Reads()  # what this rank reads for itself
        self._segment: Segment | None = None
        self._nodes: list[int] = []
        self._jobs: list[Any] = []
        self._nbytes = sum(map(reader.stored_nbytes, self._targets))
        self._round = -1
        self._done_bytes = 0
        self._read_bytes = 0

    @property
    def _node(self) -> int:
        return self._nodes[self._group.rank]

    @property
    def labels(self) -> tuple[str, ...]:
        """Of the votes that other ranks may be in, or come to, where this one is now."""
        k = self._round
        return _FIRST_VOTES if k < 0 else (f"round-{k}", f"sent-{k}", f"round-{k + 1}")

    def run(self, wanted_strategy: str) -> dict[str, Any]:
        chosen = wanted_strategy if self._group.world_size > 1 else "direct"
        needs = self._exchange_needs(wanted_strategy) if self._group.world_size > 1 else []
        if chosen != "direct":
            payload = self._reader.manifest.nbytes
            rates = self._measure(needs) if strategy.is_measured(wanted_strategy, needs, payload) else []
            chosen = strategy.choose(wanted_strategy, needs, payload, rates)
        if chosen == "direct":
            stats = self._reader.fill(
                self._targets,
                cast=self._cast,
                verify=self._verify,
                timeout_seconds=self._deadline.remaining(),
                progress=self._progress,
                trace=self._trace,
            )
            return stats | {"strategy": chosen}
        names = sorted({need.node for need in needs})
        self._nodes = [names.index(need.node) for need in needs]
        wanted = self._exchange_boxes(needs)
        division = self._divide(wanted, chosen)
        if not self._map_segment(division):
            self._nodes = list(range(self._group.world_size))
            division = self._divide(wanted, chosen)
            self._vote("segments", lambda: self._make_segment(division))
        self._read_alone(wanted, division)
        self._run_rounds(wanted, division)
        alone = self._jobs.pop(0)
        self._reader.wait(alone, (self._targets, self._reads), timeout_seconds=self._deadline.remaining())
        self._account(alone)
        self._reads.finish()
        if self._progress is not None:
            self._progress.at(self._nbytes)
        return {
            "strategy": chosen,
            "rung": self._reader.rung,
            "bytes_read": self._read_bytes,
            "bytes_needed": self._nbytes,
            "rounds": len(division.rounds),
        }

    def close(self) -> None:
        for job in self._jobs:
            self._reader.abandon(job, (self._targets, self._reads, self._segment))
        self._jobs = []
        if self._segment is not None:
            self._segment.close()

    # Agreeing -------------------------------------------------------------------------------------------------------

    def _vote(self, label: str, step: Callable[[], bytes | None]) -> list[bytes]:
        error: BaseException | None = None
        payload: bytes | None = None
        try:
            payload = step()
        except BaseException as failure:
            error = failure
        with self._trace.span("vote"):
            return self._channel.vote(label, error, payload or b"", self._deadline)

    def _exchange_needs(self, wanted_strategy: str) -> list[Need]:
        """Raises ValueError, on every rank, when they do not want the same strategy."""

        def mine() -> bytes:
            boxes = [(i.name, i.offsets, i.sizes) for i, _ in self._targets] if wanted_strategy != "direct" else []
            need = Need(plan.structure_digest(boxes), self._nbytes, node_name())
            return json.dumps([wanted_strategy, self._verify, need]).encode()

        votes = [json.loads(vote) for vote in self._vote(FIRST_VOTE, mine)]
        of_ranks = [wanted for wanted, _, _ in votes]
        if len(set(of_ranks)) > 1:
            differing = next(rank for rank, wanted in enumerate(of_ranks) if wanted != of_ranks[0])
            raise ValueError(
                f"ranks load with different strategies: rank {self._group.ranks[0]} with {of_ranks[0]!r}, "
                f"rank {self._group.ranks[differing]} with {of_ranks[differing]!r}; pass the same on every rank"
            )
        if wanted_strategy != "direct":
            self._verify = any(verify for _, verify, _ in votes)  # a rank may read for one that wants it
        return [Need(*need) for _, _, need in votes]

    def _exchange_boxes(self, needs: list[Need]) -> _Wanted:
        """Ranks with the same boxes as a lower one say nothing more."""
        first = {need.digest: rank for rank, need in reversed(list(enumerate(needs)))}
        rank = self._group.rank
        own: list[tuple[Part, Memory]] = []

        def mine() -> bytes:
            with self._trace.span("plan"), garbage.paused():
                for target in self._targets:
                    parts = self._reader.parts_of(target, self._reads, cast=self._cast)
                    own.extend((part, tensors.memory_of(view)) for part, view in parts)
            if first[needs[rank].digest] != rank:
                return b""
            return json.dumps([(i.name, i.offsets, i.sizes) for i, _ in self._targets]).encode()

        votes = self._vote("boxes", mine)
        wanted = _Wanted()
        numbers: dict[tuple[Any, ...], int] = {}
        with self._trace.span("plan"), garbage.paused():
            for digest, lowest in sorted(first.items(), key=lambda entry: entry[1]):
                ranks = frozenset(rank for rank, need in enumerate(needs) if need.digest == digest)
                for name, offsets, sizes in json.loads(votes[lowest]):
                    for part in self._reader.locate(name, Box(tuple(offsets), tuple(sizes))):
                        number = numbers.setdefault(_key(part), len(wanted.parts))
                        if number == len(wanted.parts):
                            wanted.parts.append(part)
                            wanted.by.append(ranks)
                        else:
                            wanted.by[number] |= ranks
            for part, memory in own:
                wanted.memories.setdefault(numbers[_key(part)], []).append(memory)
        return wanted

    def _divide(self, wanted: _Wanted, chosen: str) -> Division:
        node_count = len(set(self._nodes))
        with self._trace.span("plan"), garbage.paused():
            return divide(
                wanted.parts,
                wanted.by,
                self._reader.raw_bytes,
                [tensors.dtype_bytes(part.shard.stored.item.dtype) for part in wanted.parts],
                self._nodes,
                broadcast=chosen == "broadcast",
                bucket_bytes=min(max(BUCKET_BYTES_MIN, BUCKET_BYTES_PER_NODE * node_count), BUCKET_BYTES_MAX),
            )

    def _make_segment(self, division: Division) -> bytes:
        self._segment = Segment.make(max(division.region_bytes, 1) * REGIONS)
        return self._segment.path.encode()

    def _map_segment(self, division: Division) -> bool:
        """False, on every rank, where one cannot map its node's segment: then each must be a node of its own."""
        rank = self._group.rank
        maker = self._nodes.index(self._node)
        paths = self._vote("segment", lambda: self._make_segment(division) if maker == rank else None)

        def open_theirs() -> bytes:
            if self._segment is None:
                with suppress(OSError):
                    self._segment = Segment.open(paths[maker].decode(), max(division.region_bytes, 1) * REGIONS)
            return b"" if self._segment is None else b"mapped"

        if all(self._vote("mapped", open_theirs)):
            return True
        if self._segment is not None:
            self._segment.close()
        return False

    def _measure(self, needs: list[Need]) -> list[Rates]:
        def mine() -> bytes:
            scratch = torch.ones(PROBE_BYTES, dtype=torch.uint8)
            begin = time.perf_counter()
            scratch.clone()
            memory = PROBE_BYTES / (time.perf_counter() - begin)
            begin = time.perf_counter()
            names = [target.item.name for target in sorted(self._targets, key=lambda one: -one.item.nbytes)[:1]]
            nbytes = self._reader.probe(scratch, names, timeout_seconds=self._deadline.remaining())
            return json.dumps([nbytes / (time.perf_counter() - begin) or memory, memory]).encode()

        votes = [json.loads(vote) for vote in self._vote("rates", mine)]
        fabric = [float("inf")] * len(votes)
        if len({need.node for need in needs}) > 1:
            fabric = [json.loads(vote) for vote in self._vote("fabric", self._measure_fabric)]
        return [Rates(storage, rate, memory) for (storage, memory), rate in zip(votes, fabric, strict=True)]

    def _measure_fabric(self) -> bytes:
        rank, world_size = self._group.rank, self._group.world_size
        memory = torch.zeros((2, PROBE_FABRIC_BYTES), dtype=torch.uint8)
        begin = time.perf_counter()
        send, receive = Message(memory[0], (rank + 1) % world_size, 0), Message(memory[1], (rank - 1) % world_size, 0)
        self._fabric.transfer([send], [receive], self._deadline)
        return json.dumps(PROBE_FABRIC_BYTES / (time.perf_counter() - begin)).encode()

    # Bytes ----------------------------------------------------------------------------------------------------------

    def _read_alone(self, wanted: _Wanted, division: Division) -> None:
        for number, memories in wanted.memories.items():
            for window in division.alone[number]:
                for memory in memories:
                    self._reads.add(wanted.parts[number], memory, window)
        self._jobs.append(self._reader.start(self._reads, verify=self._verify))

    def _run_rounds(self, wanted: _Wanted, division: Division) -> None:
        region_bytes = max(division.region_bytes, 1)
        count = len(division.rounds)
        running: dict[int, Any] = {}

        def start(k: int) -> None:
            if k < count:
                running[k] = self._start_round(wanted, division, k, (k % REGIONS) * region_bytes)
                self._jobs.append(running[k])

        def read(k: int) -> None:
            # The region of round k + REGIONS - 2 was that of round k - 2, which all took before they voted on k - 1.
            for following in range(REGIONS - 1) if k == 0 else (k + REGIONS - 2,):
                start(following)
            job = running.pop(k)
            self._reader.wait(
                job, (self._segment, self._targets, self._reads), timeout_seconds=self._deadline.remaining()
            )
            self._jobs.remove(job)
            self._account(job)

        for k in range(count):
            self._round = k
            base = (k % REGIONS) * region_bytes
            self._vote(f"round-{k}", lambda k=k: read(k))  # type: ignore[misc]
            if len(set(self._nodes)) > 1:
                self._vote(f"sent-{k}", lambda k=k, base=base: self._send(division, k, base))  # type: ignore[misc]
            self._take(wanted, division, k, base)

    def _start_round(self, wanted: _Wanted, division: Division, k: int, base: int) -> Any:
        assert self._segment is not None
        one = division.rounds[k]
        reads = Reads()
        with garbage.paused():
            for position, piece in enumerate(one.pieces):
                if piece.reader == self._group.rank:
                    part = wanted.parts[piece.part]
                    if not piece.nodes:
                        for memory in wanted.memories[piece.part]:
                            reads.add(part, memory, piece.window)
                        continue
                    item_bytes = tensors.dtype_bytes(part.shard.stored.item.dtype)
                    place = self._segment.address + base + one.places[self._node][position]
                    strides = None if part.is_whole else packed_strides(part.box.sizes, item_bytes)
                    memory = Memory(place - piece.begin, item_bytes, part.box.sizes, strides)
                    reads.add(part, memory, piece.window)
        return self._reader.start(reads, verify=self._verify)

    def _send(self, division: Division, k: int, base: int) -> None:
        """Each parcel goes once to each other node that wants it, to a rank that takes turns there."""
        assert self._segment is not None
        rank, node = self._group.rank, self._node
        sends, receives = [], []
        for number, parcel in enumerate(division.rounds[k].parcels):
            # Not that of an earlier load: after a failure its messages may still be under way.
            tag = self._channel.number % (1 << 14) << 16 | number % (1 << 16)
            for other in parcel.nodes:
                if other == self._nodes[parcel.reader]:
                    continue
                ranks = [peer for peer, of in enumerate(self._nodes) if of == other]
                taker = ranks[number % len(ranks)]
                if parcel.reader == rank:
                    sends.append(Message(self._segment.tensor(base + parcel.at[node], parcel.nbytes), taker, tag))
                if taker == rank:
                    memory = self._segment.tensor(base + parcel.at[node], parcel.nbytes)
                    receives.append(Message(memory, parcel.reader, tag))
        with self._trace.span("exchange", sum(message.memory.numel() for message in receives)):
            self._fabric.transfer(sends, receives, self._deadline)

    def _take(self, wanted: _Wanted, division: Division, k: int, base: int) -> None:
        assert self._segment is not None
        one = division.rounds[k]
        places = one.places.get(self._node, {})
        copies = []
        nbytes = 0
        for position, place in places.items():
            piece: Piece = one.pieces[position]
            for memory in wanted.memories.get(piece.part, ()):
                strides = memory.stride_bytes or packed_strides(memory.sizes, memory.item_bytes)
                source = self._segment.address + base + place
                copies.append(
                    (source, piece.begin, piece.end, memory.item_bytes, memory.sizes, memory.data_ptr, strides)
                )
                nbytes += piece.nbytes
        with self._trace.span("scatter", nbytes):
            scatter_pieces(copies)
        self._done_bytes += nbytes
        if self._progress is not None:
            self._progress.at(self._done_bytes)

    def _account(self, job: Any) -> None:
        self._read_bytes += job.bytes_read
        self._trace.add_job(job)


def _key(part: Part) -> tuple[Any, ...]:
    return (part.shard.table, part.shard.stored.item.name, part.shard.stored.item.offsets, part.box)
