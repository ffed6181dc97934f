"""The rounds of a joint load: bytes from storage to the segment of a node, to other nodes, to tensors.

1. Round K is read, verified, by the readers that the division names, into the region K mod REGIONS of their node, as
   strings of the parts that are wanted. The rounds after it are being read meanwhile.
2. All ranks have read their share of round K. Ranks of one node see that on a board in their segment. With several
   nodes they vote, `round-K`; then what ranks of other nodes want crosses the network, once per node, and a second
   vote, `sent-K`, says that it has arrived.
3. Every rank copies what it wants of round K from its node's region to its tensors. It says that it has read round K+1
   only after that, so when all have said so the region of round K is free.

On one node a single vote, `rounds`, ends it: a rank that fails marks the board, which ends the waits of the others, and
votes its error. What nobody else wants a rank reads into its own tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from . import garbage, tensors
from ._native import Board, scatter_pieces
from .collective import Channel, Deadline
from .division import Division, Piece
from .errors import CheckpointError
from .fabric import Fabric, Message
from .progress import Progress
from .reader import Reader
from .reads import Part, Reads, packed_strides
from .segment import Segment
from .tensors import LocalShard, Memory
from .trace import Trace

__all__ = ["FIRST_VOTES", "Rounds", "Wanted", "bucket_bytes", "segment_bytes"]

FIRST_VOTES = ("rounds", "round-0")

BUCKET_BYTES = 8 << 20  # of one round on one node
BUCKET_BYTES_PER_NODE = 16 << 20  # where ranks vote on each round
BUCKET_BYTES_MAX = 256 << 20
REGIONS = 8
_BOARD_GRAIN_BYTES = 4096
_WAIT_SECONDS = 0.1  # between looks at Ctrl-C and the deadline

Vote = Callable[[str, Callable[[], bytes | None]], list[bytes]]


@dataclass(slots=True)
class Wanted:
    """The parts that all ranks want, and where those of this rank go."""

    parts: list[Part] = field(default_factory=list)
    by: list[frozenset[int]] = field(default_factory=list)
    memories: dict[int, list[Memory]] = field(default_factory=dict)  # by position in `parts`


def bucket_bytes(node_count: int) -> int:
    """Bytes of one round on one node."""
    return BUCKET_BYTES if node_count == 1 else min(BUCKET_BYTES_PER_NODE * node_count, BUCKET_BYTES_MAX)


def segment_bytes(division: Division, nodes: Sequence[int]) -> int:
    return _board_bytes(nodes) + max(division.region_bytes, 1) * REGIONS


def _board_bytes(nodes: Sequence[int]) -> int:
    """Of a board for any of the nodes, at the start of its segment."""
    return -(-len(nodes) * Board.STRIDE // _BOARD_GRAIN_BYTES) * _BOARD_GRAIN_BYTES


class Rounds:
    """One rank's part: `run`, `close`. `labels` are the votes that other ranks may be in, or come to."""

    def __init__(
        self,
        reader: Reader,
        targets: Sequence[LocalShard],
        wanted: Wanted,
        division: Division,
        nodes: Sequence[int],
        segment: Segment,
        alone: Reads,
        channel: Channel,
        fabric: Fabric,
        deadline: Deadline,
        verify: bool,
        progress: Progress | None,
        trace: Trace,
    ) -> None:
        self.labels: tuple[str, ...] = FIRST_VOTES
        self.bytes_read = 0
        self._reader = reader
        self._wanted = wanted
        self._division = division
        self._nodes = nodes
        self._rank = channel.group.rank
        self._node = nodes[self._rank]
        self._segment = segment
        self._alone = alone
        self._channel = channel
        self._fabric = fabric
        self._deadline = deadline
        self._verify = verify
        self._progress = progress
        self._trace = trace
        self._filled = (targets, alone, segment)  # stays alive while the kernel may write there
        self._jobs: list[Any] = []
        self._running: dict[int, Any] = {}
        self._alone_job: Any = None
        self._done_bytes = 0

    def run(self, vote: Vote) -> None:
        if len(set(self._nodes)) == 1:
            if not all(vote("rounds", self._keep_in_step)):
                raise CheckpointError(f"load did not end within {self._deadline.seconds:g} s", path=self._reader.path)
            return
        for k in range(len(self._division.rounds)):
            self.labels = (f"round-{k}", f"sent-{k}", f"round-{k + 1}")
            vote(f"round-{k}", lambda k=k: self._read(k))  # type: ignore[misc]
            vote(f"sent-{k}", lambda k=k: self._send(k))  # type: ignore[misc]
            self._take(k)
        self._finish(self._start_alone())

    def close(self) -> None:
        """Ends what still reads."""
        for job in self._jobs:
            self._reader.abandon(job, self._filled)
        self._jobs = []
        del self._segment, self._filled  # which an error's traceback would keep

    def _keep_in_step(self) -> bytes:
        """Empty when the deadline passed, or another rank failed, which the vote will tell."""
        count = len(self._division.rounds)
        board = Board(self._segment.address, len(self._nodes))
        try:
            for k in range(count):
                self._read(k)
                board.post(self._rank, k + 1)
                with self._trace.span("vote"):
                    while (state := board.wait_for(k + 1, _WAIT_SECONDS)) == "timed out":
                        if self._deadline.expired:
                            return b""
                        # Who left before it came to its board marked none.
                        self._channel.raise_if_failed("rounds", self._deadline)
                if state == "failed":
                    return b""
                self._take(k)
            self._finish(self._start_alone())
        except BaseException:
            board.fail(self._rank)
            raise
        return b"done"

    def _start_alone(self) -> Any:
        """The job that reads what nobody else wants, started with the first round, or at the end when there is none."""
        if self._alone_job is not None:
            return self._alone_job
        for number, memories in self._wanted.memories.items():
            for window in self._division.alone[number]:
                for memory in memories:
                    self._alone.add(self._wanted.parts[number], memory, window)
        self._alone_job = self._start(self._alone)
        return self._alone_job

    def _start(self, reads: Reads) -> Any:
        job = self._reader.start(reads, verify=self._verify)
        self._jobs.append(job)
        return job

    def _finish(self, job: Any) -> None:
        self._reader.wait(job, self._filled, timeout_seconds=self._deadline.remaining())
        self._jobs.remove(job)
        self.bytes_read += job.bytes_read
        self._trace.add_job(job)

    def _region(self, k: int) -> int:
        """Where the region of a round begins in the segment."""
        return _board_bytes(self._nodes) + k % REGIONS * max(self._division.region_bytes, 1)

    def _read(self, k: int) -> None:
        if k == 0:
            self._start_alone()
        # The region of round k + REGIONS - 2 was that of k - 2, which all took before they said to have read k - 1.
        for following in range(REGIONS - 1) if k == 0 else (k + REGIONS - 2,):
            if following < len(self._division.rounds):
                self._running[following] = self._start(self._reads_of(following))
        self._finish(self._running.pop(k))

    def _reads_of(self, k: int) -> Reads:
        one = self._division.rounds[k]
        reads = Reads()
        with garbage.paused():
            for position, piece in enumerate(one.pieces):
                if piece.reader == self._rank:
                    part = self._wanted.parts[piece.part]
                    if not piece.nodes:
                        for memory in self._wanted.memories[piece.part]:
                            reads.add(part, memory, piece.window)
                        continue
                    item_bytes = tensors.dtype_bytes(part.shard.stored.item.dtype)
                    place = self._segment.address + self._region(k) + one.places[self._node][position]
                    strides = None if part.is_whole else packed_strides(part.box.sizes, item_bytes)
                    memory = Memory(place - piece.begin, item_bytes, part.box.sizes, strides)
                    reads.add(part, memory, piece.window)
        return reads

    def _send(self, k: int) -> None:
        """Each parcel goes once to each other node that wants it, to a rank that takes turns there."""
        rank, node, base = self._rank, self._node, self._region(k)
        sends, receives = [], []
        for number, parcel in enumerate(self._division.rounds[k].parcels):
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

    def _take(self, k: int) -> None:
        one = self._division.rounds[k]
        places = one.places.get(self._node, {})
        copies = []
        nbytes = 0
        for position, place in places.items():
            piece: Piece = one.pieces[position]
            for memory in self._wanted.memories.get(piece.part, ()):
                strides = memory.stride_bytes or packed_strides(memory.sizes, memory.item_bytes)
                source = self._segment.address + self._region(k) + place
                copies.append(
                    (source, piece.begin, piece.end, memory.item_bytes, memory.sizes, memory.data_ptr, strides)
                )
                nbytes += piece.nbytes
        with self._trace.span("scatter", nbytes):
            scatter_pieces(copies)
        self._done_bytes += nbytes
        if self._progress is not None:
            self._progress.at(self._done_bytes)
