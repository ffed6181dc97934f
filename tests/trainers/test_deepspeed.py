"""DeepSpeed jobs in processes of their own: killed within an asynchronous save, resumed, taken back to stock."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import snapstone as ss
from snapstone.errors import CorruptCheckpointError, IncompatibleCheckpointError
from snapstone.integrations import versions
from snapstone.integrations.deepspeed_base.files import FOLDER, Collected, Files
from snapstone.integrations.deepspeed_base.stub import is_stub, mend, write_stubs

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
        (staging,) = (run_directory / "global_step4").glob(".staging-*")
        os.utime(staging, (0, 0))  # killed at the rename, it has no owner, and is taken for dead ten minutes later
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
        assert result["left"] == [], "what the killed save wrote"
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


@pytest.mark.parametrize("stage", STAGES)
def test_ranks_that_cannot_save_or_do_not_agree_fail_together(directory: Path, stage: int) -> None:
    first, second = results(directory, stage)
    assert first["locked"].startswith("TypeError: lock: cannot store a lock")
    assert "RankFailedError" in second["locked"]
    assert "rank 0 failed: TypeError: lock" in second["locked"]
    assert first["apart"].startswith("ValueError: ranks 0 and 1 save different checkpoints")
    assert second["apart"].startswith("ValueError: ranks 0 and 1 save different checkpoints")


@pytest.mark.parametrize("stage", STAGES)
def test_a_save_returns_at_the_snapshot_and_latest_follows_the_commit(directory: Path, stage: int) -> None:
    for result in results(directory, stage):
        assert (result["early"], result["in time"]) == ("noted", "late")
        assert result["late"] == [True, True], "trained on; loaded through names that a crash left unfinished"
        assert "holds files of two saves" in result["mixed"]
    assert (directory / f"policy-{stage}" / "latest").read_text() == "last", "the interpreter waits for saves at exit"


def committed(directory: Path, names: list[str]) -> Files:
    collected = Collected()
    for name in names:
        collected.add(name, {"weight": torch.arange(3), "name": name})
    ss.save(collected.state(None), checkpoint_id=directory / FOLDER, overwrite=True)
    return Files(directory)


def killed_at_rename(number: int) -> pytest.MonkeyPatch:
    replace, left = os.replace, [number]

    def until(source: str, target: str) -> None:
        left[0] -= 1
        if left[0] <= 0:
            raise KeyboardInterrupt
        replace(source, target)

    patch = pytest.MonkeyPatch()
    patch.setattr(os, "replace", until)
    return patch


def test_a_crash_between_commit_and_names_never_leaves_files_of_two_saves_that_load(tmp_path: Path) -> None:
    names = ["a.pt", "b.pt", "c.pt"]
    for crash in (2, 3, 4):  # the first one is of the note that stock files go
        for name in names:
            (tmp_path / name).write_bytes(b"stock")
        committed(tmp_path, names)
        patch = killed_at_rename(crash)
        with pytest.raises(KeyboardInterrupt):
            write_stubs(str(tmp_path))
        patch.undo()
        assert not any((tmp_path / name).exists() and not is_stub(tmp_path / name) for name in names)
        assert not all((tmp_path / name).exists() for name in names)
        mend(str(tmp_path))
        assert [torch.load(tmp_path / name, weights_only=False)["name"] for name in names] == names
        assert sorted(path.name for path in tmp_path.iterdir()) == [*names, FOLDER]


def test_names_that_a_save_by_fewer_ranks_does_not_have_go(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_bytes(b"mine")
    committed(tmp_path, ["a.pt", "b.pt", "c.pt"])
    write_stubs(str(tmp_path))
    committed(tmp_path, ["a.pt", "b.pt"])  # and killed
    for name in ("a.pt", "c.pt"):
        with pytest.raises(IncompatibleCheckpointError, match="stands for save"):
            torch.load(tmp_path / name, weights_only=False)
    mend(str(tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.pt", "b.pt", "notes.txt", FOLDER]
    assert torch.load(tmp_path / "a.pt", weights_only=False)["name"] == "a.pt"


def test_stock_files_that_may_be_of_a_later_save_stay(tmp_path: Path) -> None:
    committed(tmp_path, ["a.pt", "b.pt"])
    for name in ("a.pt", "b.pt"):
        (tmp_path / name).write_bytes(b"stock")
    mend(str(tmp_path))
    (tmp_path / "a.pt").unlink()  # by somebody who needs no more
    mend(str(tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b.pt", FOLDER]
    assert (tmp_path / "b.pt").read_bytes() == b"stock"


def test_a_checkpoint_that_names_files_elsewhere_writes_none(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not within the directory"):
        Collected().add("../outside.pt", {})
    for name in ("../outside.pt", "/tmp/outside.pt", "a/../b.pt", "snapstone/MANIFEST.json", ""):
        where = tmp_path / "of" / "tag"
        ss.save({"deepspeed": {name: "{}"}}, checkpoint_id=where / FOLDER, overwrite=True)
        for write in (write_stubs, mend):
            with pytest.raises(CorruptCheckpointError, match="is no name of a file in it"):
                write(str(where))
        assert [path.name for path in where.iterdir()] == [FOLDER]
    assert not (tmp_path / "of" / "outside.pt").exists()


def test_another_version_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "version", lambda package: "0.20.1")
    with pytest.raises(versions.UnsupportedVersionError, match=r"deepspeed 0\.20\.1 .* >= 0\.19, < 0\.20"):
        versions.require("deepspeed", "0.19", "0.20")
