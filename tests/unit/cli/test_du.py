"""`snapstone du`: real blocks, each file once, and what a removal would free."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

import snapstone as ss
from snapstone import _native

Run = Callable[..., Result]
RunJson = Callable[..., tuple[int, dict[str, Any]]]


def blocks_of(*paths: Path) -> int:
    """What the system's own du says of all paths together."""
    output = subprocess.run(["du", "-csB1", *map(str, paths)], capture_output=True, text=True, check=True).stdout
    return int(output.splitlines()[-1].split()[0])


def test_each_file_is_counted_once_as_du_of_the_system_does(snapstone_json: RunJson, delta_run: Path) -> None:
    code, document = snapstone_json("du", delta_run)
    assert code == 0
    paths = [delta_run / f"step-{step}" for step in (1, 2, 3)]
    assert document["total_bytes"] == blocks_of(*paths)
    assert document["unshared_bytes"] == sum(blocks_of(path) for path in paths)
    assert document["unshared_bytes"] - document["total_bytes"] == (6 + 6 + 1) << 20
    rows = document["checkpoints"]
    assert [(row["name"], row["path"]) for row in rows] == [(path.name, str(path)) for path in paths]
    assert [row["own_bytes"] >> 20 for row in rows] == [6, 1, 1]
    assert [row["shared_bytes"] >> 20 for row in rows] == [0, 6, 7]


@pytest.mark.parametrize("step", [1, 2, 3])
def test_what_a_removal_would_free_is_what_it_frees(snapstone_json: RunJson, delta_run: Path, step: int) -> None:
    _, before = snapstone_json("du", delta_run)
    shutil.rmtree(delta_run / f"step-{step}")
    _, after = snapstone_json("du", delta_run)
    assert before["checkpoints"][step - 1]["freed_bytes"] == before["total_bytes"] - after["total_bytes"]


def test_a_link_from_outside_the_run_keeps_bytes_too(snapstone_json: RunJson, delta_run: Path, tmp_path: Path) -> None:
    os.link(delta_run / "step-3" / "rank-00000.data", tmp_path / "kept")
    row = snapstone_json("du", delta_run / "step-3")[1]["checkpoints"][0]
    assert row["freed_bytes"] < row["own_bytes"] - (1 << 20) + 1


def test_people_get_a_table_and_a_total(snapstone: Run, delta_run: Path) -> None:
    text = snapstone("du", delta_run).stdout
    assert re.search(r"^name +own +shared +frees$", text, re.MULTILINE)
    assert re.search(r"^step-1 +6\.0 MiB +0 B +[0-9.]+ KiB$", text, re.MULTILINE)
    assert re.search(r"^step-3 +1\.0 MiB +7\.0 MiB +1\.0 MiB$", text, re.MULTILINE)
    assert re.search(r"^total 8\.[0-9] MiB; without shared files it would be 21\.[0-9] MiB$", text, re.MULTILINE)
    exact = snapstone("du", delta_run, "--bytes").stdout
    assert f"total {blocks_of(*delta_run.iterdir())};" in exact


def test_leftovers_are_counted(snapstone: Run, snapstone_json: RunJson, delta_run: Path) -> None:
    dead = delta_run / f".staging-{'a' * 32}"
    dead.mkdir()
    (dead / "OWNER").write_text(_native.boot_id() + "\n")
    (dead / "rank-00000.data").write_bytes(bytes([1]) * (1 << 20))
    os.sync()
    _, document = snapstone_json("du", delta_run)
    (left,) = document["leftovers"]
    assert (left["name"], left["kind"], left["own_bytes"] >> 20, left["shared_bytes"]) == (dead.name, "staging", 1, 0)
    assert left["freed_bytes"] == left["own_bytes"]
    assert document["total_bytes"] == blocks_of(*delta_run.iterdir())
    assert re.search(
        rf"^{re.escape(dead.name)}: unfinished save, [a-z]+, 1\.0 MiB, frees 1\.0 MiB$",
        snapstone("du", delta_run).stdout,
        re.MULTILINE,
    )


def test_damage_and_missing_manifests_do_not_matter(snapstone_json: RunJson, delta_run: Path) -> None:
    (delta_run / "step-2" / "MANIFEST.json").write_bytes(b"nonsense")
    shutil.rmtree(delta_run / "step-3" / "base")
    (delta_run / "step-3" / "base").symlink_to("/etc")
    code, document = snapstone_json("du", delta_run)
    assert code == 0
    assert [row["shared_bytes"] >> 20 for row in document["checkpoints"]] == [0, 6, 0]


def test_exit_codes(snapstone: Run, tmp_path: Path) -> None:
    assert snapstone("du", tmp_path / "absent").exit_code == 3
    (tmp_path / "empty").mkdir()
    result = snapstone("du", tmp_path / "empty")
    assert (result.exit_code, result.stdout.splitlines()[0]) == (1, f"no checkpoints in {tmp_path / 'empty'}")


def test_a_full_save_shares_nothing(snapstone_json: RunJson, delta_run: Path) -> None:
    ss.compact(delta_run / "step-3")
    row = snapstone_json("du", delta_run / "step-3")[1]["checkpoints"][0]
    assert (row["shared_bytes"], row["freed_bytes"]) == (0, row["own_bytes"])
