"""`snapstone info`: what a checkpoint holds, and that nothing in it reaches the terminal raw."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result

import snapstone as ss

from .conftest import EVIL_NAME

Run = Callable[..., Result]
RunJson = Callable[..., tuple[int, dict[str, Any]]]


def test_facts_files_and_objects_are_shown(snapstone: Run, saved_run: Path) -> None:
    result = snapstone("info", saved_run / "step-9")
    assert result.exit_code == 0
    assert re.search(r"^step +9$", result.stdout, re.MULTILINE)
    assert re.search(r"^tensors +3, 1\.1 MiB$", result.stdout, re.MULTILINE)
    assert re.search(r"^rank-00000\.data +0 +[0-9.]+ MiB +ok$", result.stdout, re.MULTILINE)
    assert re.search(r'^betas +{"\$tuple": \[0\.9, 0\.95\]}$', result.stdout, re.MULTILINE)
    assert "weight" not in result.stdout


def test_tensors_are_shown_when_asked_for(snapstone: Run, saved_run: Path) -> None:
    result = snapstone("info", saved_run / "step-9", "--tensors", "--bytes")
    assert re.search(r"^model\.weight +float32 +\[300, 1000\] +1 +1200000$", result.stdout, re.MULTILINE)
    assert re.search(r"^model\.bias +bfloat16 +\[3\] +1 +6$", result.stdout, re.MULTILINE)


def test_json_has_every_documented_key(snapstone_json: RunJson, saved_run: Path) -> None:
    code, document = snapstone_json("info", saved_run / "step-9", "--tensors")
    assert code == 0
    assert document.keys() == {
        *("schema", "path", "step", "save_id", "format_version", "world_size", "nbytes", "stored_bytes"),
        *("committed_at", "metadata", "environment", "files", "objects", "tensor_count", "tensors"),
        *("shared_bytes", "base", "changed", "chain"),
    }
    assert document["metadata"]["metrics"] == {"loss": 1 / 9}
    assert document["objects"]["betas"] == {"$tuple": [0.9, 0.95]}
    assert document["tensors"][0] == {
        "name": "model.weight",
        "dtype": "float32",
        "shape": [300, 1000],
        "shards": 1,
        "nbytes": 1_200_000,
        "changed_bytes": None,
    }
    assert (document["shared_bytes"], document["base"], document["changed"], document["chain"]) == (0, None, None, [])
    assert [file["kind"] for file in document["files"]] == ["index", "data"]
    assert all(file["state"] == "ok" for file in document["files"])
    assert "tensors" not in snapstone_json("info", saved_run / "step-9")[1]


def test_a_delta_save_names_its_base_what_changed_and_whose_files_it_shares(snapstone: Run, delta_run: Path) -> None:
    text = snapstone("info", delta_run / "step-3", "--tensors").stdout
    first, second = (ss.Checkpoint.open(delta_run / f"step-{step}").save_id for step in (1, 2))
    assert re.search(r"^on disk +1\.0 MiB own, 5\.0 MiB shared with earlier saves$", text, re.MULTILINE)
    assert re.search(rf"^base +step-2 \(step 2, save id {second}\)$", text, re.MULTILINE)
    assert re.search(r"^depth +2 since the last full save$", text, re.MULTILINE)
    assert re.search(r"^changed +1 of 3 tensors, 1\.0 MiB \(16\.7%\)$", text, re.MULTILINE)
    assert re.search(rf"^{first} +1 +6\.0 MiB +4\.0 MiB +67%$", text, re.MULTILINE)
    assert re.search(rf"^{second} +1 +1\.0 MiB +1\.0 MiB +100%$", text, re.MULTILINE)
    assert re.search(rf"^base/{first}\.rank-00000\.data +- +6\.0 MiB +ok$", text, re.MULTILINE)
    assert re.search(r"^c +float32 +\[524288\] +1 +2\.0 MiB +1\.0 MiB$", text, re.MULTILINE)
    assert re.search(r"^a +float32 +\[524288\] +1 +2\.0 MiB +0 B$", text, re.MULTILINE)


def test_json_of_a_delta_save_has_its_lineage(snapstone_json: RunJson, delta_run: Path) -> None:
    _, document = snapstone_json("info", delta_run / "step-3", "--tensors")
    second = ss.Checkpoint.open(delta_run / "step-2")
    assert document["base"] == {"save_id": second.save_id, "step": 2, "name": "step-2", "depth": 2}
    assert document["changed"] == {"tensors": 1, "nbytes": 1 << 20, "share": 0.166667}
    assert (document["stored_bytes"], document["shared_bytes"]) == (1 << 20, 5 << 20)
    assert document["chain"][0] == {
        "save_id": ss.Checkpoint.open(delta_run / "step-1").save_id,
        "files": 1,
        "nbytes": 6 << 20,
        "used_bytes": 4 << 20,
        "live_fraction": 0.666667,
    }
    assert [(file["kind"], file["rank"]) for file in document["files"]] == [
        *(("index", 0), ("data", 0)),
        *(("shared", None), ("shared", None)),
    ]
    assert {one["name"]: one["changed_bytes"] for one in document["tensors"]} == {"a": 0, "b": 0, "c": 1 << 20}


def test_a_missing_shared_file_is_a_finding(snapstone: Run, delta_run: Path) -> None:
    shutil.rmtree(delta_run / "step-3" / "base")
    result = snapstone("info", delta_run / "step-3")
    assert result.exit_code == 1
    assert len(re.findall(r"^base/.* missing$", result.stdout, re.MULTILINE)) == 2


@pytest.mark.parametrize("command", [["info", "--tensors"], ["diff"], ["verify"], ["ls"]])
def test_names_and_metadata_cannot_drive_the_terminal(snapstone: Run, run_path: Path, command: list[str]) -> None:
    """Control characters, escapes, right-to-left overrides and line breaks come out escaped, rich markup as it is."""
    other = run_path / "step-\x1b[2J"
    ss.save({EVIL_NAME: torch.zeros(3)}, checkpoint_id=run_path / "plain", metadata={"note\x1b]0;": "\x1b[2J"})
    (run_path / "plain").rename(other)
    paths = [run_path] if command[0] == "ls" else [other]
    if command[0] == "diff":
        paths.append(run_path / "step-9")
    result = snapstone(command[0], *paths, *command[1:])
    assert all(character.isprintable() or character == "\n" for character in result.output)
    if command[0] in ("info", "diff"):
        assert r"evil\x1b[31m\x07\n\u202e[red]x[/red]" in result.stdout


def test_a_missing_data_file_is_a_finding(snapstone: Run, run_path: Path) -> None:
    (run_path / "step-9" / "rank-00000.data").unlink()
    result = snapstone("info", run_path / "step-9")
    assert result.exit_code == 1
    assert re.search(r"^rank-00000\.data .* missing$", result.stdout, re.MULTILINE)


def test_only_the_first_objects_are_shown_and_the_rest_counted(snapstone: Run, tmp_path: Path) -> None:
    ss.save({f"value_{i}": i for i in range(30)}, checkpoint_id=tmp_path / "many")
    result = snapstone("info", tmp_path / "many")
    assert len(re.findall(r"^value_\d+ ", result.stdout, re.MULTILINE)) == 20
    assert "... and 10 more (--json shows all)" in result.stdout


def test_one_endless_name_does_not_widen_every_line(snapstone: Run, tmp_path: Path) -> None:
    ss.save({"x" * 100_000: torch.zeros(1), "short": torch.zeros(1)}, checkpoint_id=tmp_path / "long")
    result = snapstone("info", tmp_path / "long", "--tensors")
    line = next(line for line in result.stdout.splitlines() if line.startswith("short"))
    assert len(line) < 200


def test_what_json_cannot_hold_is_described(snapstone_json: RunJson, run_path: Path) -> None:
    """A number beyond a double is valid JSON text that reads back as infinity, which JSON cannot write."""
    checkpoint = run_path / "step-9"
    manifest = json.loads((checkpoint / "MANIFEST.json").read_text())
    manifest["metadata"] = {"big": "HERE", "fine": 1}
    data = json.dumps(manifest).replace('"HERE"', "1e999").encode()
    (checkpoint / "MANIFEST.json").write_bytes(data)
    (checkpoint / "MANIFEST.xxh128").write_text(f"{ss._native.digest_hex(data)}  MANIFEST.json\n")
    code, document = snapstone_json("info", checkpoint)
    assert code == 0
    assert document["metadata"]["fine"] == 1
    assert "$invalid" in document["metadata"]["big"]


def test_a_newer_format_is_refused_in_one_line(snapstone: Run, run_path: Path) -> None:
    checkpoint = run_path / "step-9"
    data = (checkpoint / "MANIFEST.json").read_text().replace('"1.0"', '"2.0"').encode()
    (checkpoint / "MANIFEST.json").write_bytes(data)
    (checkpoint / "MANIFEST.xxh128").write_text(f"{ss._native.digest_hex(data)}  MANIFEST.json\n")
    result = snapstone("info", checkpoint)
    assert result.exit_code == 1
    assert "format 2.0 is newer" in result.stderr
    assert len(result.stderr.splitlines()) == 1
