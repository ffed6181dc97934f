"""Random runs of saves, loads, steps, cancellations and failing calls; run by test_stress.py, one seed after the other.

As a program it goes on until it finds something or the time is up: `python -m cuda.stress SECONDS [SEED]` on the fake
driver.
"""

from __future__ import annotations

import faulthandler
import gc
import os
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import snapstone as ss
from cuda import fake_torch
from cuda.device import Devices, FakeDevices
from cuda.fake_driver import FakeDriver
from cuda.states import KIB, Tensors, bits
from snapstone import _native

__all__ = ["CHUNK_BYTES", "Run"]

CHUNK_BYTES = 64 * KIB  # SNAPSTONE_CHUNK_BYTES of whoever runs these
IN_FLIGHT_MAX = 3
HANG_SECONDS = 120

CODECS = (None, None, "zstd", "xor-zstd")
BUDGETS = (8 * CHUNK_BYTES, 12 * CHUNK_BYTES, 20 * CHUNK_BYTES, 64 * CHUNK_BYTES)
FAULTS = (
    "cuEventRecord:{n}:errno=719",
    "cuEventQuery:{n}:errno=719",
    "cuEventQuery:{n}+:errno=719",
    "cuStreamWaitEvent:{n}:errno=719",
    "cuMemcpyBatchAsync_v2:{n}:errno=719",
    "cuMemcpyDtoHAsync_v2:{n}:errno=719",
    "cuMemcpyHtoDAsync_v2:{n}:errno=719",
    "cuLaunchKernel:{n}:errno=719",
    "cuMemAllocAsync:{n}:errno=2",
    "cuMemAllocAsync:{n}+:errno=2",
    "cuMemGetInfo_v2:{n}:errno=719",
    "write:{n}:errno=ENOSPC",
    "pwrite:{n}:errno=ENOSPC",
    "openat:{n}:errno=EMFILE",
    "read:{n}:errno=EIO",
    "pread:{n}:errno=EIO",
    "fsync:{n}:errno=EIO",
)


class _Pending:
    """A save under way, and what it has to hold."""

    def __init__(self, handle: ss.SaveHandle, path: Path, expected: Tensors) -> None:
        self.handle = handle
        self.path = path
        self.expected = expected
        self.may_fail = False


class Run:
    """One run: a state on two devices and the host, beside a mirror of it on the host that is right at any time.

    Tensors of the mirror are never changed, so that a dict of them is a snapshot. AssertionError when a checkpoint does
    not hold what the state was at the call, or what need not fail fails.
    """

    def __init__(self, device: Devices, path: Path, seed: int) -> None:
        """Odd seeds have failures and cancellations. A save that failed may still be reading what is written next, of
        which the fake complains; other runs must leave it no reason to.
        """
        self.device = device
        self.path = path
        self.random = random.Random(seed)
        self.torch_random = torch.Generator().manual_seed(seed)
        self.number = 0
        self.pending: list[_Pending] = []
        self.committed: list[tuple[Path, Tensors]] = []
        self.has_faults = seed % 2 == 1
        self.faulty = False
        shapes: dict[str, tuple[torch.dtype, tuple[int, ...], torch.device]] = {
            "large": (torch.bfloat16, (20 * CHUNK_BYTES // 2 + 9,), device.cuda),
            "neighbour": (torch.uint8, (3 * CHUNK_BYTES,), device.cuda),
            "there": (torch.float32, (6 * CHUNK_BYTES // 4,), device.other),
            "matrix": (torch.int16, (40, 60), device.cuda),
            "complex": (torch.complex64, (300,), device.cuda),
            "eighth": (torch.float8_e4m3fn, (3001,), device.cuda),
            "scalar": (torch.float64, (), device.other),
            "flat": (torch.uint8, (5 * CHUNK_BYTES,), device.cuda),
            **{f"tiny{i}": (torch.int32, (i + 1,), (device.cuda, device.other)[i % 5 == 4]) for i in range(30)},
            "host": (torch.float32, (2 * CHUNK_BYTES // 4,), torch.device("cpu")),
            "count": (torch.float32, (), torch.device("cpu")),
        }
        self.mirror: Tensors = {name: self._values(dtype, shape) for name, (dtype, shape, _) in shapes.items()}
        self.tensors: Tensors = {name: self.mirror[name].clone().to(where) for name, (_, _, where) in shapes.items()}
        self.owned = ("large", "there", "host", "count", "tiny3", "matrix")
        for name in ("large", "there", "host", "count"):
            self.tensors[name] = torch.nn.Parameter(self.tensors[name])
        self.optimizer = torch.optim.SGD([self.tensors[name] for name in ("large", "there")], lr=1.0)
        other = torch.optim.SGD([self.tensors[name] for name in ("host", "count")], lr=1.0)
        other.state[self.tensors["host"]] = {"t": self.tensors["tiny3"], "m": self.tensors["matrix"]}
        self.optimizers = (self.optimizer, other)

    def _values(self, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
        count = int(torch.Size(shape).numel()) * dtype.itemsize
        data = torch.randint(0, 250, (count,), generator=self.torch_random, dtype=torch.uint8)
        return data.view(dtype).reshape(shape)

    @staticmethod
    def _state(tensors: Tensors) -> dict[str, Any]:
        """Views, ties and strides over the tensors; of the mirror what the same state holds."""
        return {
            **tensors,
            "part": tensors["flat"][100 : 2 * CHUNK_BYTES],
            "rest": tensors["flat"][CHUNK_BYTES:],
            "tied": tensors["large"].detach(),
            "columns": tensors["matrix"].t(),
            "conj": tensors["complex"].conj(),
            "empty": tensors["matrix"][:0],
        }

    # Steps ------------------------------------------------------------------------------------------------------------

    def change(self, names: tuple[str, ...]) -> None:
        """Another value for some of these tensors, by work of the current streams, or of the host at once."""
        where = self.random.choice((self.device.cuda, self.device.other))
        if self.random.random() < 0.7:
            self.device.delay(self.random.choice((0.0, 0.001, 0.004)), torch.cuda.current_stream(where))
        for name in names:
            if self.random.random() < 0.5:
                continue
            old, tensor = self.mirror[name], self.tensors[name].detach()
            if self.random.random() < 0.5 and old.dim() == 1:  # a few of its elements
                begin = self.random.randrange(len(old))
                end = min(len(old), begin + self.random.randrange(1, 400))
                new = old.clone()
                new[begin:end] = self._values(old.dtype, (end - begin,))
                tensor[begin:end].copy_(new[begin:end])
            else:
                new = self._values(old.dtype, tuple(old.shape))
                tensor.copy_(new)
            self.mirror[name] = new

    def save(self) -> None:
        self.number += 1
        path = self.path / f"c{self.number}"
        options: dict[str, Any] = {
            "checkpoint_id": path,
            "codec": self.random.choice(CODECS),
            "host_memory_budget": self.random.choice(BUDGETS),
            "on_unchanged": "ignore",
            "base": self.random.choice((None, "auto")),
        }
        os.environ["SNAPSTONE_HBM_FRACTION"] = self.random.choice(("0", "0.001", "0.5"))
        os.environ["SNAPSTONE_DIGEST"] = self.random.choice(("host", "auto", "auto"))
        how = self.random.choice(("sync", "now", "now", "optimizer", "optimizer"))
        state = self._state(self.tensors)
        expected = dict(self._state(self.mirror))
        try:
            if how == "sync":
                ss.save(state, **options)
                self.committed.append((path, expected))
                self.change(tuple(self.mirror))
                return
            fence: Any = "now" if how == "now" else list(self.optimizers)
            handle = ss.async_save(state, fence=fence, **options)
        except (ss.CheckpointError, OSError):
            if not self.faulty and not any(pending.may_fail for pending in self.pending):  # whose errors come here, too
                raise
            self.heal()
            return
        pending = _Pending(handle, path, expected)
        pending.may_fail = self.faulty
        self.pending.append(pending)
        if how == "now":
            state.clear()
            self.change(tuple(self.mirror))
        else:
            self.change(tuple(name for name in self.mirror if name not in self.owned))
            for optimizer in self.optimizers:
                optimizer.step()
            self.change(self.owned)

    def load(self) -> None:
        if not self.committed:
            return
        path, expected = self.random.choice(self.committed)
        if self.random.random() < 0.5:
            targets = {name: torch.empty_like(tensor) for name, tensor in self._state(self.tensors).items()}
            self._load(targets, path)
            if not self.faulty:
                self._compare(targets, expected, path)
            return
        names = [name for name in self.mirror if name not in ("complex", "flat")]
        self._load({name: self.tensors[name].detach() for name in names}, path)
        for name in names:
            self.mirror[name] = expected[name]

    def _load(self, targets: Tensors, path: Path) -> None:
        try:
            ss.load(targets, checkpoint_id=path, strict=False)
            return
        except (ss.CheckpointError, OSError):
            if not self.faulty:
                raise
        self.heal()
        ss.load(targets, checkpoint_id=path, strict=False)

    def arm(self) -> None:
        _native.fault_arm(self.random.choice(FAULTS).format(n=self.random.randrange(1, 30)))
        self.faulty = True
        for pending in self.pending:
            pending.may_fail = True

    def heal(self) -> None:
        """Until then, what failed may still read what nobody will see, while the next step writes it."""
        _native.fault_disarm()
        self.faulty = False
        self.collect()
        torch.cuda.synchronize()

    def cancel(self) -> None:
        if self.pending:
            pending = self.random.choice(self.pending)
            pending.handle.cancel()
            pending.may_fail = True

    def collect(self) -> None:
        """Waits for every save under way, and looks at what is committed."""
        for pending in self.pending:
            error = pending.handle.upload_completion.exception()
            if error is not None:
                assert pending.may_fail, repr(error)
                assert not pending.path.exists(), repr(error)
                continue
            self.committed.append((pending.path, pending.expected))
        self.pending.clear()
        for path, expected in self.committed[-4:]:
            self._compare(ss.Checkpoint.open(path).load_tensors(), expected, path)
        for path, _ in self.committed[:-6]:
            shutil.rmtree(path)
        del self.committed[:-6]

    def _compare(self, found: Tensors, expected: Tensors, path: Path) -> None:
        assert found.keys() == expected.keys(), path
        for name, tensor in expected.items():
            there = self.device.on_host(found[name].detach())
            assert torch.equal(bits(there.resolve_conj().resolve_neg()), bits(tensor.resolve_conj().resolve_neg())), (
                f"{path.name}: {name}"
            )

    def go(self, steps: int) -> None:
        stream = torch.cuda.Stream(self.device.cuda) if self.random.random() < 0.5 else None
        torch.cuda.synchronize()  # the state was made in other streams
        with torch.cuda.stream(stream):
            for _ in range(steps):
                step = self.random.choices(
                    (self.save, self.load, self.collect, self.cancel, self.arm),
                    (10, 3, 2, int(self.has_faults), 2 * int(self.has_faults)),
                    k=1,
                )[0]
                if step == self.arm and self.faulty:
                    step = self.heal
                step()
                if len(self.pending) >= IN_FLIGHT_MAX:
                    self.collect()
            self.heal()


def main(seconds: float, seed: int) -> None:
    fake = FakeDriver()
    fake_torch.install()
    end = time.monotonic() + seconds
    with pytest.MonkeyPatch.context() as monkeypatch:
        fake_torch.patch(monkeypatch)
        while time.monotonic() < end:
            fake.mode(("chaos", "chaos", "lazy", "eager")[seed // 2 % 4])
            fake.seed(seed)
            faulthandler.dump_traceback_later(HANG_SECONDS, exit=True)
            with tempfile.TemporaryDirectory() as directory:
                run = Run(FakeDevices(fake), Path(directory), seed)
                run.go(60)
            gc.collect()
            fake.drain()
            assert run.has_faults or fake.violations() == [], (seed, fake.violations()[:3])
            del run
            fake.reset()
            print(f"seed {seed}", flush=True)
            seed += 1


if __name__ == "__main__":
    main(float(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0)
