"""States that differ between ranks, and what the tests of this folder ask of a checkpoint afterwards."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

import snapstone as ss
from snapstone import _native
from snapstone.reader import Reader
from snapstone.values import decode

LATE_S = 2.0  # past the deadline: the longest that a rank may take
AT_ONCE_S = 2.0  # for what needs no deadline to be known
LONG_S = 30.0  # a deadline that no test waits for


def common(seed: int) -> dict[str, torch.Tensor]:
    """What every rank holds alike: large enough for several chunks, and small enough to be packed."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "weight": torch.randn(600, 300, generator=generator),
        "other": torch.randn(150_000, generator=generator),
        "bias": torch.randn(7, generator=generator),
    }


def own(rank: int, seed: int) -> dict[str, torch.Tensor]:
    return {f"own.{rank}": torch.randn(40_000, generator=torch.Generator().manual_seed(1000 * seed + rank))}


def values_of(rank: int, seed: int) -> dict[str, Any]:
    generator = random.Random(100 * seed + rank)
    return {"rng": generator.getstate(), "who": ("rank", rank), "seed": seed}


def state(rank: int, seed: int) -> dict[str, Any]:
    return {**common(seed), **own(rank, seed), **values_of(rank, seed)}


def blank(rank: int) -> dict[str, Any]:
    """To load into: the names of `state`, other values."""
    return {name: torch.zeros_like(item) if is_tensor(item) else None for name, item in state(rank, 0).items()}


def is_tensor(item: object) -> bool:
    return isinstance(item, torch.Tensor)


def same(actual: dict[str, Any], expected: dict[str, Any]) -> bool:
    """Same names, same bits, equal values of equal types."""
    if actual.keys() != expected.keys():
        return False
    return all(
        torch.equal(actual[name], item) if is_tensor(item) else repr(actual[name]) == repr(item)
        for name, item in expected.items()
    )


class Trap:
    """A Stateful that does something else than give its state."""

    def __init__(self, what: str) -> None:
        self.what = what

    def state_dict(self) -> dict[str, Any]:
        if self.what == "raises":
            raise ZeroDivisionError("no state today")
        if self.what.startswith("SIG"):
            os.kill(os.getpid(), getattr(signal, self.what))
        return {}

    def load_state_dict(self, _: Any) -> None:
        raise ZeroDivisionError("cannot take it")


def save(rank: int, run: Path, step: int, timeout: float = LONG_S, **more: Any) -> Any:
    extra = more.pop("extra", {})
    return ss.save({**state(rank, step), **extra}, checkpoint_id=run / f"step-{step}", timeout=timeout, **more)


def said(results: list[Any], failing: int) -> None:
    """Every rank but `failing` blames it, with one voice."""
    others = [ended for rank, ended in enumerate(results) if rank != failing]
    for ended in others:
        assert ended["error"] == "RankFailedError", ended
        assert ended["failed_ranks"] == (failing,), ended
        assert f"rank {failing}" in ended["message"], ended
    assert len({ended["message"] for ended in others}) == 1


def assert_holds(path: Path, world_size: int, seed: int) -> None:
    """The checkpoint at `path` is what `world_size` ranks saved of `seed`, in every byte of its files."""
    report = ss.verify(path)
    assert report, report.problems
    tensors = common(seed)
    for rank in range(world_size):
        tensors |= own(rank, seed)
    with ss.Checkpoint.open(path) as checkpoint:
        assert same(checkpoint.load_tensors(), tensors)
    for rank in range(world_size):
        assert objects_of(path, rank) == values_of(rank, seed)


def objects_of(path: Path, rank: int) -> dict[str, Any]:
    return {name: decode(value, name=name) for name, (_, value) in Reader(path).objects(rank).items()}


def hidden(run: Path) -> list[str]:
    """Staging and trash directories."""
    return sorted(name for name in os.listdir(run) if name.startswith("."))


def attempt(call: Callable[[], Any]) -> dict[str, Any]:
    """How `call` ended: what a rank reports of its own save or load."""
    begin = time.monotonic()
    error: BaseException | None = None
    try:
        call()
    except BaseException as failure:
        error = failure
    return {
        "seconds": time.monotonic() - begin,
        "error": None if error is None else type(error).__name__,
        "message": str(error),
        "errno": getattr(error, "errno", None),
        "failed_ranks": getattr(error, "failed_ranks", None),
        "tensor": getattr(error, "tensor", None),
    }


def resources() -> tuple[int, int]:
    """Open files, and staging slots in use. Rings do not count: a lane that has had work keeps one."""
    targets = []
    for descriptor in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):  # of this listing itself
            targets.append(os.readlink(f"/proc/self/fd/{descriptor}"))
    facts = _native.ring_facts()
    return len(targets) - targets.count("anon_inode:[io_uring]"), facts["slots"] - facts["free_slots"]


def segment_descriptors() -> set[str]:
    """Open files of memory that ranks of one node share."""
    found = {name: os.path.realpath(f"/proc/self/fd/{name}") for name in os.listdir("/proc/self/fd")}
    return {name for name, target in found.items() if "memfd:snapstone-load" in target}


def leaked(before: tuple[int, int]) -> list[int]:
    """What is open and in use beyond `before`. Slots come back a moment after a cancelled request has, and the store's
    thread opens files of its own for a moment.
    """
    end = time.monotonic() + 8
    while True:
        more = [now - then for now, then in zip(resources(), before, strict=True)]
        if max(more) <= 0 or time.monotonic() > end:
            return [max(0, one) for one in more]
        time.sleep(0.01)
