"""What `use` takes and refuses, before any training."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from torchtitan.components.checkpointer import BaseCheckpointManager, CheckpointManager
from torchtitan.experiments.torchft.checkpoint import TorchFTCheckpointManager

import snapstone
from snapstone.integrations.torchtitan import SnapstoneCheckpointManager, use


def test_every_setting_of_the_job_is_kept() -> None:
    stock = CheckpointManager.Config(enable=True, folder="here", interval=7, async_mode="async", keep_latest_k=3)
    ours = use(stock, codec="zstd:5", timeout=60)
    assert type(ours) is SnapstoneCheckpointManager.Config
    assert (ours.enable, ours.folder, ours.interval, ours.keep_latest_k) == (True, "here", 7, 3)
    assert (ours.async_mode, ours.codec, ours.timeout) == ("async", "zstd:5", 60)
    assert use(ours, base="auto").codec == "zstd:5"
    assert (
        not use(CheckpointManager.Config())
        .build(dataloader=None, model_parts=[], optimizers=None, lr_schedulers=None, states={}, sd_adapter=None)
        .enable
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"codec": "lzma"}, "codec='lzma'"),
        ({"fence": "later"}, "fence='later'"),
        ({"rng": "no"}, "rng='no'"),
        ({"strategy": "some"}, "strategy"),
        ({"on_unchanged": "no"}, "on_unchanged"),
        ({"timeout": -1}, "timeout"),
        ({"writer_threads": 4}, "writer_threads"),
    ],
)
def test_a_wrong_option_is_an_error_that_names_it(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        use(CheckpointManager.Config(), **options)


@pytest.mark.parametrize("manager", [TorchFTCheckpointManager, BaseCheckpointManager])
def test_another_manager_is_never_replaced_and_never_kept_in_silence(manager: type) -> None:
    with pytest.raises(TypeError, match="takes the place of torchtitan's CheckpointManager"):
        use(manager.Config())


def test_another_version_of_torchtitan_is_an_error_that_names_the_supported_ones(tmp_path: Path) -> None:
    facts = tmp_path / "torchtitan-0.4.1.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: torchtitan\nVersion: 0.4.1\n")
    path = os.pathsep.join([str(tmp_path), str(Path(snapstone.__file__).parents[1])])
    done = subprocess.run(
        [sys.executable, "-c", "import snapstone.integrations.torchtitan"],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "torchtitan 0.4.1 is installed; snapstone supports torchtitan >= 0.3, < 0.4" in done.stderr
