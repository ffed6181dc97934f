"""Which checkpoints of a trainer's folder are resumed from, counted, replaced and removed."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

import snapstone
from snapstone import _native
from snapstone.integrations.step_folder import StepFolder


def save(path: Path, value: float = 1.0) -> None:
    snapstone.save({"t": torch.full((1000,), value)}, checkpoint_id=path, dcp_marker=True)


def save_stock(path: Path) -> None:
    dcp.save({"t": torch.ones(1000)}, checkpoint_id=path, no_dist=True)


def test_the_newest_whole_checkpoint_is_resumed_from_whoever_wrote_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = StepFolder(str(tmp_path))
    assert folder.newest() == -1
    assert StepFolder(str(tmp_path / "nowhere")).newest() == -1
    for step in (1, 9, 10):
        save(tmp_path / f"step-{step}")
    save_stock(tmp_path / "step-3")
    assert folder.newest() == 10
    (tmp_path / "step-10" / "rank-00000.data").write_bytes(b"short")
    assert folder.newest() == 9
    assert "step-10 is passed over" in caplog.text
    (tmp_path / "step-9" / "MANIFEST.json").unlink()  # of which .metadata is left
    assert folder.newest() == 3
    (tmp_path / "step-3" / ".metadata").unlink()
    assert folder.newest() == 1
    shutil.copytree(tmp_path / "step-1", tmp_path / "best-step-20")
    assert folder.newest() == 1


def test_what_is_not_finished_neither_counts_nor_goes(tmp_path: Path) -> None:
    folder = StepFolder(str(tmp_path))
    for step in (1, 2, 3):
        save(tmp_path / f"step-{step}")
    save_stock(tmp_path / "step-0")
    for step in (4, 5):
        (tmp_path / f"step-{step}").mkdir()
    gone = folder.prune(2, 3)
    assert sorted(os.listdir(tmp_path)) == sorted(
        [*(Path(one).name for one in gone), *(f"step-{step}" for step in (2, 3, 4, 5))]
    )
    assert len(gone) == 2
    assert folder.prune(2, 3) == []
    save(tmp_path / "step-6")
    save(tmp_path / "step-7")
    assert [Path(one).name.startswith(".trash-") for one in folder.prune(2, 2)] == [True]
    assert [step for step, _ in folder.committed()] == [2, 6, 7], "the one that was saved last stays"


def test_what_a_crash_leaves_of_a_removal_the_next_save_removes(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path / f"step-{step}")
    assert len(StepFolder(str(tmp_path)).prune(2, 3)) == 1
    save(tmp_path / "step-4")
    assert sorted(os.listdir(tmp_path)) == ["step-2", "step-3", "step-4"]


def test_nothing_is_given_away_for_removal_that_a_power_cut_would_bring_back(tmp_path: Path) -> None:
    folder = StepFolder(str(tmp_path))
    save_stock(tmp_path / "step-3")
    folder.make_room("step-3")
    for step in (1, 2, 3):
        save(tmp_path / f"step-{step}")
    for take_away in (lambda: folder.prune(2, 3), lambda: folder.settle("step-3")):
        _native.fault_arm("fsync:1:errno=EIO")
        try:
            with pytest.raises(OSError, match="Input/output error"):
                take_away()
        finally:
            _native.fault_disarm()
        assert take_away() == []
    assert [step for step, _ in folder.committed()] == [2, 3]


@pytest.mark.parametrize("durable", [True, False])
def test_a_stock_checkpoint_is_replaced_when_the_new_one_is_durable_and_put_back_otherwise(
    tmp_path: Path, durable: bool
) -> None:
    folder = StepFolder(str(tmp_path))
    save_stock(tmp_path / "step-5")
    folder.make_room("step-5")
    assert folder.committed() == []
    if durable:
        save(tmp_path / "step-5")
        assert folder.settle("step-4") == []
        (old,) = folder.settle("step-5")
        assert (Path(old) / "__0_0.distcp").exists()
    assert folder.newest() == 5
    assert (tmp_path / "step-5" / "MANIFEST.json").exists() == durable
    assert not (tmp_path / ".replaced-step-5").exists()


def test_a_checkpoint_of_the_engine_is_left_for_it_to_replace(tmp_path: Path) -> None:
    folder = StepFolder(str(tmp_path))
    save(tmp_path / "step-5")
    folder.make_room("step-5")
    folder.make_room("step-6")
    assert folder.newest() == 5
    folder.make_room("step-5", for_others=True)
    assert not (tmp_path / "step-5").exists()


def test_a_run_never_begins_anew_over_checkpoints_that_are_all_damaged(tmp_path: Path) -> None:
    folder = StepFolder(str(tmp_path))
    for step in (1, 2):
        save(tmp_path / f"step-{step}")
        (tmp_path / f"step-{step}" / "rank-00000.data").write_bytes(b"short")
    with pytest.raises(snapstone.CorruptCheckpointError, match=r"every checkpoint of .* is damaged.*step-2"):
        folder.newest()


def test_what_cannot_be_read_now_is_not_taken_for_damaged(tmp_path: Path) -> None:
    """The run would go on from an older one, and in time replace it."""
    folder = StepFolder(str(tmp_path))
    for step in (1, 2):
        save(tmp_path / f"step-{step}")
    _native.fault_arm("*:1:errno=EIO")
    try:
        with pytest.raises(OSError, match="Input/output error"):
            folder.newest()
    finally:
        _native.fault_disarm()
    assert folder.newest() == 2


def test_what_cannot_be_looked_at_now_is_not_taken_for_missing(tmp_path: Path) -> None:
    folder = StepFolder(str(tmp_path))
    for step in (1, 2):
        save(tmp_path / f"step-{step}")
    (tmp_path / "step-3").symlink_to("x" * 300)  # no file system takes such a name
    with pytest.raises(OSError, match="File name too long"):
        folder.newest()
    with pytest.raises(OSError, match="File name too long"):
        folder.prune(1, 2)
    (tmp_path / "step-3").unlink()
    (tmp_path / "step-3").symlink_to("step-3")
    (tmp_path / "step-4").write_bytes(b"")
    assert folder.newest() == 2
    assert [step for step, _ in folder.committed()] == [1, 2]


def test_a_damaged_checkpoint_does_not_count_as_one_that_is_kept(tmp_path: Path) -> None:
    folder = StepFolder(str(tmp_path))
    for step in (1, 2, 9):
        save(tmp_path / f"step-{step}")
    (tmp_path / "step-9" / "rank-00000.data").write_bytes(b"short")
    assert folder.newest() == 2
    save(tmp_path / "step-3")
    assert len(folder.prune(2, 3)) == 1
    assert [step for step, _ in folder.committed()] == [2, 3, 9]
    snapstone.save({"t": torch.ones(3)}, checkpoint_id=tmp_path / "step-9", dcp_marker=True, overwrite=True)
    assert len(folder.prune(2, 9)) == 1
    assert [step for step, _ in folder.committed()] == [3, 9], "it was saved again, and counts"


def test_a_checkpoint_comes_back_in_the_place_of_half_an_export(tmp_path: Path) -> None:
    """The job died while it wrote step-5 file by file for others."""
    folder = StepFolder(str(tmp_path))
    for _ in range(2):
        shutil.rmtree(tmp_path / "step-5", ignore_errors=True)
        save(tmp_path / "step-5", 5.0)
        folder.make_room("step-5", for_others=True)
        (tmp_path / "step-5").mkdir()
        (tmp_path / "step-5" / "model-00001.safetensors").write_bytes(b"part")
        assert StepFolder(str(tmp_path)).newest() == 5
        assert snapstone.verify(tmp_path / "step-5", level="full")
    folder.make_room("step-5", for_others=True)
    (tmp_path / "step-5").mkdir()
    (tmp_path / "step-5" / "model-00001.safetensors").write_bytes(b"part")
    folder.make_room("step-5", for_others=True)  # again, and nobody has looked for it in between
    assert snapstone.verify(tmp_path / ".replaced-step-5", level="full")


def test_names_that_are_not_the_trainers_are_nobodys_business(tmp_path: Path) -> None:
    folder = StepFolder(str(tmp_path))
    for name in ("step-1", "step-2", "step-0009"):
        save(tmp_path / name)
    assert folder.newest() == 2
    assert len(folder.prune(1, 2)) == 1
    assert [step for step, _ in folder.committed()] == [2]
    assert (tmp_path / "step-0009").is_dir()
