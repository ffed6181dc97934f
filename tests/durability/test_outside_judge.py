"""The package ckpt-chaos, written by others, kills a training script of ours and judges how it resumes.

Its verdicts: PASS, HARD_FAIL (the resume raises), SILENT_DIVERGENCE (other weights than without the kill), LOST_WORK
(an older checkpoint than the newest that is complete, which it tells by files and sizes).
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from durability.counted import count
from lacking import skip_without

JOB = Path(__file__).with_name("judged_job.py")
ALL = os.environ.get("SNAPSTONE_TEST_KILLS") == "all"
POINTS = 200 if ALL else 6
LONGEST_S = 3400 if ALL else 800
RESUMED = r"resumed from step (\d+)"

pytestmark = pytest.mark.timeout(3600 if ALL else 900)


@pytest.fixture(autouse=True)
def judge() -> None:
    if importlib.util.find_spec("ckpt_chaos") is None:
        skip_without("ckpt_chaos", "it is not installed")


def judged(work: Path, *more: str) -> tuple[int, list[dict[str, Any]]]:
    """The exit status of ckpt-chaos, 1 for any verdict but PASS, and what it recorded of each kill."""
    command = [sys.executable, "-m", "ckpt_chaos", "run", "--work", str(work), "--max-points", str(POINTS)]
    command += ["--jobs", "2", "--timeout", "200", "--step-regex", RESUMED, "--result-file", "{out}/final"]
    command += ["--fail-on", "HARD_FAIL,SILENT_DIVERGENCE,LOST_WORK,CONTROL_FAIL"]
    command += (
        ["--modes", "before,torn"] if "--naive" in more else ["--modes", "before", "--checkpoint-glob", "{out}/step-*"]
    )
    command += ["--", sys.executable, str(JOB), "--out", "{out}", *more]
    # A path of its own: its first entry, ckpt-chaos's boot directory, must stay the first.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=LONGEST_S, check=False)
    print(ended.stdout, ended.stderr)
    records = [json.loads(path.read_text()) for path in sorted(work.glob("pt_*/result.json"))]
    return ended.returncode, [record for record in records if "control" not in record["label"]]


def test_every_kill_of_a_save_passes(tmp_path: Path) -> None:
    status, records = judged(tmp_path / "work")
    count("kills", len(records))
    assert status == 0
    assert len(records) == POINTS or ALL
    assert all(record["crashed"] and not record["drift"] for record in records), records
    assert {record["outcome"]["newest_complete_step"] for record in records} >= {0, 1, 2}
    for record in records:
        assert record["outcome"]["resumed_from_step"] == record["outcome"]["newest_complete_step"], record


def test_the_judge_fails_a_script_that_writes_in_place(tmp_path: Path) -> None:
    status, records = judged(tmp_path / "work", "--naive")
    assert status == 1
    assert any(record["outcome"]["raised"] for record in records), records
