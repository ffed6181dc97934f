"""The demo at its smallest: the same orchestrator, processes, kill and checks as at full size, in well under 90 s; once
with snapstone's calls, once with calls of torch.distributed.checkpoint alone, on snapstone's storage.

Invariants, read from the logs that the workers wrote, not only from what the demo says of itself:
a run killed in the middle of a save and resumed has, at every step and on every rank, the loss of the run that was
never killed, as exact text, and ends with the same bits; the save that was killed is never taken for a checkpoint.
"""

from __future__ import annotations

import importlib
import json
import math
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
RANKS = (0, 1)
STEPS = 40
SAVE_EVERY = 5


@dataclass
class Run:
    directory: Path
    process: subprocess.CompletedProcess[str]
    report: dict[str, Any]

    def losses(self, name: str, rank: int) -> dict[int, str]:
        """Step -> loss; a line that the kill cut short has no newline and does not count."""
        lines = (self.directory / "logs" / f"{name}.rank-{rank}.losses").read_text().split("\n")[:-1]
        return {int(step): loss for step, loss in map(str.split, lines)}

    def facts(self, name: str, rank: int = 0) -> dict[str, Any]:
        facts: dict[str, Any] = json.loads((self.directory / "logs" / f"{name}.rank-{rank}.json").read_text())
        return facts


@pytest.fixture(scope="module", params=["snapstone", "snapstone.dcp"])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    directory = tmp_path_factory.mktemp("demo") / "run"
    command = [sys.executable, str(EXAMPLES / "demo.py"), "--scale", "quick", "--directory", str(directory)]
    command += ["--engine", request.param]
    process = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=110)
    assert (directory / "report.json").exists(), process.stdout
    return Run(directory, process, json.loads((directory / "report.json").read_text()))


def test_every_check_passes_without_a_traceback(run: Run) -> None:
    assert run.process.returncode == 0, run.process.stdout
    assert "Traceback" not in run.process.stdout
    assert run.report["failure"] == ""
    assert len(run.report["checks"]) >= 12
    assert [promise for promise, kept in run.report["checks"].items() if not kept] == []


@pytest.mark.parametrize("rank", RANKS)
def test_killed_and_resumed_run_has_the_losses_of_the_undisturbed_one(run: Run, rank: int) -> None:
    reference = run.losses("reference", rank)
    resumed = run.losses("resumed", rank)
    first = run.report["facts"]["resumed_from_step"] + 1
    assert list(reference) == list(range(1, STEPS + 1))
    assert list(resumed) == list(range(first, STEPS + 1))
    assert resumed == {step: reference[step] for step in resumed}
    killed = run.losses("killed", rank)
    assert killed == {step: reference[step] for step in killed}
    assert len(set(reference.values())) == STEPS  # it did train, and dropout and data did vary


@pytest.mark.parametrize("rank", RANKS)
def test_killed_and_resumed_run_ends_with_the_same_weights_and_moments(run: Run, rank: int) -> None:
    for digest in ("shards", "weights"):
        assert run.facts("resumed", rank)[digest] == run.facts("reference", rank)[digest]


def test_kill_interrupts_a_save_and_the_one_before_is_resumed(run: Run) -> None:
    facts = run.report["facts"]
    assert len(facts["leftovers"]) == 1
    assert facts["leftovers"][0].startswith(".staging-")
    assert facts["resumed_from_step"] % SAVE_EVERY == 0
    assert facts["resumed_from_step"] < facts["killed_at_step"] + 1 < STEPS


def test_one_process_reads_the_weights_that_two_wrote(run: Run) -> None:
    sample = run.facts("sample")
    assert sample["weights"] == run.facts("reference")["weights"]
    assert len(sample["text"]) > 20


def test_table_has_a_time_of_every_kind_for_both_engines(run: Run) -> None:
    table = run.report["table"]
    assert set(table) == {run.report["engine"], "dcp"}
    kinds = {"stall_s", "step_s", "plain_step_s", "async_durable_s", "save_durable_s", "load_s"}
    for rounds in table.values():
        assert rounds
        for times in rounds:
            assert set(times) == kinds | {"stored_bytes"}
            assert all(0 < times[kind] < 60 for kind in kinds)


def test_one_wrong_bit_in_one_loss_fails_the_comparison(monkeypatch: pytest.MonkeyPatch) -> None:
    demo = load_demo(monkeypatch)
    reference = {1: [(2.5).hex(), (2.25).hex()], 2: [(2.0).hex(), (1.75).hex()]}
    assert demo.is_part_of({2: reference[2]}, reference)
    assert not demo.is_part_of({2: [(2.0).hex(), math.nextafter(1.75, 2.0).hex()]}, reference)
    assert not demo.is_part_of({3: reference[2]}, reference)
    assert not demo.is_part_of({}, reference)


def test_a_directory_that_the_demo_did_not_make_is_not_wiped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "thesis.txt").write_text("the only copy")
    with pytest.raises(SystemExit, match="not made by this demo"):
        load_demo(monkeypatch).prepare_directory(tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "the only copy"


def load_demo(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(EXAMPLES)
    return importlib.import_module("demo")
