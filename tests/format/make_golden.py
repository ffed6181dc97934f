"""Writes the golden checkpoints of the current format version, and what must be read from them.

    python tests/format/make_golden.py            tests/format/golden/VERSION: the kinds that are not there yet

Once made, the files of a kind never change, because every later 1.y has to read them. `expected.json` holds dtype,
shape and XXH3-128 of every tensor and the typed JSON of every value, taken from the states below and never from a
checkpoint.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import xxhash

GOLDEN = Path(__file__).parent / "golden"
CHUNK_BYTES = 64 << 10  # the smallest that there is: several chunks in few bytes
METADATA = {"metrics": {"loss": 0.25, "nan": float("nan")}, "note": ("golden", 1)}
STEP = 1000
# The bytes of a zstd frame depend on the version of the library, those of a raw chunk on nothing.
CODECS: dict[str, str | None] = {"plain": None, "zstd": "zstd", "sharded": "zstd:19", "recent": None, "derived": None}
CODECS |= {"marker": None}
OPTIONS: dict[str, dict[str, Any]] = {"derived": {"derive": True}, "marker": {"dcp_marker": True}}
# The last of three saves on each other.
CHAINS: dict[str, str | None] = {"delta": "zstd", "xor": "xor-zstd", "xor-items": "xor-zstd"}
CHAIN_STEPS = 3
DTYPES = ["bool", "uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64", "float16", "bfloat16"]
DTYPES += ["float32", "float64", "complex32", "complex64", "complex128"]
DTYPES += ["float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz"]
RECENT_DTYPES = ["float8_e8m0fnu", "float4_e2m1fn_x2"]  # torch 2.6 lacks them


def pattern(dtype: str, *shape: int, seed: int = 0) -> torch.Tensor:
    """Bytes that no compressor makes smaller, the same on every machine."""
    kind: torch.dtype = getattr(torch, dtype)
    count = int(np.prod(shape, dtype=np.int64)) * kind.itemsize
    state = np.arange(count, dtype=np.uint64) + np.uint64(seed * 1_000_003 + 1)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):  # the finaliser of splitmix64
        state = (state ^ (state >> np.uint64(shift))) * np.uint64(factor)
    data = (state >> np.uint64(56)).astype(np.uint8)
    raw = torch.from_numpy(data & 1 if dtype == "bool" else data)
    return raw.view(kind).reshape(shape) if count else torch.empty(shape, dtype=kind)


def plain_state() -> dict[str, Any]:
    """Every dtype packed; large, empty, 0-d, tied and strided tensors; every kind of Python value."""
    tied = pattern("float32", 4, 3, seed=50)
    return {
        "dtypes": {name: pattern(name, 3, 5, seed=seed) for seed, name in enumerate(DTYPES)},
        "large": pattern("float32", 130, 128, seed=40),
        "empty": torch.empty(0, 5),
        "scalar": torch.tensor(-1.5, dtype=torch.float64),
        "strided": pattern("int16", 6, 4, seed=41).T,
        "tied": {"a": tied, "b": tied},
        "optimizer": {"state": {0: {"step": torch.tensor(7.0)}, (1, "x"): {"step": torch.tensor(8.0)}}},
        "name with spaces, dots.and ü": torch.tensor([1, 2], dtype=torch.int8),
        "values": {
            "plain": [None, True, -3, 0.1, "text", {"nested": []}],
            "numbers": (1 << 70, float("inf"), -0.0, 1 + 2j, 10**2000, float("nan")),
            "containers": ({1, 2}, frozenset({"a"}), {3: "x", "$y": 1}, slice(1, None), range(3), ...),
            "text": ("ünï", b"\x00\xff", bytearray(b"ab"), "\ud800"),
            "torch": (torch.bfloat16, torch.Size([2, 3]), torch.device("cpu")),
            "numpy": (np.float32(0.1), np.datetime64("2020-01-01"), np.arange(3, dtype=np.int16)),
        },
    }


def zstd_state() -> dict[str, Any]:
    """Byte planes of 2, 4 and 8 bytes, plain frames, a packed frame, and chunks that stay raw."""
    return {
        "planes2": torch.arange(33_000).to(torch.bfloat16),
        "planes4": torch.arange(17_000) * 0.5,
        "planes8": torch.arange(9_000, dtype=torch.float64),
        "integers": torch.arange(17_000, dtype=torch.int32),
        "incompressible": pattern("float32", 128, 128, seed=42),
        "small": {str(i): torch.full((64,), float(i)) for i in range(4)},
        "seven": torch.zeros(7, dtype=torch.uint8),
    }


def recent_state() -> dict[str, Any]:
    return {name: pattern(name, 3, 5, seed=seed) for seed, name in enumerate(RECENT_DTYPES)}


def derived_state() -> dict[str, Any]:
    """Parameters that are their masters rounded, in both dtypes; one that only nearly is."""
    state: dict[str, Any] = {"parameters": {}, "masters": {}}
    for seed, dtype in enumerate((torch.bfloat16, torch.float16), 60):
        master = pattern("int32", 40, 60, seed=seed).to(torch.float32) / 2**28
        state["masters"][str(dtype)[6:]] = master
        state["parameters"][str(dtype)[6:]] = master.to(dtype)
    state["parameters"]["other"] = state["parameters"]["float16"] + 1
    return state


def marker_state() -> dict[str, Any]:
    """With the file that trainers of torch.distributed.checkpoint look for."""
    return {"t": torch.arange(10), "step": 7}


def chain_state(kind: str, step: int) -> dict[str, Any]:
    """A chunk each. "delta": the second save links the first's file; the third links the second's and carries the one
    chunk of the first's that it needs. "xor": each save stores what changed as a difference from the save before.
    "xor-items": the same of items of 1, 2 and 8 bytes.
    """
    if kind == "xor-items":
        return dict(xor_items(step)) | {"step": step}
    changed = {"a": 3, "b": 3, "c": 1, "d": 2} if kind == "delta" else {"a": 2, "b": 3, "c": 1}
    seeds = {name: step if kind == "xor" and name == "a" else min(step, last) for name, last in changed.items()}
    size = CHUNK_BYTES // 4
    tensors = {
        name: torch.arange(size) * 0.5 + ord(name) * 1000.0 + (seed * 4096.0 if kind == "delta" else 0.0)
        for name, seed in seeds.items()
    }
    if kind == "xor":
        for name, seed in seeds.items():
            tensors[name][::97] += seed
    return {**tensors, "small": torch.tensor([1.0, 2.0]), "step": step}


def xor_items(step: int) -> Iterator[tuple[str, torch.Tensor]]:
    for dtype in (torch.float8_e4m3fn, torch.bfloat16, torch.float64):
        tensor = torch.arange(CHUNK_BYTES // dtype.itemsize) // 512 % 100
        tensor[::4097] += step
        yield str(dtype)[6:], tensor.to(torch.uint8).view(dtype) if dtype.itemsize == 1 else tensor.to(dtype)


def sharded_state(rank: int) -> dict[str, Any]:
    """What one of two ranks holds: shards along both dimensions, an uneven one, replicas, values of its own."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2,))
    whole = sharded_tensors()
    return {
        "rows": distribute_tensor(whole["rows"], mesh, [Shard(0)]),
        "columns": distribute_tensor(whole["columns"], mesh, [Shard(1)]),
        "replica": distribute_tensor(whole["replica"], mesh, [Replicate()]),
        "alone": distribute_tensor(whole["alone"], mesh, [Shard(0)]),
        "everywhere": whole["everywhere"],
        "epoch": 3,
        "rng": {"rank": rank},
    }


def sharded_tensors() -> dict[str, torch.Tensor]:
    return {
        "rows": torch.arange(301.0 * 128).reshape(301, 128),
        "columns": pattern("int32", 4, 5, seed=43),
        "replica": pattern("float64", 11, seed=44),
        "alone": pattern("uint8", 1, 9, seed=45),  # one row: the second rank's shard is empty
        "everywhere": torch.arange(6, dtype=torch.int64),
    }


STATES: dict[str, Callable[[], dict[str, Any]]] = {
    "plain": plain_state,
    "zstd": zstd_state,
    "recent": recent_state,
    "derived": derived_state,
    "marker": marker_state,
    **{kind: partial(chain_state, kind, CHAIN_STEPS) for kind in CHAINS},
}


def save(kind: str, path: Path) -> None:
    """Saves one of STATES, or "sharded" with two processes, or one of CHAINS with what it is based on beside it."""
    from distributed import ranks

    if kind == "sharded":
        ranks.values(ranks.run_ranks(2, save_sharded, str(path)))
    elif kind in CHAINS:
        with tempfile.TemporaryDirectory(dir=path.parent) as run:
            for step in range(1, CHAIN_STEPS + 1):
                base = {"base": Path(run, str(step - 1)), "full_every": None} if step > 1 else {}
                write(chain_state(kind, step), Path(run, str(step)), CHAINS[kind], **base)
            shutil.copytree(Path(run, str(CHAIN_STEPS)), path)
    else:
        write(STATES[kind](), path, CODECS[kind], **OPTIONS.get(kind, {}))


def save_sharded(rank: int, path: str) -> None:
    write(sharded_state(rank), Path(path), CODECS["sharded"])


def write(state: dict[str, Any], path: Path, codec: str | None, **options: Any) -> None:
    import snapstone as ss

    with mock.patch.dict(os.environ, SNAPSTONE_CHUNK_BYTES=str(CHUNK_BYTES)):
        ss.save(state, checkpoint_id=path, step=STEP, metadata=METADATA, codec=codec, **options)


def bits_of(tensor: torch.Tensor) -> bytes:
    flat = tensor.detach().clone(memory_format=torch.contiguous_format).reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def expected(flattened: Any) -> dict[str, Any]:
    """`flattened` is what snapstone.state.flatten gives; only names and values are taken from it."""
    from snapstone.values import encode

    tensors = {
        name: [str(tensor.dtype).removeprefix("torch."), list(tensor.shape), xxhash.xxh3_128_hexdigest(bits_of(tensor))]
        for name, tensor in flattened.tensors.items()
    }
    return {"tensors": tensors, "objects": {name: encode(value) for name, value in flattened.objects.items()}}


def all_expected() -> dict[str, Any]:
    from snapstone.state import flatten

    found = {kind: expected(flatten(make())) for kind, make in STATES.items()}
    tensors = expected(flatten(sharded_tensors()))["tensors"]
    found["sharded"] = {"tensors": tensors, "objects": {"epoch": 3, "rng.rank": 0}}
    return found


def main() -> None:
    from snapstone.config import FORMAT_MAJOR, FORMAT_MINOR

    target = GOLDEN / f"{FORMAT_MAJOR}.{FORMAT_MINOR}"
    target.mkdir(parents=True, exist_ok=True)
    for kind in (*CODECS, *CHAINS):
        if not (target / kind).exists():
            save(kind, target / kind)
    (target / "expected.json").write_text(json.dumps(all_expected(), indent=1) + "\n")
    print(f"{target}: {sum(file.stat().st_size for file in target.rglob('*') if file.is_file())} bytes")


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))
    from format import make_golden  # so that the ranks find functions of a module, not of __main__

    make_golden.main()
