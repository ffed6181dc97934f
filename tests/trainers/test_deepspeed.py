"""DeepSpeed jobs in processes of their own: killed within an asynchronous save, resumed, taken back to stock."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import snapstone as ss
from snapstone.integrations import versions

JOB = Path(__file__).with_name("deepspeed_job.py")
RANKS = 2
STAGES = (1, 3)


def run(directory: Path, *arguments: str) -> tuple[int, str]:
    """Exit status and output of the job. It is killed with everything that it started when it takes too long."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(RANKS)]
    command = [sys.executable, *launcher, str(JOB), *arguments, "--dir", str(directory)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, process_group=0
    ) as process:
        try:
            output, _ = process.communicate(timeout=250)
        except BaseException:
            os.killpg(process.pid, 9)
            raise
    return process.returncode, output


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of jobs that were killed within their second save, and resumed; once for all tests."""
    where = tmp_path_factory.mktemp("deepspeed")
    for stage in STAGES:
        code, output = run(where, "killed", "--stage", str(stage))
        assert code != 0, output
        assert "SIGKILL" in output, output
        run_directory = where / f"run-{stage}"
        assert (run_directory / "latest").read_text() == "global_step2"
        assert list((run_directory / "global_step4").glob(".staging-*")), "it was not killed within a save"
        assert not list((run_directory / "global_step4").glob("*.pt")), "names of a save that was not committed"
    code, output = run(where, "resumed")
    assert code == 0, output
    return where


def results(directory: Path, stage: int) -> list[dict[str, Any]]:
    return [json.loads((directory / f"result-{rank}.json").read_text())[str(stage)] for rank in range(RANKS)]


@pytest.mark.timeout(1000)
@pytest.mark.parametrize("stage", STAGES)
def test_killed_in_an_asynchronous_save_and_resumed_it_ends_as_if_nothing_had_been(directory: Path, stage: int) -> None:
    for result in results(directory, stage):
        assert result["path"].startswith(str(directory / f"run-{stage}" / "global_step2"))
        assert result["at"] == result["straight"]["2"]
        assert result["end"] == result["straight"]["6"] != result["straight"]["2"]
        assert (result["seen"], result["kind"]) == (2, ["a", None])
    run_directory = directory / f"run-{stage}"
    assert (run_directory / "latest").read_text() == "global_step6"
    assert all(ss.verify(run_directory / tag / "snapstone") for tag in ("global_step2", "global_step6"))


@pytest.mark.parametrize("stage", STAGES)
def test_stock_checkpoints_load_before_and_after_and_ours_load_in_stock_deepspeed(directory: Path, stage: int) -> None:
    for result in results(directory, stage):
        assert result["restored"] == {"engine": "TorchCheckpointEngine", "save": True, "load": True}
        assert result["loaded"] == [True] * 4  # through stubs, exported; of stock, of stock over a tag of ours
    assert results(directory, stage)[0]["weights"], "zero_to_fp32 finds the same through stubs and in exported files"
    assert results(directory, 1)[0]["whole"] > 0, "save_16bit_model writes a plain file"


@pytest.mark.parametrize("stage", STAGES)
def test_a_value_that_needs_pickle_is_refused_by_its_place_until_its_class_is_named(
    directory: Path, stage: int
) -> None:
    for result in results(directory, stage):
        assert "IncompatibleCheckpointError: note: needs pickle" in result["refused"]
        assert result["note"] == "hello"


@pytest.mark.parametrize("stage", STAGES)
def test_a_save_that_fails_is_an_error_on_every_rank_and_latest_stays(directory: Path, stage: int) -> None:
    for result in results(directory, stage):
        assert result["failed"]
        assert result["latest"] == "noted"
        assert result["twice"] == "ValueError: attached already"


def test_another_version_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "version", lambda package: "0.20.1")
    with pytest.raises(versions.UnsupportedVersionError, match=r"deepspeed 0\.20\.1 .* >= 0\.19, < 0\.20"):
        versions.require("deepspeed", "0.19", "0.20")
