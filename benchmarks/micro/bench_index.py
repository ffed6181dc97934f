"""The index file of 10,000 tensors: the part a plan keeps, the file, and reading it back with every number checked."""

from __future__ import annotations

from typing import Any

import numpy as np

from snapstone import index, tensors
from snapstone.index import CHUNK_DTYPE, StoredTensor

CHUNKS = 160  # of 64 small tensors each


def _encode(tensors_json: str) -> bytes:
    table = np.zeros(CHUNKS, CHUNK_DTYPE)
    table["raw_bytes"] = 1 << 20
    return index.encode(
        save_id="0" * 32,
        rank=0,
        world_size=1,
        files=["rank-00000.data"],
        chunk_bytes=1 << 20,
        tensors_json=tensors_json,
        objects={},
        table=table.tobytes(),
    )


def bench_encode_tensors(benchmark: Any, stored: list[StoredTensor]) -> None:
    assert benchmark(index.encode_tensors, stored).startswith("[{")


def bench_encode_index(benchmark: Any, stored: list[StoredTensor]) -> None:
    assert len(benchmark(_encode, index.encode_tensors(stored))) > CHUNKS * CHUNK_DTYPE.itemsize


def bench_parse_index(benchmark: Any, stored: list[StoredTensor]) -> None:
    sizes = {name: tensors.dtype_bytes(name) for name in tensors.dtype_names()}
    data = _encode(index.encode_tensors(stored))
    assert len(benchmark(index.parse, data, path="rank-00000.index", dtype_bytes=sizes).tensors) == len(stored)
