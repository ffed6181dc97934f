"""Result documents: written whole, read with their version checked, one bad file never hides the others."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from snapstone.bench import results
from snapstone.bench.environment import environment


def document(directory: Path) -> results.Document:
    made = results.new_document("disk", ["snapstone", "bench", "disk"], environment(directory))
    made["probes"] = []
    return made


def test_what_was_written_is_read(tmp_path: Path) -> None:
    written = document(tmp_path)
    path = results.write(written, tmp_path / "R", "nvme 0/a")
    assert path.name == "disk-nvme-0-a.json"
    assert results.read(path) == written
    assert written["environment"]["hardware"]["cores"] >= 1
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_a_failed_write_keeps_the_earlier_document(tmp_path: Path) -> None:
    path = results.write(document(tmp_path), tmp_path, "x")
    before = path.read_bytes()
    broken = document(tmp_path)
    broken["seconds"] = float("nan")
    with pytest.raises(ValueError, match="nan"):
        results.write(broken, tmp_path, "x")
    del broken["probes"]
    with pytest.raises(ValueError, match="no probes"):
        results.write(broken, tmp_path, "x")
    assert path.read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1


def test_another_version_is_refused_and_the_others_are_read(tmp_path: Path) -> None:
    good = results.write(document(tmp_path), tmp_path, "good")
    newer = json.loads(good.read_text())
    newer["version"] = 2
    (tmp_path / "disk-newer.json").write_text(json.dumps(newer))
    (tmp_path / "stall-torn.json").write_text(good.read_text()[:100])
    (tmp_path / "load-other.json").write_text("[]")
    (tmp_path / "model-less.json").write_text(json.dumps({**newer, "version": 1, "kind": "model"}))
    (tmp_path / "notes.json").write_text("not called like a result")
    documents, problems = results.read_all(tmp_path)
    assert [path for path, _ in documents] == [good]
    assert len(problems) == 4
    assert "disk-newer.json: version 2 of the result format, this one reads 1" in problems[0]
    assert "no inputs, rows" in problems[2]
    with pytest.raises(results.ResultsError, match=r"disk-newer\.json: version 2"):
        results.read(tmp_path / "disk-newer.json")
