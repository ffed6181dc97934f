"""How long cold loads of one checkpoint take, by strategy, and how many bytes they read for it.

The ranks load together, each strategy in turn, in rounds. Before each load the checkpoint's pages are dropped from the
page cache of every node, and the targets are overwritten; after it they are compared with what an independent read
found. Rank 0 keeps the document; a file that is written after every round survives a rank that dies.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch

from .disk_probes import drop_pages
from .environment import environment, memory_available_bytes
from .load_files import FILE_ENGINES, is_tensor_file, load_into, missing_package, raw_tensors
from .load_targets import Layout, Targets, nbytes_of_rank
from .ranks import Ranks
from .results import Document, Load, new_document

__all__ = ["SAMPLES_DEFAULT", "STRATEGIES", "begin", "measure"]

STRATEGIES = ("direct", "scatter", "broadcast", "auto")
SAMPLES_DEFAULT = 5
ENGINE = "snapstone"

_COLD = "posix_fadvise(POSIX_FADV_DONTNEED) on every file, on every node"
_NOT_COLD = "nothing: the files are in memory"
_ALONE = "one rank reads all of it whatever the strategy: as direct"
_SPARE_BYTES = 256 << 20  # of memory per rank, beside the targets and one tensor of the independent read
# Of what a load read, over the ranks of a node, so much must have come from the disk, or it was not cold: what one rank
# has fetched through the page cache the others of its node find there.
_MUCH = 0.9


def begin(
    checkpoint_path: str | os.PathLike[str],
    strategies: Sequence[str],
    ranks: Ranks,
    command: Sequence[str],
    layout: Layout = "replicated",
) -> Document:
    """A document of kind "load" that has measured nothing. Of a safetensors file, the engines are those that read it.

    Raises:
        CheckpointError: there is no checkpoint that can be read. ValueError: an unknown strategy, or none.
    """
    from .. import Checkpoint

    if is_tensor_file(path := os.path.abspath(os.fspath(checkpoint_path))):
        return _begin_file(path, ranks, command, layout)
    for strategy in strategies:
        if strategy not in STRATEGIES:
            raise ValueError(f"strategy {strategy!r}: use {', '.join(STRATEGIES)}")
    if not strategies:
        raise ValueError(f"no strategy: use {', '.join(STRATEGIES)}")
    checkpoint = Checkpoint(path)
    document = new_document(
        "load", command, environment(path, ranks=ranks.world, nodes=ranks.nodes, backend=ranks.backend)
    )
    document["checkpoint"] = {
        "path": path,
        "step": checkpoint.step,
        "nbytes": checkpoint.nbytes,
        "own_nbytes": checkpoint.own_nbytes,
        "world_size": checkpoint.world_size,
        "layout": layout,
    }
    document["loads"] = [
        _row(ENGINE, strategy, checkpoint.nbytes, path, None if _differs(strategy, ranks) else _ALONE)
        for strategy in dict.fromkeys(strategies)
    ]
    return document


def _differs(strategy: str, ranks: Ranks) -> bool:
    return ranks.world > 1 or strategy in ("direct", "auto")


def _begin_file(path: str, ranks: Ranks, command: Sequence[str], layout: Layout) -> Document:
    if layout != "replicated":
        raise ValueError(f"layout {layout!r}: a safetensors file is read whole by every rank")
    nbytes = os.stat(path).st_size
    where = environment(os.path.dirname(path), ranks=ranks.world, nodes=ranks.nodes, backend=ranks.backend)
    document = new_document("load", command, where)
    document["checkpoint"] = {"path": path, "step": None, "nbytes": nbytes, "own_nbytes": nbytes, "world_size": 1}
    document["checkpoint"]["layout"] = layout
    document["loads"] = [_row(name, "file", nbytes, path, missing_package(name)) for name in FILE_ENGINES]
    return document


def _row(engine: str, strategy: str, nbytes: int, path: str, absent: str | None) -> Load:
    from .. import _native

    directory = path if os.path.isdir(path) else os.path.dirname(path)
    return {
        "engine": engine,
        "strategy": strategy,
        "seconds": [],
        "nbytes": nbytes,
        "bytes_read": None,
        "cold_by": _NOT_COLD if _native.file_system_facts(directory)["memory_backed"] else _COLD,
        "status": "absent" if absent else "partial",
        "reason": absent,
    }


def measure(
    document: Document,
    ranks: Ranks,
    *,
    samples: int = SAMPLES_DEFAULT,
    timeout: float = 600.0,
    keep: Callable[[], None] = lambda: None,
    report: Callable[[str], None] = lambda text: None,
) -> None:
    """Fills `document` as it goes, on every rank alike; `keep` is called after each round, to write it.

    One load more than `samples` of each strategy goes first and counts for nothing: it allocates staging memory. A
    strategy whose load fails, or leaves a wrong byte, is not tried again and says why.

    Raises:
        OSError: too little memory for the targets (ENOMEM), with the numbers. RankFailedError: a rank has died.
        CheckpointError: the checkpoint cannot be read. ValueError: the safetensors file cannot.
    """
    saved = document["checkpoint"]
    layout = cast("Layout", saved["layout"])
    began = time.monotonic()
    _check_memory(saved["path"], nbytes_of_rank(saved["nbytes"], layout, ranks.world), ranks)
    report("reading the checkpoint once, to compare with")
    targets = Targets(_saved_tensors(saved["path"]), layout, ranks.rank, ranks.world)
    loads = [load for load in document["loads"] if load["status"] != "absent"]
    for number in range(samples + 1):
        for load in [load for load in loads if load["reason"] is None]:
            report(f"{f'round {number} of {samples}' if number else 'warming up'}: {_name(load)}")
            outcome = _one_load(saved["path"], load, targets, ranks, timeout)
            _add(document, load, outcome, ranks.world // ranks.nodes, counts=number > 0)
        document["seconds"] = time.monotonic() - began
        keep()
    for load in loads:
        load["status"] = "measured" if load["reason"] is None else "partial" if load["seconds"] else "failed"
    document["complete"] = not document["problems"]
    keep()


def _name(load: Load) -> str:
    return load["strategy"] if load["engine"] == ENGINE else load["engine"]


def _saved_tensors(path: str) -> Iterator[tuple[str, torch.Tensor]]:
    from .. import Checkpoint

    if is_tensor_file(path):
        yield from raw_tensors(path)
        return
    with Checkpoint.open(path) as checkpoint:
        for name in checkpoint.keys():  # noqa: SIM118 - a Checkpoint is no mapping
            yield name, checkpoint.get_tensor(name)


def _check_memory(path: str, nbytes: int, ranks: Ranks) -> None:
    """The same answer on every rank."""
    on_node = max(1, ranks.world // ranks.nodes)
    needed_bytes, available_bytes = on_node * (nbytes + _SPARE_BYTES), memory_available_bytes()
    short = min(_everybody(ranks, available_bytes - needed_bytes))
    if short < 0:
        raise OSError(
            errno.ENOMEM,
            f"the {on_node} ranks of a node need {needed_bytes} bytes of memory and {-short} of them are not available",
            path,
        )


@dataclass(frozen=True, slots=True)
class _Outcome:
    """Of one load, of all ranks: the slowest one's seconds, and the sums of what they read; by the engine's own count
    or, where it keeps none, the kernel's.
    """

    seconds: float
    bytes_read: int | None
    storage_bytes: int | None
    failure: str | None


def _one_load(path: str, load: Load, targets: Targets, ranks: Ranks, timeout: float) -> _Outcome:
    targets.forget()
    if ranks.local_rank == 0:
        drop_pages(path)
    _everybody(ranks, None)
    before = _storage_bytes_read()
    began = time.monotonic()
    failure, bytes_read = None, None
    try:
        bytes_read = _load(path, load, targets, timeout)
    except Exception as error:  # of somebody else's package, any
        failure = f"rank {ranks.rank}: {type(error).__name__}: {error}"
    seconds = time.monotonic() - began
    after = _storage_bytes_read()
    if failure is None and (wrong := targets.wrong()):
        failure = f"rank {ranks.rank}: not what was saved: {', '.join(wrong[:3])}{' ...' if len(wrong) > 3 else ''}"
    from_storage = None if before is None or after is None else after - before
    every = _everybody(ranks, (seconds, bytes_read, from_storage, failure))
    failures = [one[3] for one in every if one[3] is not None]
    # Where one rank fails the others report that it did: its own words say more.
    failures.sort(key=lambda text: "RankFailedError" in text)
    storage_bytes = _sum(one[2] for one in every)
    return _Outcome(
        max(one[0] for one in every),
        storage_bytes if load["engine"] != ENGINE else _sum(one[1] for one in every),
        storage_bytes,
        failures[0] if failures else None,
    )


def _load(path: str, load: Load, targets: Targets, timeout: float) -> int | None:
    """Bytes that this rank read, where the engine says."""
    from .. import load as load_checkpoint

    if load["engine"] != ENGINE:
        load_into(load["engine"], path, targets.state)
        return None
    strategy = cast("Literal['auto', 'direct', 'scatter', 'broadcast']", load["strategy"])
    loaded = load_checkpoint(targets.state, checkpoint_id=path, strict=False, strategy=strategy, timeout=timeout)
    return int(loaded.stats["bytes_read"])


def _sum(counts: Iterable[int | None]) -> int | None:
    """None unless all are known."""
    found = list(counts)
    known = [count for count in found if count is not None]
    return sum(known) if len(known) == len(found) else None


def _everybody(ranks: Ranks, value: Any) -> list[Any]:
    """The values of all ranks, on all ranks, when all have come so far."""
    from .. import RankFailedError

    try:
        return ranks.gather(value)
    except RuntimeError as error:
        raise RankFailedError(f"another rank has died or left: {error}") from error


def _add(document: Document, load: Load, outcome: _Outcome, ranks_of_node: int, *, counts: bool) -> None:
    if outcome.failure is not None:
        load["reason"] = outcome.failure
        document["problems"].append(f"{_name(load)}: {outcome.failure}")
        return
    if not counts:
        return
    load["seconds"].append(outcome.seconds)
    if outcome.bytes_read is not None:
        load["bytes_read"] = max(load["bytes_read"] or 0, outcome.bytes_read)
    if load["cold_by"] != _COLD or outcome.storage_bytes is None:
        return
    wanted_bytes = load["nbytes"] if load["engine"] != ENGINE else (outcome.bytes_read or 0) / ranks_of_node
    if outcome.storage_bytes < _MUCH * wanted_bytes:
        document["problems"].append(
            f"{_name(load)}, load {len(load['seconds'])}: {wanted_bytes:.0f} bytes were read on a node and "
            f"{outcome.storage_bytes} came from the disk: the others were in a cache"
        )


def _storage_bytes_read() -> int | None:
    """That the kernel has fetched for this process; None where it does not say."""
    try:
        lines = Path("/proc/self/io").read_text().splitlines()
    except OSError:
        return None
    counters: dict[str, Any] = dict(line.split(": ") for line in lines)
    return int(counters["read_bytes"])
