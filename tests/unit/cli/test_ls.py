"""`snapstone ls`: what is listed, and what is said of damaged checkpoints and leftovers."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

from snapstone import _native

Run = Callable[..., Result]
RunJson = Callable[..., tuple[int, dict[str, Any]]]


def test_checkpoints_are_listed_in_order_of_their_steps(snapstone: Run, saved_run: Path) -> None:
    result = snapstone("ls", saved_run)
    assert result.exit_code == 0
    header, *rows = result.stdout.splitlines()
    assert header.split() == ["name", "step", "size", "age", "ranks", "state"]
    assert [row.split()[:2] for row in rows] == [["step-9", "9"], ["step-10", "10"]]
    assert all(row.split()[-1] == "ok" and "1.1 MiB" in row for row in rows)


def test_bytes_are_exact_when_asked_for(snapstone: Run, saved_run: Path) -> None:
    assert " 1200014 " in snapstone("ls", saved_run, "--bytes").stdout


def test_json_has_every_documented_key(snapstone_json: RunJson, saved_run: Path) -> None:
    code, document = snapstone_json("ls", saved_run)
    assert code == 0
    assert document.keys() == {"schema", "path", "checkpoints", "leftovers"}
    first = document["checkpoints"][0]
    assert first.keys() == {
        *("name", "path", "step", "nbytes", "stored_bytes", "world_size", "committed_at", "state", "problems")
    }
    assert (first["name"], first["step"], first["nbytes"], first["world_size"]) == ("step-9", 9, 1_200_014, 1)
    assert first["stored_bytes"] == (saved_run / "step-9" / "rank-00000.data").stat().st_size


def test_a_checkpoint_is_listed_alone(snapstone_json: RunJson, saved_run: Path) -> None:
    code, document = snapstone_json("ls", saved_run / "step-9")
    assert code == 0
    assert [one["name"] for one in document["checkpoints"]] == ["step-9"]


def test_a_damaged_checkpoint_is_a_finding_and_hides_no_other(snapstone_json: RunJson, run_path: Path) -> None:
    os.truncate(run_path / "step-9" / "rank-00000.data", 4096)
    (run_path / "step-10" / "MANIFEST.json").unlink()
    shutil.copytree(run_path / "step-9", run_path / "step-11")
    (run_path / "step-11" / "MANIFEST.json").write_text("{")
    code, document = snapstone_json("ls", run_path)
    assert code == 1
    states = {one["name"]: one["state"] for one in document["checkpoints"]}
    assert states == {"step-9": "corrupt", "step-10": "incomplete", "step-11": "corrupt"}
    assert all(str(run_path / one["name"]) in one["problems"][0] for one in document["checkpoints"])


def test_nothing_found_is_a_finding_and_nothing_there_is_another(snapstone: Run, tmp_path: Path) -> None:
    (tmp_path / "plain").mkdir()
    empty, absent = snapstone("ls", tmp_path), snapstone("ls", tmp_path / "absent")
    assert (empty.exit_code, empty.stdout) == (1, f"no checkpoints in {tmp_path}\n")
    assert (absent.exit_code, absent.stdout) == (3, "")
    assert absent.stderr == f"snapstone: {tmp_path / 'absent'}: No such file or directory\n"


def test_links_are_not_followed(snapstone_json: RunJson, run_path: Path) -> None:
    (run_path / "latest").symlink_to("step-10")
    (run_path / "loop").symlink_to("loop")
    code, document = snapstone_json("ls", run_path)
    assert code == 0
    assert [one["name"] for one in document["checkpoints"]] == ["step-9", "step-10"]


def test_leftovers_of_living_and_dead_saves_are_told_apart(snapstone_json: RunJson, run_path: Path) -> None:
    live = _native.Staging.create(str(run_path), "a" * 32, [_native.boot_id()])
    dead = _native.Staging.create(str(run_path), "b" * 32, [_native.boot_id()])
    del dead  # its lock goes, the directory stays: what a killed save leaves
    (run_path / f".trash-{'c' * 32}").mkdir()
    (run_path / f".staging-{'d' * 32}").mkdir()  # a save in its first moments: no OWNER yet
    (run_path / ".staging-of-somebody-else").mkdir()
    code, document = snapstone_json("ls", run_path)
    assert code == 0
    found = {one["name"]: (one["kind"], one["state"]) for one in document["leftovers"]}
    assert found == {
        f".staging-{'a' * 32}": ("staging", "live"),
        f".staging-{'b' * 32}": ("staging", "dead"),
        f".staging-{'d' * 32}": ("staging", "unknown"),
        f".trash-{'c' * 32}": ("trash", "dead"),
    }
    live.discard()


def test_looking_at_a_live_save_does_not_expose_it_to_the_next_one(snapstone: Run, run_path: Path) -> None:
    live = _native.Staging.create(str(run_path), "a" * 32, [_native.boot_id()])
    assert "unfinished save, live" in snapstone("ls", run_path).stdout
    assert _native.reap(str(run_path)) == []
    live.discard()


def test_an_old_staging_directory_without_owner_is_dead(snapstone: Run, run_path: Path) -> None:
    leftover = run_path / f".staging-{'e' * 32}"
    leftover.mkdir()
    hours_ago = time.time() - 3 * 3600 - 60
    os.utime(leftover, (hours_ago, hours_ago))
    assert f"{leftover.name}: unfinished save, dead, 3 h 1 min old" in snapstone("ls", run_path).stdout


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_an_unreadable_run_is_an_io_error(snapstone: Run, run_path: Path) -> None:
    run_path.chmod(0)
    result = snapstone("ls", run_path)
    run_path.chmod(0o700)
    assert result.exit_code == 4
    assert str(run_path) in result.stderr
