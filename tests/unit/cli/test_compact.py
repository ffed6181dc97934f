"""`snapstone compact`: what it says and how it ends; tests/durability/test_compaction.py has what it does."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

import snapstone as ss
from snapstone import _native

from .conftest import flip_byte

Run = Callable[..., Result]
RunJson = Callable[..., tuple[int, dict[str, Any]]]


def test_several_checkpoints_are_compacted_one_after_the_other(snapstone: Run, delta_run: Path) -> None:
    paths = [delta_run / f"step-{step}" for step in (1, 2, 3)]
    result = snapstone("compact", *paths)
    assert (result.exit_code, result.stderr) == (0, "")
    lines = result.stdout.splitlines()
    assert lines[0] == f"{paths[0]}: unchanged, it shares no files"
    assert [line.partition(" in ")[0] for line in lines[1:]] == [f"{path}: compacted, 6.0 MiB" for path in paths[1:]]
    assert not any((path / "base").exists() for path in paths)
    assert all(ss.verify(path) for path in paths)


def test_json_has_every_documented_key(snapstone_json: RunJson, delta_run: Path) -> None:
    path = delta_run / "step-3"
    before = ss.Checkpoint.open(path).save_id
    code, document = snapstone_json("compact", path)
    assert code == 0
    (row,) = document["checkpoints"]
    assert row.pop("seconds") >= 0
    save_id = ss.Checkpoint.open(path).save_id
    assert save_id != before
    assert row == {
        "path": str(path),
        "state": "compacted",
        "step": 3,
        "save_id": save_id,
        "copied_bytes": 6 << 20,
        "problem": None,
    }
    (row,) = snapstone_json("compact", path)[1]["checkpoints"]
    assert (row["state"], row["save_id"], row["copied_bytes"]) == ("unchanged", save_id, 0)


def test_damage_is_named_stays_and_does_not_stop_the_others(
    snapstone: Run, snapstone_json: RunJson, delta_run: Path
) -> None:
    shutil.rmtree(delta_run / "step-1")
    second, third = delta_run / "step-2", delta_run / "step-3"
    for shared in (third / "base").iterdir():
        if shared.stat().st_size == 1 << 20:
            flip_byte_in_place(shared, 5)  # step-2 wrote it, so that it is damaged too
    code, document = snapstone_json("compact", third)
    assert code == 1
    assert document["checkpoints"][0]["state"] == "failed"
    assert "digest mismatch" in document["checkpoints"][0]["problem"]
    result = snapstone("compact", third, second)
    assert (result.exit_code, result.stdout) == (1, "")
    assert [line.split(": not compacted: ")[0] for line in result.stderr.splitlines()] == [
        f"snapstone: {path}" for path in (third, second)
    ]
    assert (third / "base").exists()


def flip_byte_in_place(path: Path, at: int) -> None:
    """In every directory that has the file."""
    copy = path.with_name("copy")
    shutil.copy(path, copy)
    flip_byte(copy, at)
    path.write_bytes(copy.read_bytes())
    copy.unlink()


def test_exit_codes_are_those_of_the_worst(snapstone: Run, delta_run: Path) -> None:
    result = snapstone("compact", delta_run / "absent", delta_run / "step-2")
    assert result.exit_code == 3
    assert (
        result.stderr
        == f"snapstone: {delta_run / 'absent'}: not compacted: {delta_run / 'absent'}: no such checkpoint\n"
    )
    assert "compacted" in result.stdout
    assert snapstone("compact").exit_code == 2
    assert snapstone("compact", delta_run).exit_code == 1
    assert snapstone("compact", delta_run / "step-3", env={"SNAPSTONE_TIMEOUT": "soon"}).exit_code == 2


@pytest.mark.parametrize("call", ["fallocate", "copy_file_range", "pwrite", "fsync"])
def test_a_full_disk_is_an_io_error_and_leaves_everything(snapstone: Run, delta_run: Path, call: str) -> None:
    path = delta_run / "step-3"
    before = ss.Checkpoint.open(path).save_id
    _native.choose_rung(str(delta_run))  # cached: its probe is not what fails
    _native.fault_arm(f"{call}:2+:errno=ENOSPC" if call in ("pwrite", "fsync") else f"{call}:1+:errno=ENOSPC")
    try:
        result = snapstone("compact", path)
    finally:
        _native.fault_disarm()
    assert result.exit_code == 4
    assert "No space left on device" in result.stderr
    assert ss.Checkpoint.open(path).save_id == before
    assert ss.verify(path)
    assert sorted(os.listdir(delta_run)) == ["step-1", "step-2", "step-3"]


def test_paths_cannot_drive_the_terminal(snapstone: Run, delta_run: Path) -> None:
    evil = delta_run / "step-\x1b[2J"
    (delta_run / "step-3").rename(evil)
    (evil / "MANIFEST.json").write_bytes(b"{}")
    result = snapstone("compact", evil, delta_run / "\x1b]0;absent")
    assert all(character.isprintable() or character == "\n" for character in result.output)
