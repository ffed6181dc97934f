"""A load in which each byte that several ranks need is read from storage once, by one of them.

The steps, each of which ends in a vote of all ranks:

1. `needs`: every rank says how much it needs and where it runs; the strategy follows from that (`strategy`). With
   `direct` each rank then reads for itself.
2. `boxes`: the boxes that ranks want are exchanged, and everybody computes the same `Division`.
3. `segment`, `mapped`: one rank per node makes a segment, the others map it.
4. Bytes move in rounds (`rounds`).

A rank that fails votes its error, so nobody enters a transfer that another rank does not. One that fails between two
votes ends those that the others may be in, or come to.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import torch

from . import garbage, plan, rounds, strategy, tensors
from .collective import Channel, Deadline, Group
from .division import Division, divide
from .fabric import Fabric, Message
from .plan import Box
from .progress import Progress
from .reader import Reader
from .reads import Part, Reads
from .rounds import Rounds, Wanted
from .segment import Segment, node_name
from .strategy import Need, Rates
from .tensors import LocalShard, Memory
from .trace import Trace
from .voting import together

__all__ = ["FIRST_VOTE", "fill_jointly"]

FIRST_VOTE = "needs"
_FIRST_VOTES = (FIRST_VOTE, "rates", "fabric", "boxes", "segment", "mapped", "segments", *rounds.FIRST_VOTES)

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
        wanted = [target for target in targets if target.item.nbytes or 0 not in target.item.sizes]
        self._targets = reader.masters_first(wanted)
        self._reads = Reads()  # what this rank reads for itself
        self._segment: Segment | None = None
        self._nodes: list[int] = []
        self._rounds: Rounds | None = None
        self._nbytes = sum(map(reader.stored_nbytes, self._targets))

    @property
    def labels(self) -> tuple[str, ...]:
        """Of the votes that other ranks may be in, or come to, where this one is now."""
        return _FIRST_VOTES if self._rounds is None else self._rounds.labels

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
        assert self._segment is not None
        self._rounds = Rounds(
            self._reader,
            self._targets,
            wanted,
            division,
            self._nodes,
            self._segment,
            self._reads,
            self._channel,
            self._fabric,
            self._deadline,
            self._verify,
            self._progress,
            self._trace,
        )
        self._rounds.run(self._vote)
        self._reads.finish()
        if self._progress is not None:
            self._progress.at(self._nbytes)
        return {
            "strategy": chosen,
            "rung": self._reader.rung,
            "bytes_read": self._rounds.bytes_read,
            "bytes_needed": self._nbytes,
            "rounds": len(division.rounds),
        }

    def close(self) -> None:
        if self._rounds is not None:
            self._rounds.close()
        if self._segment is not None:
            self._segment.close()
        # An error's traceback refers to this load for as long as somebody keeps it, the other way round too: shared
        # memory must not wait for that.
        self._rounds = self._segment = None

    # Agreeing -------------------------------------------------------------------------------------------------------

    def _vote(self, label: str, step: Callable[[], bytes | None]) -> list[bytes]:
        return together(self._channel, label, self._deadline, self._trace, step)

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

    def _exchange_boxes(self, needs: list[Need]) -> Wanted:
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
        wanted = Wanted()
        numbers: dict[tuple[Any, ...], int] = {}
        with self._trace.span("plan"), garbage.paused():
            for digest, lowest in sorted(first.items(), key=lambda entry: entry[1]):
                ranks = frozenset(rank for rank, need in enumerate(needs) if need.digest == digest)
                for name, offsets, sizes in json.loads(votes[lowest]):
                    for part in self._reader.parts_read(name, Box(tuple(offsets), tuple(sizes))):
                        number = numbers.setdefault(_key(part), len(wanted.parts))
                        if number == len(wanted.parts):
                            wanted.parts.append(part)
                            wanted.by.append(ranks)
                        else:
                            wanted.by[number] |= ranks
            for part, memory in own:
                wanted.memories.setdefault(numbers[_key(part)], []).append(memory)
        return wanted

    def _divide(self, wanted: Wanted, chosen: str) -> Division:
        node_count = len(set(self._nodes))
        with self._trace.span("plan"), garbage.paused():
            return divide(
                wanted.parts,
                wanted.by,
                self._reader.raw_bytes,
                [tensors.dtype_bytes(part.shard.stored.item.dtype) for part in wanted.parts],
                self._nodes,
                broadcast=chosen == "broadcast",
                bucket_bytes=rounds.bucket_bytes(node_count),
            )

    def _make_segment(self, division: Division) -> bytes:
        self._segment = Segment.make(rounds.segment_bytes(division, self._nodes))
        return self._segment.path.encode()

    def _map_segment(self, division: Division) -> bool:
        """False, on every rank, where one cannot map its node's segment: then each must be a node of its own."""
        rank = self._group.rank
        maker = self._nodes.index(self._nodes[rank])
        paths = self._vote("segment", lambda: self._make_segment(division) if maker == rank else None)

        def open_theirs() -> bytes:
            if self._segment is None:
                with suppress(OSError):
                    self._segment = Segment.open(paths[maker].decode(), rounds.segment_bytes(division, self._nodes))
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
        send, receive = Message(memory[0], (rank + 1) % world_size, 0), Message(memory[1], (rank - 1) % world_size, 0)
        begin = time.perf_counter()
        self._fabric.transfer([send], [receive], self._deadline)
        return json.dumps(PROBE_FABRIC_BYTES / (time.perf_counter() - begin)).encode()


def _key(part: Part) -> tuple[Any, ...]:
    return (part.shard.table, part.shard.stored.item.name, part.shard.stored.item.offsets, part.box)
