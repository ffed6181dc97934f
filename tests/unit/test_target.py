"""What a caller may give as the place, the step and the metadata of a checkpoint."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import snapstone as ss
from snapstone.collective import Deadline
from snapstone.target import Target


@pytest.mark.parametrize(
    ("step", "metadata", "error", "words"),
    [
        (True, None, TypeError, "step=True: must be an integer"),
        (1.0, None, TypeError, "integer"),
        (1 << 63, None, ValueError, "must fit into 64 bits"),
        (-(1 << 63) - 1, None, ValueError, "must fit into 64 bits"),
        (1, [], TypeError, "metadata must be a mapping, not a list"),
        (1, {1: 2}, TypeError, "metadata has the key 1: keys must be strings"),
    ],
)
def test_what_no_manifest_can_hold_is_refused(step: Any, metadata: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        Target.of("run/c", step, metadata)
    assert Target.of("run/c", (1 << 63) - 1, {"k": 2}).step == (1 << 63) - 1


def test_a_checkpoint_that_is_replaced_while_it_is_looked_at_can_be_replaced(tmp_path: Path) -> None:
    """Compacted, it has no directory `base` any more, which was listed before."""
    state = {"t": torch.ones(3)}
    ss.save(state, checkpoint_id=tmp_path / "first")
    ss.save(state, checkpoint_id=tmp_path / "c", base=tmp_path / "first")
    ss.save(state, checkpoint_id=tmp_path / "compacted")
    assert (tmp_path / "c" / "base").is_dir()
    listed = os.listdir
    others = [tmp_path / "compacted"]

    def lists(path: str) -> list[str]:
        names = listed(path)
        if others:
            os.rename(path, tmp_path / "aside")
            others.pop().rename(path)
        return names

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(os, "listdir", lists)
        Target.of(tmp_path / "c", None, None).check(overwrite=True)
    assert not (tmp_path / "c" / "base").exists()
    (tmp_path / "c" / "more").touch()
    with pytest.raises(FileExistsError, match="holds other things too"):
        Target.of(tmp_path / "c", None, None).check(overwrite=True)


def test_a_staging_directory_that_never_shows_is_waited_for_until_the_deadline(tmp_path: Path) -> None:
    asked = []
    begin = time.monotonic()
    with pytest.raises(FileNotFoundError):
        Target.of(tmp_path / "c", 1, None).join_staging("0" * 16, Deadline(0.3), lambda: asked.append(1))
    assert 0.2 < time.monotonic() - begin < 10
    assert len(asked) > 1
