"""The file by which trainers of torch.distributed.checkpoint find finished checkpoints."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import snapstone as ss


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_marker_stands_in_the_checkpoint_when_it_was_asked_for(tmp_path: Path, asynchronous: bool) -> None:
    state = {"t": torch.arange(10)}
    for name, wanted in (("with", True), ("without", False)):
        if asynchronous:
            ss.async_save(state, checkpoint_id=tmp_path / name, dcp_marker=wanted).result()
        else:
            ss.save(state, checkpoint_id=tmp_path / name, dcp_marker=wanted)
        assert (tmp_path / name / ".metadata").exists() == wanted
        assert ss.verify(tmp_path / name, level="full")
    ss.save({"t": torch.zeros(10)}, checkpoint_id=tmp_path / "with", dcp_marker=True, overwrite=True)
    assert ss.Checkpoint.open(tmp_path / "with").get_tensor("t").sum() == 0
