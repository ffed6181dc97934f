"""Runs of saves, deltas and other things that people do to checkpoints, in any order, against a model in memory.

Invariants, after every step:
  1. Every checkpoint of the run holds, bit for bit, what was saved under its name; `verify` finds nothing.
  2. Of each shared file of a new checkpoint at least half is used; what is shared is on the disk once.
  3. Nothing else is in the run, and no descriptor or slot is left.

The draws are derandomized: the same in every run.
"""

from __future__ import annotations

import math
import os
import shutil
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

import snapstone as ss
from durability import small
from durability.based import forget as forget_earlier_saves
from durability.conftest import MEMORY
from snapstone import manifest
from snapstone.index import CHUNK_DTYPE, padded
from snapstone.reader import Reader

CHECKPOINTS_MAX = 6
TENSORS_MAX = 7
ELEMENTS = (0, 1, 5, 3_000, 16_384, 20_000, 50_000)  # of 4 bytes: none, packed, one chunk of 64 KiB, several
DTYPES = (torch.float32, torch.int32, torch.float16, torch.bfloat16, torch.float64, torch.uint8)
CHUNK_BYTES = (65536, 131072)
NAMES = [f"step-{number}" for number in range(8)]
CODECS = (None, None, "zstd", "xor-zstd", "xor-zstd:1")

SAVING: dict[str, st.SearchStrategy[Any]] = {
    "name": st.sampled_from(NAMES),
    "base": st.sampled_from(["auto", "auto", None, *NAMES]),
    "codec": st.sampled_from(CODECS),
    "full_every": st.sampled_from([None, None, 2, 4]),
    "chunk_bytes": st.sampled_from([*CHUNK_BYTES[:1] * 3, CHUNK_BYTES[1]]),
    "forget": st.booleans(),
}
counted: Counter[str] = Counter()  # what was drawn: a test that never carries a chunk proves little

ENOUGH = ("deltas", "deltas of deltas", "carried", "several shared", "with references", "compacted")


def values(elements: int, seed: int) -> torch.Tensor:
    return torch.randn(elements, generator=torch.Generator().manual_seed(seed))


def retyped(value: torch.Tensor, drawn: int) -> torch.Tensor:
    """The same bytes, as something else."""
    dtype = DTYPES[drawn % len(DTYPES)]
    fits = value.numel() and value.nbytes % dtype.itemsize == 0
    copy = value.clone(memory_format=torch.contiguous_format)
    return copy.reshape(-1).view(torch.uint8).view(dtype) if fits else value


def filled(value: torch.Tensor, drawn: int) -> torch.Tensor:
    return torch.full_like(value, (0.0, -0.0, math.nan)[drawn % 3]) if value.is_floating_point() else value


CHANGES: dict[str, Callable[[torch.Tensor, int], torch.Tensor | None]] = {
    "add or replace": lambda value, drawn: value,
    "set a value": lambda value, drawn: value,
    "remove": lambda value, drawn: None,
    "reshape": lambda value, drawn: value.reshape(4, -1) if value.numel() and value.numel() % 4 == 0 else value,
    "retype": retyped,
    "fill with what compares oddly": filled,
    "tie": lambda value, drawn: value,
    "untie": lambda value, drawn: value.clone(),
    "move in memory, not contiguous": lambda value, drawn: torch.stack([value, value], -1)[..., 0],
}


def copied(state: dict[str, Any]) -> dict[str, Any]:
    return {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in state.items()}


def used_bytes(path: Path) -> dict[str, int]:
    """Of each shared file: the bytes that chunk records of the checkpoint are in."""
    places: dict[str, set[tuple[int, int]]] = {}
    for index in Reader(path).indexes:
        table = np.frombuffer(index.table, CHUNK_DTYPE)
        for row, nbytes in zip(table, padded(table["stored_bytes"]), strict=True):
            places.setdefault(index.files[row["file"]], set()).add((int(row["offset"]), int(nbytes)))
    return {name: sum(nbytes for _, nbytes in found) for name, found in places.items()}


class Run(RuleBasedStateMachine):
    """`state` is what a training run holds now, `saved` what its checkpoints must hold."""

    def __init__(self) -> None:
        super().__init__()
        root = MEMORY if os.access(MEMORY, os.W_OK | os.X_OK) else None
        self.run = Path(tempfile.mkdtemp(prefix="snapstone-test-", dir=root))
        self.state: dict[str, Any] = {f"t{number}": values(n, number) for number, n in enumerate((20_000, 50_000, 5))}
        self.saved: dict[str, dict[str, Any]] = {}
        self.fresh = ""
        self.seed = 100
        os.environ["SNAPSTONE_CHUNK_BYTES"] = str(CHUNK_BYTES[0])

    def teardown(self) -> None:
        shutil.rmtree(self.run)

    def pick(self, drawn: int) -> str:
        return list(self.saved)[drawn % len(self.saved)]

    # The state changes ------------------------------------------------------------------------------------------------

    @rule(chosen=st.sets(st.integers(0, TENSORS_MAX), max_size=2), part=st.floats(0, 1))
    def train(self, chosen: set[int], part: float) -> None:
        tensors = [value for value in self.state.values() if isinstance(value, torch.Tensor)]
        for number, value in enumerate(tensors):
            if number in chosen:
                flat = value.view(-1)
                begin = int(part * flat.numel())
                flat[begin : begin + 1000] += 1

    @rule(kind=st.sampled_from(sorted(CHANGES)), number=st.integers(0, TENSORS_MAX), drawn=st.integers(0, 1 << 16))
    def change(self, kind: str, number: int, drawn: int) -> None:
        name, value = f"t{number}", self.state.get(f"t{number}")
        if kind == "add or replace":
            elements, dtype = ELEMENTS[drawn % len(ELEMENTS)], DTYPES[drawn % len(DTYPES)]
            self.seed += 1
            self.state[name] = (values(elements, self.seed) * 100).to(dtype)
        elif kind == "set a value":
            self.state[f"v{number}"] = drawn
        elif value is not None:
            changed = CHANGES[kind](value, drawn)
            self.state.pop(name)
            if changed is not None:
                self.state[f"t{drawn % (TENSORS_MAX + 1)}" if kind in ("tie", "untie") else name] = changed
                self.state.setdefault(name, value)

    # Saves ------------------------------------------------------------------------------------------------------------

    def options(self, base: str | None, codec: str | None, full_every: int | None, chunk_bytes: int) -> dict[str, Any]:
        os.environ["SNAPSTONE_CHUNK_BYTES"] = str(chunk_bytes)
        path = self.run / base if base in self.saved else base if base == "auto" else None
        return {"base": path, "codec": codec, "full_every": full_every, "overwrite": True, "keyframe_every": 3}

    def save(self, name: str, act: Callable[[], ss.Checkpoint], options: dict[str, Any], forget: bool) -> None:
        if len(self.saved) >= CHECKPOINTS_MAX and name not in self.saved:
            return
        if forget:
            forget_earlier_saves()
        expected = copied(self.state)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            saved = act()
        self.saved[name], self.fresh = expected, name
        document = manifest.read(str(self.run / name))
        counted["saves"] += 1
        counted["deltas"] += document.base is not None
        counted["deltas of deltas"] += document.base is not None and document.base.depth > 1
        counted["carried"] += any(len(one.data) > 1 for one in document.writers)
        counted["several shared"] += len(document.shared) > 1
        references = sum(index.references for index in Reader(self.run / name).indexes)
        counted["with references"] += references > 0
        assert document.base is None or options["base"] is not None
        assert document.base is None or document.base.depth < (options["full_every"] or 1 << 63)
        if document.base is not None:
            assert saved.stats["own_bytes"] == sum(entry.nbytes for one in document.writers for entry in one.data)

    @rule(**SAVING)
    def save_now(self, name: str, forget: bool, **drawn: Any) -> None:
        options = self.options(**drawn)
        self.save(name, lambda: ss.save(self.state, checkpoint_id=self.run / name, **options), options, forget)

    @rule(name=st.sampled_from(NAMES), base=st.integers(0, 9), codec=st.sampled_from(CODECS), forget=st.booleans())
    def save_a_delta(self, name: str, base: int, codec: str | None, forget: bool) -> None:
        chosen = "auto" if base < 6 or not self.saved else self.pick(base)
        self.save_now(name, forget, base=chosen, codec=codec, full_every=None, chunk_bytes=CHUNK_BYTES[0])

    @rule(chosen=st.sets(st.integers(0, TENSORS_MAX), max_size=2), part=st.floats(0, 1), codec=st.sampled_from(CODECS))
    def train_and_save_often(self, chosen: set[int], part: float, codec: str | None) -> None:
        for number in range(3):
            self.train(chosen, part)
            self.save_a_delta(NAMES[number], 0, codec, number == 1)

    @rule(chosen=st.sets(st.integers(0, TENSORS_MAX), min_size=1), **SAVING)
    def save_behind_the_training(self, name: str, forget: bool, chosen: set[int], **drawn: Any) -> None:
        """The state changes as soon as the call returns."""
        options = self.options(**drawn)

        def act() -> ss.Checkpoint:
            handle = ss.async_save(self.state, checkpoint_id=self.run / name, **options)
            self.train(chosen, 0.0)
            self.train(chosen, 0.5)
            return handle.result(60)

        self.save(name, act, options, forget)

    # What people do to checkpoints ------------------------------------------------------------------------------------

    @precondition(lambda self: len(self.saved) > 1)
    @rule(chosen=st.sets(st.integers(0, CHECKPOINTS_MAX), max_size=4))
    def delete(self, chosen: set[int]) -> None:
        for name in [name for number, name in enumerate(list(self.saved)) if number in chosen]:
            shutil.rmtree(self.run / name)
            del self.saved[name]

    @precondition(lambda self: self.saved)
    @rule(drawn=st.integers(0, CHECKPOINTS_MAX), new=st.sampled_from(NAMES), copy=st.booleans())
    def rename_or_copy(self, drawn: int, new: str, copy: bool) -> None:
        old = self.pick(drawn)
        if new in self.saved or (copy and len(self.saved) >= CHECKPOINTS_MAX):
            return
        if copy:
            shutil.copytree(self.run / old, self.run / new)
            self.saved[new] = self.saved[old]
        else:
            (self.run / old).rename(self.run / new)
            self.saved[new] = self.saved.pop(old)

    @precondition(lambda self: self.saved)
    @rule(drawn=st.integers(0, CHECKPOINTS_MAX))
    def compact(self, drawn: int) -> None:
        path = self.run / self.pick(drawn)
        counted["compacted"] += (path / "base").exists()
        ss.compact(path)
        assert not (path / "base").exists()

    # Invariants -------------------------------------------------------------------------------------------------------

    @invariant()
    def every_checkpoint_holds_what_was_saved(self) -> None:
        assert sorted(os.listdir(self.run)) == sorted(self.saved)
        for name, expected in self.saved.items():
            target = {
                key: torch.zeros_like(value, memory_format=torch.contiguous_format) + 1
                if isinstance(value, torch.Tensor)
                else None
                for key, value in expected.items()
            }
            ss.load(target, checkpoint_id=self.run / name)
            assert small.bits(target) == small.bits(expected), name
            report = ss.verify(self.run / name)
            assert report, report.problems

    @invariant()
    def half_of_what_is_shared_is_used(self) -> None:
        if not self.fresh:
            return
        path, self.fresh = self.run / self.fresh, ""
        if not path.exists():
            return
        document, used = manifest.read(str(path)), used_bytes(path)
        assert (document.base is not None) == bool(document.shared) == (path / "base").exists()
        for entry in document.shared:
            assert 2 * used[entry.name] >= entry.nbytes, entry
            assert (path / entry.name).stat().st_nlink >= 1
        base = [self.run / name for name in self.saved if document.base and name == document.base.name]
        if base and base[0] != path:
            inodes = {file.stat().st_ino for file in base[0].rglob("*.data")}
            assert {(path / entry.name).stat().st_ino for entry in document.shared} <= inodes

    @invariant()
    def nothing_is_left_open(self) -> None:
        assert small.open_files(self.run) == []


Run.TestCase.settings = settings(
    max_examples=25,
    stateful_step_count=30,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)


class TestRuns(Run.TestCase):  # type: ignore[misc]
    def setUp(self) -> None:
        super().setUp()
        self.chunk_bytes = os.environ.get("SNAPSTONE_CHUNK_BYTES")

    def tearDown(self) -> None:
        os.environ.pop("SNAPSTONE_CHUNK_BYTES")
        if self.chunk_bytes is not None:
            os.environ["SNAPSTONE_CHUNK_BYTES"] = self.chunk_bytes
        small.assert_slots_free()
        print("derandomized:", dict(counted))
        assert all(counted[what] for what in ENOUGH), counted
        super().tearDown()
