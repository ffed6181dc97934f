"""What is measured under DCP: each row with its contenders, the ranks that save and those that load."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from machine import memory_available_bytes

__all__ = ["BY_SNAPSTONE", "BY_STOCK", "ROWS", "SAVERS", "STATE", "Contender", "Row", "state_size"]

GIB = 1 << 30
STATE = "2gb"  # the transformer of states.py, at a size of its own
SIZE, SIZE_LITTLE_MEMORY, SIZE_QUICK = 1056, 512, 64
# Four replicas of 1 GB and the page cache; or one, its staged copies, the ring and a second process.
MEMORY_BYTES = 9 * GIB
ROUNDS_OF_BIG = 3  # of rows that take long, or that no target rests on
SAVERS = 4


@dataclass(frozen=True, slots=True)
class Contender:
    """`role`: what a comparison takes it for; "context" is printed and not compared."""

    name: str
    label: str
    storage: Literal["stock", "snapstone"]
    role: Literal["ours", "reference", "context"]
    thread_count: int = 1  # of the stock writer
    stager: Literal["default", "cached", "snapstone"] = "default"
    strategy: str | None = None  # of a load: None is the reader's own choice, "alone" is rank 0 without the others


@dataclass(frozen=True, slots=True)
class Row:
    """`dimension`: along which the ranks that load have their tensors sharded; None: each has everything."""

    name: str
    title: str
    kind: Literal["save", "async", "load", "read-once"]
    contenders: tuple[Contender, ...]
    ranks: int = 1
    dimension: int | None = None
    executor: Literal["thread", "process"] = "thread"  # of an asynchronous save
    rounds_max: int | None = None


BY_STOCK = Contender("stock", "stock, 1 thread", "stock", "reference")
BY_SNAPSTONE = Contender("snapstone", "snapstone", "snapstone", "ours")
_SAVES = (BY_STOCK, Contender("stock-2", "stock, 2 threads", "stock", "reference", thread_count=2), BY_SNAPSTONE)
_ASYNC_SAVES = (
    Contender("stock", "stock, all defaults", "stock", "reference"),
    Contender("stock-tuned", "stock, cached shared stager, 2 threads", "stock", "reference", 2, "cached"),
    Contender("snapstone", "snapstone, stock stager", "snapstone", "ours"),
    Contender("snapstone-stager", "snapstone, its Stager", "snapstone", "ours", stager="snapstone"),
)
_LOADS = (
    Contender("stock", "stock", "stock", "reference"),
    Contender("snapstone", "snapstone", "snapstone", "ours"),
    Contender("snapstone-scatter", 'snapstone, strategy="scatter"', "snapstone", "ours", strategy="scatter"),
)
_READS = (
    Contender("alone", "one rank, alone", "snapstone", "reference", strategy="alone"),
    Contender("broadcast", '4 ranks, strategy="broadcast"', "snapstone", "ours", strategy="broadcast"),
    Contender("scatter", '4 ranks, strategy="scatter"', "snapstone", "ours", strategy="scatter"),
    Contender("direct", '4 ranks, strategy="direct"', "snapstone", "context", strategy="direct"),
)

ROWS = (
    Row("save", "dcp.save", "save", _SAVES),
    Row("async-thread", "dcp.async_save in a thread, to durable", "async", _ASYNC_SAVES, rounds_max=ROUNDS_OF_BIG),
    Row(
        "async-process",
        "dcp.async_save in a process, to durable",
        "async",
        _ASYNC_SAVES,
        executor="process",
        rounds_max=ROUNDS_OF_BIG,
    ),
    Row(
        "load-same",
        "dcp.load, row shards of 4 ranks to the same 4",
        "load",
        _LOADS,
        SAVERS,
        0,
        rounds_max=ROUNDS_OF_BIG,
    ),
    Row("load-rows", "dcp.load, row shards of 4 ranks to row shards of 2", "load", _LOADS, 2, 0),
    Row("load-columns", "dcp.load, row shards of 4 ranks to column shards of 2", "load", _LOADS, 2, 1),
    Row("read-once", "load of a replicated state by 4 ranks", "read-once", _READS, 4),
)


def state_size(*, quick: bool) -> int:
    """The hidden size of the transformer: 1.0 GB, or 0.2 GB where memory is short."""
    if quick:
        return SIZE_QUICK
    return SIZE if memory_available_bytes() >= MEMORY_BYTES else SIZE_LITTLE_MEMORY
