"""All I/O rungs give identical files, on every file system: compared byte for byte, except for the random save_id."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import snapstone as ss
from roundtrip.bits import assert_same, files_of, random_bits
from snapstone import _native

RUNGS = ["uring-fixed", "uring", "threads-direct", "buffered"]
TMPFS = Path("/dev/shm")
MIB = 1 << 20

WORK = textwrap.dedent(
    """
    import sys
    import torch, snapstone as ss
    from roundtrip.test_rungs import make_state
    from roundtrip.bits import assert_same, other_bits

    write_to, read_from = sys.argv[1:]
    state = make_state()
    for name, codec in (("plain", None), ("zstd", "zstd")):
        saved = ss.save(state, checkpoint_id=f"{write_to}/{name}", codec=codec, step=4, metadata={"a": 1})
        target = {key: 0 if key == "n" else other_bits(tensor) for key, tensor in state.items()}
        loaded = ss.load(target, checkpoint_id=f"{read_from}/{name}")
        for key, tensor in state.items():
            if key != "n":
                assert_same(target[key], tensor, key)
        assert ss.verify(f"{read_from}/{name}")
        print(saved.stats["rung"], loaded.stats["rung"])
    """
)


def make_state() -> dict[str, torch.Tensor | int]:
    state: dict[str, torch.Tensor | int] = {f"small{i}": random_bits(torch.uint8, 37 * i, seed=i) for i in range(50)}
    state |= {f"large{i}": random_bits(torch.bfloat16, 700_001 * i, seed=i) for i in range(1, 4)}
    state["zeros"] = torch.zeros(2 * MIB)
    state["strided"] = random_bits(torch.float32, 1000, 501, seed=1).t()
    return state | {"n": 3}


def work(rung: str | None, write_to: Path, read_from: Path) -> set[str]:
    """Saves and loads in a process of its own; the rungs that it used."""
    environment = {name: value for name, value in os.environ.items() if name != "SNAPSTONE_IO"}
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[1]), environment.get("PYTHONPATH", "")])
    if rung is not None:
        environment["SNAPSTONE_IO"] = rung
    command = [sys.executable, "-c", WORK, str(write_to), str(read_from)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=90, check=False)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def comparable(path: Path) -> dict[str, Any]:
    """Every file of every checkpoint under `path`, without the save_id and what depends on it."""
    found: dict[str, Any] = {}
    for name in ("plain", "zstd"):
        save_id = ss.Checkpoint.open(path / name).save_id
        files = {file: data.replace(save_id.encode(), b"-" * 32) for file, data in files_of(path / name).items()}
        del files["MANIFEST.xxh128"]
        document = json.loads(files.pop("MANIFEST.json"))
        for writer in document["writers"]:
            del writer["index"]["xxh128"]  # the index holds the save_id
        found |= {f"{name}/{file}": data for file, data in files.items()} | {f"{name}/manifest": document}
    assert len(found) == 6
    return found


@pytest.fixture(scope="module")
def tmpfs() -> Iterator[Path]:
    if not TMPFS.is_dir() or shutil.disk_usage(TMPFS).free < 256 * MIB:
        pytest.skip("needs a tmpfs with 256 MiB free")
    with tempfile.TemporaryDirectory(dir=TMPFS, prefix="snapstone-") as directory:
        yield Path(directory)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the plainest rung writes."""
    directory = tmp_path_factory.mktemp("reference")
    assert work("buffered", directory, directory) == {"buffered"}
    return directory


DIRECT = [
    pytest.param("uring-fixed", marks=[pytest.mark.needs_io_uring, pytest.mark.needs_o_direct]),
    pytest.param("uring", marks=[pytest.mark.needs_io_uring, pytest.mark.needs_o_direct]),
    pytest.param("threads-direct", marks=pytest.mark.needs_o_direct),
]


@pytest.mark.parametrize("rung", DIRECT)
def test_every_rung_writes_the_same_files_and_reads_those_of_others(tmp_path: Path, reference: Path, rung: str) -> None:
    reason = _native.try_rung(str(tmp_path), rung)
    if reason:
        pytest.skip(f"{rung} does not work here: {reason}")
    assert work(rung, tmp_path, reference) == {rung}
    assert comparable(tmp_path) == comparable(reference)


def test_the_probe_chooses_a_rung_that_works_and_writes_the_same_files(tmp_path: Path, reference: Path) -> None:
    assert work(None, tmp_path, tmp_path) <= set(RUNGS)
    assert comparable(tmp_path) == comparable(reference)


def test_tmpfs_holds_the_same_files(tmpfs: Path, reference: Path) -> None:
    assert work(None, tmpfs, reference) <= set(RUNGS)
    assert comparable(tmpfs) == comparable(reference)


def test_a_checkpoint_can_be_moved_between_file_systems(tmpfs: Path, reference: Path) -> None:
    shutil.copytree(reference / "plain", tmpfs / "copy")
    assert ss.verify(tmpfs / "copy")
    wanted = make_state()["strided"]
    assert isinstance(wanted, torch.Tensor)
    assert_same(ss.Checkpoint.open(tmpfs / "copy").get_tensor("strided"), wanted)


def test_a_rung_that_does_not_exist_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SNAPSTONE_IO", "carrier-pigeon")
    with pytest.raises(ValueError, match="carrier-pigeon"):
        ss.save({"t": torch.ones(1)}, checkpoint_id=tmp_path / "c")
    assert not (tmp_path / "c").exists()


def test_data_files_hold_payload_and_padding_only(reference: Path) -> None:
    data = (reference / "plain" / "rank-00000.data").read_bytes()
    assert len(data) % 4096 == 0
    payload = sum(tensor.nbytes for tensor in make_state().values() if isinstance(tensor, torch.Tensor))
    assert payload <= len(data) < payload + 50 * 64 + 4096 * 10
