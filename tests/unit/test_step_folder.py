"""Which checkpoints of a trainer's folder are resumed from, counted, replaced and removed."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

import snapstone
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
