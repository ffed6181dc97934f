"""What every integration stands on: versions are checked, patches go away again, saves say what they have come to."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import snapstone as ss
from snapstone.integrations.patches import Patches
from snapstone.integrations.versions import UnsupportedVersionError, require


def test_an_unsupported_version_is_an_error_that_names_the_range() -> None:
    installed = require("torch", "2.6", "99")
    assert torch.__version__.startswith(installed.split("+")[0])
    with pytest.raises(UnsupportedVersionError, match=r"torch .* is installed; snapstone supports torch >= 98, < 99"):
        require("torch", "98", "99")
    with pytest.raises(UnsupportedVersionError, match=r"supports torch >= 1, < 2.1"):
        require("torch", "1", "2.1")
    with pytest.raises(UnsupportedVersionError, match="no-such-package is not installed"):
        require("no-such-package", "1", "2")


def test_undo_puts_back_what_was_there_and_spares_what_others_put_there() -> None:
    owner = SimpleNamespace(a=1, b=2)
    patches = Patches()
    assert patches.set(owner, "a", 10) == 1
    assert patches.set(owner, "a", 11) == 10
    patches.set(owner, "b", 20)
    owner.b = 30
    with pytest.raises(AttributeError):
        patches.set(owner, "missing", 1)
    assert patches
    patches.undo()
    patches.undo()
    assert (owner.a, owner.b) == (1, 30)
    assert not patches


def test_rank_0_says_once_that_a_save_is_staged_and_that_it_is_durable(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="snapstone")
    ss.async_save({"a": torch.zeros(1 << 20)}, checkpoint_id=tmp_path / "c").result()
    ss.wait()
    lines = [record.getMessage() for record in caplog.records if record.name == "snapstone"]
    assert [line.split()[0] for line in lines] == ["staged", "durable"]
    assert all(str(tmp_path / "c") in line and "0.004 GB" in line for line in lines)
    caplog.clear()
    with pytest.raises(FileExistsError):
        ss.save({"a": torch.zeros(1)}, checkpoint_id=tmp_path / "c")
    assert not caplog.records
