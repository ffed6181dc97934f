"""What every integration stands on: versions are checked, patches go away again, saves say what they have come to."""

from __future__ import annotations

import logging
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import snapstone as ss
from snapstone.integrations import packing
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


NOT_PACKED = {
    "{": "not a packed checkpoint: ",
    "[1]": "not a packed checkpoint$",
    '{"x": {"$at": "y"}}': "x: its tensor is missing",
    '{"x": {"$pairs": [[1]]}}': "x: not an item of a dict",
    '{"x": {"$pairs": [[[1], 2]]}}': "x: a key that no dict can have",
    '{"x": {"$saved": "?"}}': "x: not bytes",
    '{"x": {"$tuple": 1}}': "x: not a list",
}


@pytest.mark.parametrize("text", list(NOT_PACKED))
def test_a_text_that_nobody_packed_is_corrupt(text: str) -> None:
    with pytest.raises(ss.CorruptCheckpointError, match=NOT_PACKED[text]):
        packing.unpack(text, {})


def test_what_no_text_can_hold_is_refused_by_its_place() -> None:
    endless: dict[str, Any] = {}
    endless["again"] = endless
    with pytest.raises(ValueError, match=r"x\.again: contains itself"):
        packing.pack({"x": endless})
    with pytest.raises(TypeError, match=r"x\.0: cannot store a function"):
        packing.pack({"x": [lambda: None]})
    packed = packing.pack({"x": Fraction(1, 3)})
    with pytest.raises(ss.IncompatibleCheckpointError, match="x: needs pickle"):
        packing.unpack(packed.text, packed.tensors)
    assert packing.unpack(packed.text, packed.tensors, weights_only=False) == {"x": Fraction(1, 3)}


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
