"""The package and the reference reader agree about every checkpoint that the package writes.

Invariants:
  1. For states that reach every rule of docs/format.md (all dtypes, sizes around every limit, empty, 0-d, tied and
     strided tensors, each codec, several chunk sizes, one and two writers) both readers return the same bytes.
  2. Every stored byte is covered: the reference reader, which checks all that the format promises, accepts them, and
     refuses the same checkpoint with any one byte changed, as `ss.verify` does.
"""

from __future__ import annotations

import json
import random
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash

import snapstone as ss
from distributed import ranks
from format import make_golden, reference_reader
from format.make_golden import bits_of, pattern
from snapstone.values import STORED_DTYPES, decode

pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf:UserWarning")
SEED = 20260
KIB = 1024


@pytest.fixture(autouse=True)
def seeded() -> None:
    print(f"seed {SEED}")
    torch.manual_seed(SEED)


def rich_state() -> dict[str, Any]:
    """Sizes around each limit of the layout, smooth and random contents, every dtype both packed and large."""
    sizes = [1, 63, 64, 65, 4095, 4096, 4097, 64 * KIB - 1, 64 * KIB, 64 * KIB + 1, 128 * KIB, 200_001]
    tied = torch.randn(70, 300)
    state: dict[str, Any] = {
        "sizes": {str(size): pattern("uint8", size, seed=size) for size in sizes},
        "zeros": {str(size): torch.zeros(size, dtype=torch.uint8) for size in sizes},
        "small": {name: pattern(name, 5, seed=1) for name in STORED_DTYPES},
        "large": {name: pattern(name, 68 * KIB // dtype.itemsize) for name, dtype in STORED_DTYPES.items()},
        "empty": {"a": torch.empty(0), "b": torch.empty(3, 0, 2, dtype=torch.bfloat16)},
        "scalar": torch.tensor(3, dtype=torch.int16),
        "tied": [tied, tied],
        "strided": [torch.randn(300, 100).T, torch.arange(64)[::3], torch.randn(2, 3, 5).permute(2, 0, 1)],
        "smooth": {str(item): torch.arange(40_000).to(item) for item in (torch.half, torch.float, torch.double)},
        "values": make_golden.plain_state()["values"],
    }
    return state


def assert_readers_agree(path: Path) -> reference_reader.Contents:
    contents = reference_reader.read(path)
    assert ss.verify(path)
    with ss.Checkpoint.open(path) as checkpoint:
        loaded = checkpoint.load_tensors()
        assert list(loaded) == list(contents.tensors)
        for name, tensor in loaded.items():
            other = contents.tensors[name]
            assert (str(tensor.dtype), tuple(tensor.shape)) == (f"torch.{other.dtype}", other.shape), name
            assert bits_of(tensor) == other.data, name
        for rank in range(checkpoint.world_size):
            stored = {name: one["value"] for name, one in {**contents.objects[0], **contents.objects[rank]}.items()}
            found = checkpoint.objects(rank)
            assert sorted(found) == sorted({name for objects in contents.objects for name in objects})
            assert {name: repr(found[name]) for name in stored} == {n: repr(decode(one)) for n, one in stored.items()}
        assert checkpoint.nbytes == contents.manifest["nbytes"]
    return contents


@pytest.mark.parametrize("chunk_bytes", [64 * KIB, 1024 * KIB])
@pytest.mark.parametrize("codec", [None, "zstd", "zstd:-1"])
def test_readers_agree_on_a_rich_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, codec: str | None, chunk_bytes: int
) -> None:
    monkeypatch.setenv("SNAPSTONE_CHUNK_BYTES", str(chunk_bytes))
    state = rich_state()
    ss.save(state, checkpoint_id=tmp_path / "c", codec=codec)
    contents = assert_readers_agree(tmp_path / "c")
    assert contents.tensors["large.float64"].data == bits_of(state["large"]["float64"])
    assert contents.tensors["strided.0"].data == bits_of(state["strided"][0].contiguous())
    assert reference_reader.decode(contents.objects[0]["values.numbers"]["value"])[:3] == (1 << 70, float("inf"), -0.0)
    codecs = {int(code) for code in table_of(tmp_path / "c")["codec"]}
    assert codecs == ({0} if codec is None else {0, 1, 2, 3, 4})


def table_of(path: Path) -> Any:
    manifest = reference_reader.read_manifest(path)
    return reference_reader.read_index(path, manifest, manifest["writers"][0])[1]


def test_tied_tensors_are_stored_once(tmp_path: Path) -> None:
    tied = torch.randn(70, 300)
    ss.save({"a": tied, "b": tied, "c": tied.clone()}, checkpoint_id=tmp_path / "c")
    contents = assert_readers_agree(tmp_path / "c")
    assert contents.chunks == 2
    assert contents.manifest["nbytes"] == 3 * tied.nbytes


def save_on_two_ranks(rank: int, path: str, codec: str | None) -> None:
    ss.save({**make_golden.sharded_state(rank), "other": {"x": rank, "y": "same"}}, checkpoint_id=path, codec=codec)


@pytest.mark.parametrize("codec", [None, "zstd"])
def test_readers_agree_on_files_of_two_ranks(tmp_path: Path, codec: str | None) -> None:
    path = tmp_path / "c"
    ranks.values(ranks.run_ranks(2, save_on_two_ranks, str(path), codec))
    contents = assert_readers_agree(path)
    assert [writer["rank"] for writer in contents.manifest["writers"]] == [0, 1]
    for name, tensor in make_golden.sharded_tensors().items():
        assert contents.tensors[name].data == bits_of(tensor), name
    assert contents.objects[1].keys() == {"rng.rank", "other.x"}  # what is as on rank 0 is not stored again


def test_the_checkpoint_of_an_empty_state_is_whole(tmp_path: Path) -> None:
    ss.save({}, checkpoint_id=tmp_path / "c")
    contents = assert_readers_agree(tmp_path / "c")
    assert (contents.tensors, contents.objects, contents.chunks) == ({}, [{}], 0)
    ss.save({"only": {"empty": torch.empty(0), "value": 1}}, checkpoint_id=tmp_path / "d")
    assert assert_readers_agree(tmp_path / "d").chunks == 0


@pytest.mark.parametrize("kind", ["plain", "sharded"])
def test_the_reference_reader_refuses_any_changed_byte(tmp_path: Path, kind: str) -> None:
    path = tmp_path / kind
    shutil.copytree(make_golden.GOLDEN / "1.0" / kind, path)
    reference_reader.read(path)
    chosen = random.Random(SEED)
    for file in sorted(path.iterdir()):
        data = file.read_bytes()
        for at in sorted({0, len(data) - 1, *(chosen.randrange(len(data)) for _ in range(12))}):
            file.write_bytes(data[:at] + bytes([data[at] ^ 1 << chosen.randrange(8)]) + data[at + 1 :])
            assert not ss.verify(path), (file.name, at)
            with pytest.raises((reference_reader.FormatError, ValueError, KeyError)):
                reference_reader.read(path)
        file.write_bytes(data)
    reference_reader.read(path)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda index: index["tensors"][0].update(shape=[4, 5], sizes=[3, 5], offsets=[0, 0]), "not tiled"),
        (lambda index: index["tensors"][0].update(at=8), "packed wrongly"),
        (lambda index: index["tensors"].pop(0), "gaps are not zero"),
        (lambda index: index.update(rank=1), "another rank"),
        (lambda index: index.update(save_id="0" * 32), "another save"),
    ],
)
def test_the_reference_reader_refuses_what_no_writer_writes(tmp_path: Path, change: Any, why: str) -> None:
    path = tmp_path / "plain"
    shutil.copytree(make_golden.GOLDEN / "1.0" / "plain", path)
    data = (path / "rank-00000.index").read_bytes()
    header_bytes = int.from_bytes(data[8:16], "little")
    header = json.loads(data[16 : 16 + header_bytes])
    table = data[-(-(16 + header_bytes) // 64) * 64 :]
    change(header)
    text = json.dumps(header).encode()
    index = b"SNAPSIDX" + len(text).to_bytes(8, "little") + text
    index += bytes(-len(index) % 64) + table
    (path / "rank-00000.index").write_bytes(index)
    manifest = json.loads((path / "MANIFEST.json").read_bytes())
    manifest["writers"][0]["index"].update(nbytes=len(index), xxh128=xxhash.xxh3_128_hexdigest(index))
    text = json.dumps(manifest).encode()
    (path / "MANIFEST.json").write_bytes(text)
    (path / "MANIFEST.xxh128").write_text(f"{xxhash.xxh3_128_hexdigest(text)}  MANIFEST.json\n")
    with pytest.raises(reference_reader.FormatError, match=why):
        reference_reader.read(path)


def test_the_reference_reader_is_small_and_stands_alone() -> None:
    """Every line of it counts, and it imports nothing that is not in the standard library but three packages."""
    text = Path(reference_reader.__file__).read_text()
    assert len(text.splitlines()) < 300
    imported = re.findall(r"^\s*(?:from|import) ([a-z0-9_]+)", text, re.MULTILINE)
    assert set(imported) - set(sys.stdlib_module_names) == {"numpy", "xxhash", "zstandard"}
