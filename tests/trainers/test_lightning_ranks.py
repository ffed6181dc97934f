"""Lightning jobs in processes of their own: killed within an asynchronous save, resumed, resharded; measured."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import snapstone as ss

JOB = Path(__file__).with_name("lightning_job.py")
RANKS = {"single": 1, "ddp": 2, "mp": 2, "fsdp": 2}


def run(what: str, strategy: str, directory: Path, ranks: int) -> tuple[int, str]:
    """Exit status and output of the job. It is killed with everything that it started when it takes too long."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    command = [sys.executable, *launcher, str(JOB), what, "--strategy", strategy, "--dir", str(directory)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        process_group=0,
    ) as process:
        try:
            output, _ = process.communicate(timeout=100)
        except BaseException:
            os.killpg(process.pid, 9)
            raise
    return process.returncode, output


def results(directory: Path, ranks: int) -> list[dict[str, Any]]:
    return [json.loads((directory / f"result-{rank}.json").read_text()) for rank in range(ranks)]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The directory of a job that was killed within its second save and resumed; once for all tests."""

    @functools.cache
    def directory(strategy: str) -> Path:
        where = tmp_path_factory.mktemp(strategy)
        code, output = run("killed", strategy, where, RANKS[strategy])
        assert "SIGKILL" in output or code == -9, output
        assert sorted(path.name for path in (where / "run").glob("step=*")) == ["step=2.ckpt"]
        assert list((where / "run").glob(".staging-*")), "it was not killed within a save"
        assert os.readlink(where / "run" / "last.ckpt") == "step=2.ckpt"
        code, output = run("resumed", strategy, where, RANKS[strategy])
        assert code == 0, output
        return where

    return directory


@pytest.mark.timeout(300)
@pytest.mark.parametrize("strategy", RANKS)
def test_killed_in_an_asynchronous_save_and_resumed_it_ends_as_if_nothing_had_been(
    finished: Callable[[str], Path], strategy: str
) -> None:
    directory = finished(strategy)
    found = results(directory, RANKS[strategy])
    for rank, result in enumerate(found):
        assert result["resumed"] == result["straight"] != result["straight_at_2"], f"rank {rank}"
        assert result["loaded_rank"] == (0 if strategy == "ddp" else rank)  # DDP saves the loader of rank 0
    for name in ("step=2.ckpt", "step=4.ckpt", "step=6.ckpt"):
        assert ss.verify(directory / "run" / name)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("strategy", ["mp", "fsdp"])
def test_shards_go_on_in_one_process_in_a_whole_model_and_back_in_stock_lightning(
    finished: Callable[[str], Path], strategy: str
) -> None:
    directory = finished(strategy)
    if strategy == "mp":
        assert all(result["from_stock"] == result["stock"] for result in results(directory, 2))
    code, output = run("resharded", strategy, directory, 1)
    assert code == 0, output


def test_the_measurement_runs_and_keeps_every_sample(tmp_path: Path) -> None:
    script = JOB.parents[2] / "benchmarks" / "trainers" / "lightning_run.py"
    places = ["--directory", str(tmp_path / "work"), "--results", str(tmp_path / "results")]
    done = subprocess.run(
        [sys.executable, str(script), "--quick", *places], capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert list((tmp_path / "work").iterdir()) == []
    (path,) = (tmp_path / "results").glob("quick-lightning_*.json")
    document = json.loads(path.read_text())
    assert document["command"] == "python benchmarks/trainers/lightning_run.py --quick"
    assert {"cpu", "kernel", "file_system"} <= document["machine"].keys()
    assert set(document["contenders"]) == {"none", "stock", "stock-async", "snapstone"}
    for name, entry in document["contenders"].items():
        samples = entry["samples"]
        assert [len(samples[kind]) for kind in ("stall_seconds", "step_seconds", "drain_seconds")] == [1, 1, 1]
        assert len(samples["step_seconds"][0]) == 2
        assert (samples["stall_seconds"][0] > 0.001) == (name != "none")
