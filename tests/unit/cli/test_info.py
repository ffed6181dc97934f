"""`snapstone info`: what a checkpoint holds, and that nothing in it reaches the terminal raw."""

from __future__ import annotations

import json
import re
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
    }
    assert document["metadata"]["metrics"] == {"loss": 1 / 9}
    assert document["objects"]["betas"] == {"$tuple": [0.9, 0.95]}
    assert document["tensors"][0] == {
        "name": "model.weight",
        "dtype": "float32",
        "shape": [300, 1000],
        "shards": 1,
        "nbytes": 1_200_000,
    }
    assert [file["kind"] for file in document["files"]] == ["index", "data"]
    assert all(file["state"] == "ok" for file in document["files"])
    assert "tensors" not in snapstone_json("info", saved_run / "step-9")[1]


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
