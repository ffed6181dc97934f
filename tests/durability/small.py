"""Small states, and what every test of this folder asks of a checkpoint directory afterwards."""

from __future__ import annotations

import os
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

import snapstone as ss
from snapstone import _native

Bits = dict[str, Any]
RUNGS = ("uring-fixed", "uring", "threads-direct", "buffered")  # all ways of doing I/O


def state(seed: int = 0) -> dict[str, Any]:
    """A packed chunk of three tensors, a large tensor of two chunks (with SNAPSTONE_CHUNK_BYTES=65536), two values."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "large": torch.randn(17_000, generator=generator),
        "small": torch.randn(3, 5, generator=generator),
        "bytes": torch.randint(0, 256, (7,), dtype=torch.uint8, generator=generator),
        "scalar": torch.tensor(float(seed)),
        "step": seed,
        "extra": (seed, "text"),
    }


def layers(seeds: str) -> dict[str, Any]:
    """Four tensors of a chunk each (with SNAPSTONE_CHUNK_BYTES=65536) and a packed one, each made from a digit of
    `seeds`; what two states have in common is what their digits say.
    """
    made = [torch.randn(16_384, generator=torch.Generator().manual_seed(int(digit))) for digit in seeds[:4]]
    tensors = {f"layer{number}": tensor for number, tensor in enumerate(made)}
    return {**tensors, "scalar": torch.tensor(float(seeds[4])), "seeds": seeds}


def make(what: int | str) -> dict[str, Any]:
    """`state` of a number, `layers` of digits."""
    return layers(what) if isinstance(what, str) else state(what)


def blank(what: int | str = 1) -> dict[str, Any]:
    """A state to load into: the names of `make(what)`, other values."""
    return {name: value * 0 - 77 if isinstance(value, torch.Tensor) else None for name, value in make(what).items()}


def bits(values: dict[str, Any]) -> Bits:
    """Tensors as bytes, so that == means bit for bit."""

    def of(tensor: torch.Tensor) -> bytes:
        return tensor.clone(memory_format=torch.contiguous_format).reshape(-1).view(torch.uint8).numpy().tobytes()

    return {
        name: (str(value.dtype), tuple(value.shape), of(value)) if isinstance(value, torch.Tensor) else value
        for name, value in values.items()
    }


def load(path: Path, what: int | str = 1) -> Bits:
    """What the checkpoint at `path` holds of the names in `make(what)`."""
    target = blank(what)
    ss.load(target, checkpoint_id=path)
    return bits(target)


def assert_holds(path: Path, what: int | str) -> None:
    """The checkpoint at `path` is `make(what)`, bit for bit and in every byte of its files."""
    assert load(path, what) == bits(make(what)), path
    report = ss.verify(path)
    assert report, report.problems


# A full save, then a delta save that links its file and has one of its own, in the same run. "previous" is the base of
# what tests do next: a save that links both files; one that links the newer and carries a chunk of the older; one that
# takes the place of its base.
ORIGIN, PREVIOUS = "11111", "11122"
DELTAS = {"link": "11123", "carry": "13323", "replace": "11123"}


def save_previous(run: Path) -> None:
    """ "origin" and "previous"."""
    ss.save(layers(ORIGIN), checkpoint_id=run / "origin", overwrite=True)
    ss.save(layers(PREVIOUS), checkpoint_id=run / "previous", base=run / "origin", overwrite=True)


def save_delta(run: Path, kind: str, **options: Any) -> ss.Checkpoint:
    """One of DELTAS as "next", or in the place of "previous"."""
    base = run / "previous"
    target = base if kind == "replace" else run / "next"
    return ss.save(layers(DELTAS[kind]), checkpoint_id=target, base=base, overwrite=kind == "replace", **options)


def tree(path: Path) -> dict[str, tuple[int, bytes]]:
    """Inode and contents of every file under `path`."""
    return {str(file): (file.stat().st_ino, file.read_bytes()) for file in sorted(path.rglob("*")) if file.is_file()}


def leftovers(run: Path) -> list[str]:
    return sorted(name for name in os.listdir(run) if name.startswith("."))


def reap_all(run: Path) -> None:
    """Removes leftovers of any age; there must be none then."""
    for name in leftovers(run):
        os.utime(run / name, (0, 0))
    _native.reap(str(run))
    assert leftovers(run) == []


def in_memory(otherwise: Path) -> Path:
    """A new directory in memory, where an fsync costs microseconds; `otherwise` where there is none."""
    memory = Path("/dev/shm")
    return Path(tempfile.mkdtemp(prefix="snapstone-test-", dir=memory)) if os.access(memory, os.W_OK) else otherwise


def open_files(under: Path) -> list[str]:
    """What this process has open in a directory. Rings and probes that the engine keeps are elsewhere."""
    links = []
    for fd in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):  # the descriptor of the listing itself
            links.append(os.readlink(f"/proc/self/fd/{fd}"))
    return [link for link in links if link.startswith(str(under))]


def assert_slots_free() -> None:
    facts = _native.ring_facts()
    assert facts["free_slots"] == facts["slots"], facts


def threads() -> list[str]:
    """Names of this process's threads, sorted; but for those that the kernel adds for its rings."""
    names = []
    for task in os.listdir("/proc/self/task"):
        with suppress(FileNotFoundError, ProcessLookupError):  # ended meanwhile
            names.append(Path(f"/proc/self/task/{task}/comm").read_text().strip())
    return sorted(name for name in names if not name.startswith("iou-"))


class Resources:
    """What must not grow from one operation to the next: threads, slots in use, descriptors under a directory."""

    IO_THREADS_MAX = (
        2 * 2 * 4
    )  # lanes make them when they first have work: for reads and writes of two kinds, four each

    def __init__(self, under: Path) -> None:
        self.under = under
        self.before = self.others()

    def others(self) -> list[str]:
        names = threads()
        others = [name for name in names if name != "snapstone-io"]
        assert len(names) - len(others) <= self.IO_THREADS_MAX, names
        return others

    def assert_none_leaked(self, what: object) -> None:
        assert open_files(self.under) == [], what
        assert_slots_free()
        end = time.monotonic() + 5
        while len(now := self.others()) > len(self.before) and time.monotonic() < end:
            time.sleep(0.005)  # one that has been told to end
        assert len(now) <= len(self.before), (what, now, self.before)
