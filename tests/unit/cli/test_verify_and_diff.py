"""`snapstone verify` and `snapstone diff`: what they find, and what that does to the exit code."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result

import snapstone as ss
from snapstone import _native
from snapstone.run_directory import verified

from .conftest import EVIL_NAME, flip_byte, state_at

Run = Callable[..., Result]
RunJson = Callable[..., tuple[int, dict[str, Any]]]


def test_every_checkpoint_of_a_run_is_verified(snapstone: Run, saved_run: Path) -> None:
    result = snapstone("verify", saved_run)
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert [line.partition(" in ")[0] for line in lines] == [
        f"{saved_run / step}: ok, full check of 1.1 MiB" for step in ("step-9", "step-10")
    ]


def test_a_flipped_bit_is_found_and_named(snapstone: Run, run_path: Path) -> None:
    data = run_path / "step-9" / "rank-00000.data"
    flip_byte(data, 5000)
    assert snapstone("verify", run_path, "--quick").exit_code == 0
    result = snapstone("verify", run_path)
    assert result.exit_code == 1
    assert f"{run_path / 'step-9'}: corrupt" in result.stdout
    assert f"{run_path / 'step-10'}: ok" in result.stdout
    finding = next(line for line in result.stdout.splitlines() if line.startswith("  "))
    assert str(data) in finding
    assert "tensor='model.weight'" in finding
    assert "rank=0" in finding


def test_json_has_every_documented_key(snapstone_json: RunJson, run_path: Path) -> None:
    flip_byte(run_path / "step-9" / "rank-00000.data", 5000)
    code, document = snapstone_json("verify", run_path)
    assert code == 1
    assert document.keys() == {"schema", "path", "level", "ok", "checkpoints"}
    assert (document["level"], document["ok"]) == ("full", False)
    bad, good = document["checkpoints"]
    assert bad.keys() == {"name", "path", "step", "state", "checked_bytes", "seconds", "problems", "diagnoses"}
    (found,) = bad["diagnoses"]
    assert found.keys() == {"path", "tensor", "chunk", "rank", "kind", "detail", "advice", "offset", "nbytes"}
    assert (found["kind"], found["offset"], found["nbytes"]) == ("flipped bit", 5000, 1)
    assert (bad["name"], bad["state"], len(bad["problems"])) == ("step-9", "corrupt", 1)
    assert (good["name"], good["state"], good["problems"]) == ("step-10", "ok", [])
    assert good["checked_bytes"] > 1_200_000


def test_damage_is_described_and_repaired(snapstone: Run, run_path: Path, tmp_path: Path) -> None:
    shutil.copytree(run_path, tmp_path / "replica")
    data = run_path / "step-9" / "rank-00000.data"
    right = data.read_bytes()
    data.write_bytes(right[:4000] + bytes(200) + right[4200:])
    found = snapstone("verify", run_path / "step-9")
    assert found.exit_code == 1
    assert "looks like" in found.stdout
    lost = snapstone("verify", run_path / "step-9", "--repair")
    assert lost.exit_code == 1
    assert "not repaired" in lost.stdout
    done = snapstone("verify", run_path, "--repair", "--from", tmp_path / "replica")
    assert done.exit_code == 0, done.output
    assert f"{run_path / 'step-9'}: repaired" in done.stdout
    assert data.read_bytes() == right
    assert snapstone("verify", run_path).exit_code == 0


def test_json_of_a_repair(snapstone_json: RunJson, run_path: Path) -> None:
    flip_byte(run_path / "step-9" / "rank-00000.data", 5000)
    code, document = snapstone_json("verify", run_path, "--repair")
    assert (code, document["ok"]) == (0, True)
    fixed, sound = document["checkpoints"]
    assert (fixed["state"], fixed["problems"], fixed["not_repaired"], fixed["also_repaired"]) == ("ok", [], [], [])
    assert "flipped back" in fixed["repaired"][0]
    assert "repaired" not in sound


def test_options_of_a_repair_that_make_no_sense(snapstone: Run, saved_run: Path) -> None:
    assert snapstone("verify", saved_run, "--repair", "--quick").exit_code == 2
    assert snapstone("verify", saved_run, "--from", saved_run).exit_code == 2


@pytest.mark.parametrize("name", ["MANIFEST.json", "MANIFEST.xxh128", "rank-00000.index", "rank-00000.data"])
@pytest.mark.parametrize("damage", ["missing", "truncated", "fifo", "link to itself", "directory"])
@pytest.mark.parametrize("command", ["ls", "info", "verify", "diff"])
def test_a_hostile_checkpoint_ends_in_a_documented_exit_code(
    snapstone: Run, run_path: Path, command: str, damage: str, name: str
) -> None:
    file = run_path / "step-9" / name
    if damage == "truncated":
        os.truncate(file, file.stat().st_size // 2)
    else:
        file.unlink()
    if damage == "fifo":
        os.mkfifo(file)
    elif damage == "link to itself":
        file.symlink_to(name)
    elif damage == "directory":
        file.mkdir()
    # Without --values digests decide, and no data file is read.
    other = [run_path / "step-10", "--values"] if command == "diff" else []
    result = snapstone(command, run_path / "step-9", *other)
    assert result.exit_code in (1, 3, 4)
    assert "Traceback" not in result.output
    assert len(result.stderr.splitlines()) <= 1
    assert "step-9" in result.output


@pytest.mark.parametrize("what", ["file", "fifo", "link to itself", "dangling link", "empty", ".staging"])
@pytest.mark.parametrize("command", ["info", "verify"])
def test_what_is_no_checkpoint_is_said_to_be_none(snapstone: Run, tmp_path: Path, command: str, what: str) -> None:
    path = tmp_path / "x"
    if what == "file":
        path.write_text("not a directory")
    elif what == "fifo":
        os.mkfifo(path)
    elif "link" in what:
        path.symlink_to(path if what == "link to itself" else tmp_path / "absent")
    else:
        path = tmp_path / (f".staging-{'a' * 32}" if what == ".staging" else "x")
        path.mkdir()
    result = snapstone(command, path)
    assert result.exit_code in (1, 3, 4)
    assert str(path) in result.output


def test_nothing_there_is_not_found(snapstone: Run, tmp_path: Path, saved_run: Path) -> None:
    absent = tmp_path / "absent"
    for arguments in (["info", absent], ["verify", absent], ["diff", absent, saved_run / "step-9"], ["doctor", absent]):
        result = snapstone(*arguments)
        assert (result.exit_code, result.stdout) == (3, ""), arguments
        assert result.stderr.startswith(f"snapstone: {absent}: ")


def test_what_is_below_a_file_is_not_found(snapstone: Run, run_path: Path) -> None:
    below = run_path / "step-9" / "MANIFEST.json" / "step-1"
    assert snapstone("verify", below).exit_code == 3
    with pytest.raises(ss.CheckpointNotFoundError) as caught:
        list(verified(str(below), "full"))
    assert caught.value.path == str(below)


def test_a_checkpoint_that_is_removed_while_others_are_verified_is_left_out(run_path: Path) -> None:
    entries = verified(str(run_path), "full")
    first = next(entries)
    shutil.rmtree(run_path / "step-10")
    assert (first.name, [*entries]) == ("step-9", [])


def test_a_failing_disk_is_an_io_error(snapstone: Run, snapstone_json: RunJson, saved_run: Path) -> None:
    _native.fault_arm("pread:1+:errno=EIO")
    try:
        code, document = snapstone_json("verify", saved_run / "step-9")
        failed = snapstone("info", saved_run / "step-9")
    finally:
        _native.fault_disarm()
    assert code == 4
    assert document["checkpoints"][0]["state"] == "unreadable"
    assert (failed.exit_code, len(failed.stderr.splitlines())) == (4, 1)
    assert "Input/output error" in failed.stderr


def test_equal_checkpoints_do_not_differ(snapstone: Run, snapstone_json: RunJson, run_path: Path) -> None:
    ss.save(state_at(9), checkpoint_id=run_path / "again")
    result = snapstone("diff", run_path / "step-9", run_path / "again", "--values")
    assert result.exit_code == 0
    assert result.stdout.startswith("tensors: 3 same, 0 changed, 0 added, 0 removed; 0 B of ")
    assert result.stdout.endswith(" differ (0.0%); Python values: 0 differ\n")
    assert snapstone_json("diff", run_path / "step-9", run_path / "again")[1]["same"] is True


def test_each_kind_of_difference_is_named(snapstone_json: RunJson, snapstone: Run, run_path: Path) -> None:
    state = state_at(9)
    state["model"]["weight"][7, 7] += 2.0
    state["model"]["extra"] = torch.zeros(1)
    state["model"]["bias"] = torch.zeros(4)
    del state[EVIL_NAME]
    state["step"] = 8
    ss.save(state, checkpoint_id=run_path / "other")
    code, document = snapstone_json("diff", run_path / "step-9", run_path / "other", "--values")
    assert code == 1
    assert document.keys() == {
        *("schema", "a", "b", "same", "same_tensors", "added", "removed", "changed", "changed_objects"),
        *("changed_bytes", "nbytes"),
    }
    assert (document["same"], document["same_tensors"]) == (False, 0)
    assert (document["added"], document["removed"]) == (["model.extra"], [EVIL_NAME])
    assert document["changed_objects"] == ["step"]
    bias, weight = document["changed"]
    assert (bias["before"], bias["after"], bias["max_abs_difference"]) == ("bfloat16[3]", "float32[4]", None)
    assert weight["max_abs_difference"] == pytest.approx(2.0, abs=1e-6)
    assert 0 < weight["changed_bytes"] < weight["nbytes"]
    text = snapstone("diff", run_path / "step-9", run_path / "other").stdout
    assert "+ model.extra\n" in text
    assert "~ step (Python value)\n" in text
    assert "bfloat16[3] -> float32[4]" in text


def test_a_difference_that_is_not_a_number_is_still_json(snapstone_json: RunJson, tmp_path: Path) -> None:
    ss.save({"w": torch.tensor([1.0])}, checkpoint_id=tmp_path / "a")
    ss.save({"w": torch.tensor([float("nan")])}, checkpoint_id=tmp_path / "b")
    code, document = snapstone_json("diff", tmp_path / "a", tmp_path / "b", "--values")
    assert code == 1
    assert document["changed"][0]["max_abs_difference"] == "nan"
    assert json.dumps(document, allow_nan=False)
