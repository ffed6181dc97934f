"""Directories that others fill: absent or complete, never deleted in half, and every wrong byte is found."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch

import snapstone as ss
from snapstone.errors import CorruptCheckpointError
from snapstone.integrations import numbered, publication, safetensors_file
from snapstone.integrations.publication import Publication, problems


def published(final: Path, text: str = "text") -> Path:
    one = Publication.begin(str(final), Publication.name_for(str(final)), leads=True)
    staging = Path(one.staging)
    (staging / "sub").mkdir()
    (staging / "sub" / "a.txt").write_text(text)
    (staging / "empty").touch()
    ss.save({"t": torch.arange(9.0)}, checkpoint_id=staging / "state")
    assert not final.exists() or final.joinpath("snapstone.json").exists()
    one.seal({"step": 3})
    one.publish()
    return final


def test_every_wrong_byte_of_a_published_directory_is_found(tmp_path: Path) -> None:
    final = published(tmp_path / "c")
    assert os.listdir(tmp_path) == ["c"]
    assert problems(str(final), "full") == []
    (final / "added later").touch()
    assert problems(str(final), "full") == []
    for name in ("sub/a.txt", "state/rank-00000.data", "snapstone.json"):
        path = final / name
        right = path.read_bytes()
        position = right.index(b'"nbytes"') if b'"nbytes"' in right else len(right) // 2 if name[0] == "s" else 0
        path.write_bytes(right[:position] + bytes([right[position] ^ 1]) + right[position + 1 :])
        assert problems(str(final), "full"), name
        path.write_bytes(right[:-1])
        assert problems(str(final), "quick"), name
        path.write_bytes(right)
    (final / "empty").unlink()
    (wrong,) = problems(str(final), "quick")
    assert "empty" in wrong
    with pytest.raises(CorruptCheckpointError, match="empty"):
        publication.problems_of_load(str(final))


def test_what_crashes_leave_is_put_right(tmp_path: Path) -> None:
    final = published(tmp_path / "c", "old")
    alive = Publication.begin(str(final), Publication.name_for(str(final)), leads=True)
    dead = Publication.begin(str(final), Publication.name_for(str(final)), leads=True)
    dead._unlock()  # as the kernel does when a process dies
    hidden = tmp_path / ".snapstone-old-c-0123456789ab"
    os.rename(final, hidden)
    (tmp_path / ".snapstone-gone-b-0123456789ab").mkdir()
    (tmp_path / ".snapstone-like").mkdir()
    publication.recover(str(tmp_path))
    assert set(os.listdir(tmp_path)) == {"c", os.path.basename(alive.staging), ".snapstone-like"}
    assert (final / "sub" / "a.txt").read_text() == "old"
    shutil.copytree(final, hidden)
    publication.recover(str(tmp_path))
    assert not hidden.exists()
    alive.discard()
    published(final, "new")
    assert (final / "sub" / "a.txt").read_text() == "new"
    publication.recover(str(tmp_path / "missing"))


def test_what_was_replaced_never_comes_back_in_half(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    final = published(tmp_path / "c", "old")

    def half(path: str, ignore_errors: bool = False) -> None:
        Path(path, "sub", "a.txt").unlink(missing_ok=True)

    monkeypatch.setattr(shutil, "rmtree", half)
    published(final, "new")
    publication.recover(str(tmp_path))
    publication.remove(str(final))
    publication.recover(str(tmp_path))
    assert not final.exists()
    monkeypatch.undo()
    publication.recover(str(tmp_path))
    assert os.listdir(tmp_path) == []


def test_only_what_was_published_is_replaced(tmp_path: Path) -> None:
    final = published(tmp_path / "c")
    publication.check_replaceable(str(final))
    publication.check_replaceable(str(tmp_path / "missing"))
    (tmp_path / "empty").mkdir()
    publication.check_replaceable(str(tmp_path / "empty"))
    (final / "sub" / "notes").touch()
    with pytest.raises(FileExistsError):
        publication.check_replaceable(str(final))
    (tmp_path / "empty" / "notes").touch()
    with pytest.raises(FileExistsError):
        publication.check_replaceable(str(tmp_path / "empty"))


def test_retention_counts_and_removes_complete_checkpoints_only(tmp_path: Path) -> None:
    run = str(tmp_path)
    for step in (2, 4, 6, 8):
        os.utime(published(tmp_path / f"checkpoint-{step}") / "snapstone.json", ns=(step, step))
    (tmp_path / "checkpoint-6" / "empty").unlink()  # damaged
    (tmp_path / "checkpoint-99").mkdir()  # in part
    names = [os.path.basename(one) for one in numbered.complete(run, "checkpoint-", "trainer_state.json")]
    assert names == ["checkpoint-2", "checkpoint-4", "checkpoint-8"]
    best = str(tmp_path / "checkpoint-2")
    assert numbered.rotate(run, "checkpoint-", "trainer_state.json", None, ()) == []
    removed = numbered.rotate(run, "checkpoint-", "trainer_state.json", 1, (best,))
    assert [os.path.basename(one) for one in removed] == ["checkpoint-4"]
    assert {one.name for one in tmp_path.iterdir()} == {f"checkpoint-{step}" for step in (2, 6, 8, 99)}
    newest = numbered.newest_valid(run, "checkpoint-", "trainer_state.json")
    assert newest == str(tmp_path / "checkpoint-8")


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
def test_a_safetensors_file_has_the_bytes_of_the_library(tmp_path: Path, metadata: dict[str, str] | None) -> None:
    dtypes = [*safetensors_file._NAMES]
    tensors = {f"{name}.{position}": torch.ones(position % 3 + 1, 5).to(dtype)
               for position, dtype in enumerate(dtypes) for name in "ba"}  # fmt: skip
    tensors |= {"scalar": torch.tensor(2.5), "none": torch.empty(0, 3), "ü": torch.arange(3)}
    assert safetensors_file.can_hold(tensors)
    safetensors_file.write(str(tmp_path / "ours"), tensors, metadata)
    safetensors.torch.save_file(tensors, tmp_path / "theirs", metadata)
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    tied = torch.ones(4)
    assert not safetensors_file.can_hold({"a": tied, "b": tied})
    assert not safetensors_file.can_hold({"a": torch.ones(4, 4).t()})
