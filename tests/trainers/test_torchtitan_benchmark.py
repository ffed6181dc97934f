"""The benchmark of torchtitan's run, in its smallest size: that it works, not how fast."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import snapstone

RUN = Path(__file__).resolve().parents[2] / "benchmarks" / "trainers" / "torchtitan_run.py"


@pytest.mark.timeout(300)
def test_stock_and_snapstone_take_turns_and_the_document_says_on_what(tmp_path: Path) -> None:
    sizes = ["--rounds", "2", "--steps", "2", "--layers", "1"]
    places = ["--directory", str(tmp_path / "disk"), "--results", str(tmp_path / "results")]
    done = subprocess.run(
        [sys.executable, str(RUN), *sizes, *places],
        env={**os.environ, "PYTHONPATH": str(Path(snapstone.__file__).parents[1])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert list((tmp_path / "disk").iterdir()) == []
    (path,) = (tmp_path / "results").glob("partial-torchtitan_*.json")
    found = json.loads(path.read_text())
    names = ["no saves", *(f"{who}, {mode}" for who in ("torchtitan", "snapstone") for mode in ("disabled", "async"))]
    assert list(found["engines"]) == names
    for name, samples in found["engines"].items():
        assert len(samples["step"]) == 4
        assert len(samples["stall"]) == (0 if name == "no saves" else 2)
        assert all(seconds > 0 for seconds in samples["call"])
    assert {"cpu", "kernel", "torch"} <= found["machine"].keys()
    assert found["command"][:2] == ["python", "benchmarks/trainers/torchtitan_run.py"]
    assert "| snapstone, async |" in done.stdout
