"""Chunk records and compressed frames by a writer who means harm and computes every digest right.

Invariants:
  1. A record outside the limits of docs/format.md is refused before anything is allocated or read for it.
  2. A frame is decoded into exactly the raw size that its record says, or refused: bombs, second frames, dictionaries,
     skippable frames, large windows, cut and empty frames.
  3. Bytes whose digest is not the record's never reach a tensor.
  4. Every refusal is a CorruptCheckpointError that names the file and the chunk, within 100 ms of CPU and 64 MiB.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xxhash
import zstandard

import snapstone as ss
from distributed import ranks
from durability import hostile, small
from durability.forge import Forge, write_manifest
from durability.hostile import assert_refused, try_everything
from snapstone import _native
from snapstone.index import CHUNK_DTYPE

SEED = 60601
RAW_BYTES = 64 << 10
U32, U64 = (1 << 32) - 1, (1 << 64) - 1


@pytest.fixture(autouse=True)
def seeded(monkeypatch: pytest.MonkeyPatch) -> None:
    print(f"seed {SEED}")
    hostile.skip_without_memory_counter()
    monkeypatch.setenv("SNAPSTONE_CHUNK_BYTES", str(RAW_BYTES))


@pytest.fixture(params=[None, "zstd"], ids=["raw", "zstd"])
def source(request: pytest.FixtureRequest, directory: Path) -> Path:
    path = directory / "source"
    ss.save(small.state(1), checkpoint_id=path, codec=request.param)
    try_everything(path)
    return path


@pytest.fixture
def path(directory: Path) -> Path:
    return directory / "hostile"


RECORDS: dict[str, list[int]] = {
    "offset": [1, 512, 4095, 4097, 1 << 20, 1 << 40, 1 << 63, U64 - 4095, U64],
    "stored_bytes": [0, RAW_BYTES + 1, 1 << 26, U32],
    "raw_bytes": [0, 1, RAW_BYTES + 1, 64 << 20, U32],
    "file": [1, 2, U32],
    "codec": [5, 6, 255, 65535],
    "reserved": [1, 256, 65535],
}


@pytest.mark.parametrize("field", list(RECORDS))
def test_records_outside_the_limits_are_refused(source: Path, path: Path, field: str) -> None:
    for number in range(len(Forge(source).table)):
        for value in RECORDS[field]:
            forge = Forge(source)
            forge.table[field][number] = value
            forge.write(path)
            assert_refused(path, ss.CorruptCheckpointError)


def test_records_that_point_at_other_bytes_are_refused(source: Path, path: Path) -> None:
    chosen = random.Random(SEED)
    forge = Forge(source)
    count = len(forge.table)
    for number in range(count):
        other = (number + 1) % count
        for change in ("place", "codec", "digest"):
            forge = Forge(source)
            if change == "place":
                for field in ("offset", "stored_bytes"):
                    forge.table[field][number] = forge.table[field][other]
                forge.table["stored_bytes"][number] = min(
                    forge.table["stored_bytes"][number], forge.table["raw_bytes"][number]
                )
            elif change == "codec":
                forge.table["codec"][number] = (int(forge.table["codec"][number]) + 1) % 5
            else:
                forge.table["digest"][number] = np.void(chosen.randbytes(16))
            forge.write(path)
            outcomes = try_everything(path)
            assert isinstance(outcomes["load"], ss.CorruptCheckpointError), change
            assert isinstance(outcomes["open"], ss.CorruptCheckpointError), change


# Frames -----------------------------------------------------------------------------------------------------------


def frame(data: bytes, **parameters: Any) -> bytes:
    parameters.setdefault("write_content_size", False)
    settings = zstandard.ZstdCompressionParameters.from_level(3, source_size=len(data), **parameters)
    return zstandard.ZstdCompressor(compression_params=settings).compress(data)


def with_dictionary(data: bytes) -> bytes:
    dictionary = zstandard.train_dictionary(1024, [os.urandom(64) + b"common" * 20 for _ in range(200)])
    return zstandard.ZstdCompressor(dict_data=dictionary, write_content_size=False).compress(data)


def frames() -> dict[str, Callable[[bytes], bytes]]:
    """Frames in the place of one of `data`; the record's digest and raw size stay those of `data`."""
    skippable = b"\x50\x2a\x4d\x18\x08\0\0\0" + bytes(8)
    bomb = frame(bytes(256 << 20))
    assert len(bomb) < RAW_BYTES
    return {
        "bomb": lambda data: bomb,
        "bomb that says its size": lambda data: frame(bytes(64 << 20), write_content_size=True),
        "bomb behind the data": lambda data: frame(data) + bomb,
        "bomb with a huge window": lambda data: frame(bytes(1 << 20), window_log=27),
        "one byte more": lambda data: frame(data + b"\0"),
        "one byte less": lambda data: frame(data[:-1]),
        "empty frame": lambda data: frame(b""),
        "nothing but magic": lambda data: b"\x28\xb5\x2f\xfd",
        "zeros": lambda data: bytes(len(data) // 2),
        "cut": lambda data: frame(data)[:-1],
        "cut in the header": lambda data: frame(data)[:5],
        "two frames of it": lambda data: frame(data) * 2,
        "data in two frames": lambda data: frame(data[:100]) + frame(data[100:]),
        "byte behind": lambda data: frame(data) + b"\0",
        "skippable in front": lambda data: skippable + frame(data),
        "skippable behind": lambda data: frame(data) + skippable,
        "skippable alone": lambda data: skippable,
        "window of 2 GiB": lambda data: frame(data)[:5] + b"\xa8" + frame(data)[6:],
        "window of 3.75 TiB": lambda data: frame(data)[:5] + b"\xff" + frame(data)[6:],
        "reserved bit": lambda data: frame(data)[:4] + bytes([frame(data)[4] | 8]) + frame(data)[5:],
        "dictionary": with_dictionary,
        "other data": lambda data: frame(data[::-1]),
        "legacy magic": lambda data: b"\x27\xb5\x2f\xfd" + frame(data)[4:],
        "wrong checksum": lambda data: frame(data, write_checksum=True)[:-1] + b"\0",
    }


@pytest.fixture(scope="module")
def all_frames() -> dict[str, Callable[[bytes], bytes]]:
    return frames()


NAMES = ["bomb", "bomb that says its size", "bomb behind the data", "bomb with a huge window", "one byte more"]
NAMES += ["one byte less", "empty frame", "nothing but magic", "zeros", "cut", "cut in the header", "two frames of it"]
NAMES += ["data in two frames", "byte behind", "skippable in front", "skippable behind", "skippable alone"]
NAMES += ["window of 2 GiB", "window of 3.75 TiB", "reserved bit", "dictionary", "other data", "legacy magic"]
NAMES += ["wrong checksum"]


@pytest.mark.parametrize("codec", [1, 2, 3, 4])
@pytest.mark.parametrize("name", NAMES)
def test_frames_that_no_writer_writes(
    directory: Path, all_frames: dict[str, Callable[[bytes], bytes]], name: str, codec: int
) -> None:
    assert sorted(NAMES) == sorted(all_frames)
    path, source = directory / "hostile", directory / "source"
    data = torch.arange(RAW_BYTES // 4, dtype=torch.int32) // 16
    ss.save({"large": data}, checkpoint_id=source)
    forge = Forge(source)
    stored = all_frames[name](planes(data.numpy().tobytes(), codec))
    put_frame(forge, stored, codec)
    forge.write(path)
    outcomes = {read: hostile.limited(hostile.READS[read], path) for read in ("open", "verify", "diagnosis")}
    error = outcomes["open"]
    assert isinstance(error, ss.CorruptCheckpointError), name
    assert (error.path, error.chunk, error.tensor) == (str(path / "rank-00000.data"), 0, "large")
    assert outcomes["verify"] is not None
    put_frame(forge, frame(planes(data.numpy().tobytes(), codec)), codec)
    forge.write(path)
    assert torch.equal(ss.Checkpoint.open(path).get_tensor("large"), data), "the same with a right frame is read"


def planes(data: bytes, codec: int) -> bytes:
    item_bytes = {1: 1, 2: 2, 3: 4, 4: 8}[codec]
    return np.frombuffer(data, np.uint8).reshape(-1, item_bytes).T.tobytes()


def put_frame(forge: Forge, stored: bytes, codec: int) -> None:
    assert 0 < len(stored) <= RAW_BYTES
    forge.data = stored + bytes(-len(stored) % 4096)
    forge.table["codec"], forge.table["stored_bytes"], forge.table["offset"] = codec, len(stored), 0


def test_a_raw_size_that_lies_about_a_bomb_is_bounded_by_the_record(directory: Path) -> None:
    """A chunk may be 64 MiB of zeros in a few KiB; more than the tensor says is never decoded."""
    ss.save({"large": torch.zeros(RAW_BYTES // 4)}, checkpoint_id=directory / "source")
    for raw_bytes in (RAW_BYTES - 4096, RAW_BYTES + 4096, 32 << 20):
        forge = Forge(directory / "source")
        put_frame(forge, frame(bytes(RAW_BYTES)), 1)
        forge.header["chunk_bytes"] = 64 << 20
        forge.table["raw_bytes"] = raw_bytes
        forge.write(directory / "hostile")
        assert isinstance(hostile.limited(hostile.READS["open"], directory / "hostile"), ss.CorruptCheckpointError)


def load_hostile_giants(rank: int, path: str) -> int:
    hostile.reset_peak()
    before = hostile.peak_bytes()
    with pytest.raises(ss.CorruptCheckpointError):
        ss.Checkpoint.open(path).load_tensors()
    assert not ss.verify(path)
    return hostile.peak_bytes() - before


def test_many_giant_chunks_do_not_take_memory_for_each(directory: Path, tmp_path: Path) -> None:
    """100 chunks of 64 MiB in a sparse file: the ring of staging memory stays at a few of them."""
    giant, count = 64 << 20, 100
    ss.save({"large": torch.zeros(1)}, checkpoint_id=directory / "source")
    forge = Forge(directory / "source")
    forge.table = np.zeros(count, CHUNK_DTYPE)
    forge.table["offset"] = np.arange(count, dtype=np.uint64) * giant
    forge.table["stored_bytes"] = forge.table["raw_bytes"] = giant
    forge.table["digest"] = np.void(xxhash.xxh3_128_digest(b"not this"))
    forge.header.update(chunk_bytes=giant, chunk_count=count)
    forge.header["tensors"] = [{"name": "large", "dtype": "uint8", "shape": [count * giant], "chunks": [0, count]}]
    forge.data = b""
    path = tmp_path / "giants"
    forge.write(path)
    os.truncate(path / "rank-00000.data", count * giant)
    forge.writer["data"][0]["nbytes"] = count * giant
    write_manifest(path, json.dumps(forge.manifest).encode())
    grown = ranks.values(ranks.run_ranks(1, load_hostile_giants, str(path), store="none", timeout=110))[0]
    assert grown < 12 * giant


def test_slots_come_back_after_refusals(source: Path, path: Path) -> None:
    slots = _native.ring_facts()["slots"]
    for _ in range(20):
        forge = Forge(source)
        forge.table["digest"][0] = np.void(bytes(16))
        forge.write(path)
        assert isinstance(try_everything(path)["load"], ss.CorruptCheckpointError)
    small.assert_slots_free()
    assert _native.ring_facts()["slots"] == slots
    small.assert_holds(source, 1)
