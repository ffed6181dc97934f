"""All I/O rungs give identical files, on every file system: compared byte for byte, except for the random save_id."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import snapstone as ss
from roundtrip.bits import assert_same
from rungs.running import run_work
from rungs.same_files import MIB, RUNGS, comparable, make_state
from snapstone import _native

TMPFS = Path("/dev/shm")


@pytest.fixture(scope="module")
def tmpfs() -> Iterator[Path]:
    if not TMPFS.is_dir() or shutil.disk_usage(TMPFS).free < 256 * MIB:
        pytest.skip("needs a tmpfs with 256 MiB free")
    with tempfile.TemporaryDirectory(dir=TMPFS, prefix="snapstone-") as directory:
        yield Path(directory)


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
    assert run_work(rung, tmp_path, reference).rungs == {rung}
    assert comparable(tmp_path) == comparable(reference)


def test_the_probe_chooses_a_rung_that_works_and_writes_the_same_files(tmp_path: Path, reference: Path) -> None:
    assert run_work(None, tmp_path, tmp_path).rungs <= set(RUNGS)
    assert comparable(tmp_path) == comparable(reference)


def test_tmpfs_holds_the_same_files(tmpfs: Path, reference: Path) -> None:
    assert run_work(None, tmpfs, reference).rungs <= set(RUNGS)
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
