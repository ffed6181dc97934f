"""What any 1.x wrote, this version and the reference reader still read.

Invariants, for every golden checkpoint of every format version:
  1. The package, on every path into it, returns dtype, shape and bytes of every tensor and every value as recorded.
  2. The reference reader, which shares no code with the package, returns the same and finds every digest right.
  3. `xxh128sum -c MANIFEST.xxh128` agrees.
  4. The files are those that were released: nobody made them again.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash

import snapstone as ss
from format import reference_reader
from format.make_golden import GOLDEN, METADATA, RECENT_DTYPES, STEP, bits_of
from snapstone.values import decode, encode

pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf:UserWarning")
CHECKPOINTS = sorted(path.parent for path in GOLDEN.glob("*/*/MANIFEST.json"))
RELEASED = {  # XXH3-128 of MANIFEST.json, which roots the digests of everything else
    "1.0/delta": "5b549cba51c9d57c65eab776b80fa6ec",
    "1.0/derived": "599232a847062cc346f9e301f81a2c11",
    "1.0/marker": "cf56a346f4011849c1e1de0bcd1f8f7d",
    "1.0/plain": "c8401e95929715bbb0cb739ebb1acaa0",
    "1.0/recent": "f9448beca384f12a67d02b23edf25d13",
    "1.0/sharded": "d4b714d5b3665bafc77985ecf83ff156",
    "1.0/xor": "27306c1e029fea0bb934786acb83179c",
    "1.0/xor-items": "e43e186989559b2f6d0e72f2d881dbf1",
    "1.0/zstd": "4736c1752f57d11a95ee793a62c3301d",
}


def label(path: Path) -> str:
    return str(path.relative_to(GOLDEN))


@pytest.fixture(params=CHECKPOINTS, ids=label)
def golden(request: pytest.FixtureRequest) -> Path:
    path: Path = request.param
    if path.name == "recent" and not all(hasattr(torch, name) for name in RECENT_DTYPES):
        pytest.skip("this torch lacks the dtypes of that checkpoint")
    return path


def expected_of(golden: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((golden.parent / "expected.json").read_text())[golden.name]
    return found


def test_the_released_files_are_still_the_same() -> None:
    found = {label(path): xxhash.xxh3_128_hexdigest((path / "MANIFEST.json").read_bytes()) for path in CHECKPOINTS}
    assert found == RELEASED
    assert sum(file.stat().st_size for file in GOLDEN.rglob("*") if file.is_file()) < 400_000


def test_the_reference_reader_reads_it(golden: Path) -> None:
    expected = expected_of(golden)
    contents = reference_reader.read(golden)
    tensors = {
        name: [tensor.dtype, list(tensor.shape), xxhash.xxh3_128_hexdigest(tensor.data)]
        for name, tensor in contents.tensors.items()
    }
    assert tensors == expected["tensors"]
    assert {name: item["value"] for name, item in contents.objects[0].items()} == expected["objects"]
    assert contents.manifest["step"] == STEP
    metadata = {key: reference_reader.decode(value) for key, value in contents.manifest["metadata"].items()}
    assert repr(metadata) == repr(METADATA)


def test_checkpoint_reads_it(golden: Path) -> None:
    expected = expected_of(golden)
    with ss.Checkpoint.open(golden) as checkpoint:
        assert (checkpoint.step, checkpoint.metrics["loss"]) == (STEP, METADATA["metrics"]["loss"])
        assert f"{checkpoint.format_version[0]}.{checkpoint.format_version[1]}" == golden.parent.name
        loaded = checkpoint.load_tensors()
        objects = checkpoint.objects()
    assert described(loaded) == expected["tensors"]
    assert {name: encode(value) for name, value in objects.items()} == expected["objects"]


def test_load_fills_a_state_with_it(golden: Path) -> None:
    expected = expected_of(golden)
    with ss.Checkpoint.open(golden) as checkpoint:
        state = checkpoint.state_dict()
        assert sorted(expected["tensors"]) == sorted(checkpoint.keys())
    for tensor in {tensor.data_ptr(): tensor for tensor in leaves(state) if tensor.numel()}.values():  # tied ones once
        tensor.reshape(-1).view(torch.uint8).bitwise_xor_(1 if tensor.dtype is torch.bool else 0xA5)
    assert digests(state) != sorted(entry[2] for entry in expected["tensors"].values())
    ss.load(state, checkpoint_id=golden)
    assert digests(state) == sorted(entry[2] for entry in expected["tensors"].values())


def test_values_of_other_ranks_are_read(golden: Path) -> None:
    contents = reference_reader.read(golden)
    with ss.Checkpoint.open(golden) as checkpoint:
        for rank in range(checkpoint.world_size):
            own = {name: decode(item["value"]) for name, item in contents.objects[rank].items()}
            common = {name: decode(item["value"]) for name, item in contents.objects[0].items()}
            assert repr(dict(checkpoint.objects(rank))) == repr({**own, **common, **own})
    if golden.name == "sharded":
        assert contents.objects[1]["rng.rank"]["value"] == 1


@pytest.mark.parametrize("level", ["quick", "full"])
def test_verify_finds_nothing_wrong(golden: Path, level: Any) -> None:
    report = ss.verify(golden, level=level)
    assert report, report.problems
    assert report.checked_bytes > 0


@pytest.mark.skipif(shutil.which("xxh128sum") is None, reason="xxh128sum is not installed")
def test_xxh128sum_agrees(golden: Path) -> None:
    command = ["xxh128sum", "-c", "MANIFEST.xxh128"]
    done = subprocess.run(command, cwd=golden, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "MANIFEST.json: OK\n"), done.stderr


def described(tensors: dict[Any, torch.Tensor]) -> dict[Any, Any]:
    return {
        name: [str(tensor.dtype).removeprefix("torch."), list(tensor.shape), xxhash.xxh3_128_hexdigest(bits_of(tensor))]
        for name, tensor in tensors.items()
    }


def digests(state: Any) -> list[str]:
    return sorted(entry[2] for entry in described(dict(enumerate(leaves(state)))).values())


def leaves(state: Any) -> list[torch.Tensor]:
    if isinstance(state, torch.Tensor):
        return [state]
    if isinstance(state, dict):
        return [tensor for item in state.values() for tensor in leaves(item)]
    return [tensor for item in state for tensor in leaves(item)] if isinstance(state, (list, tuple)) else []
