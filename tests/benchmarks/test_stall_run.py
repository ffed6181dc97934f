"""`make readme-bench` on a tiny state: one document of all engines, whatever some of them do."""

from __future__ import annotations

import getpass
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

import snapstone
from snapstone.bench import results
from snapstone.bench.results import Document

TESTS = Path(__file__).resolve().parents[1]
BENCHMARKS = TESTS.parent / "benchmarks"


def stall_run(directory: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Documents go to directory/results, checkpoints below `directory`."""
    paths = [str(Path(snapstone.__file__).parents[1]), str(TESTS / "bench")]
    command = [sys.executable, str(BENCHMARKS / "stall_run.py"), "--model", "tiny", *map(str, arguments)]
    places = ["--directory", str(directory), "--results", str(directory / "results")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    return subprocess.run(
        [*command, *places], env=environment, cwd=TESTS, capture_output=True, text=True, timeout=280, check=False
    )


def sleepers() -> list[int]:
    return [one.pid for one in psutil.process_iter(["cmdline"]) if one.info["cmdline"] == ["sleep", "987654"]]


@pytest.fixture(scope="module")
def document(tmp_path_factory: pytest.TempPathFactory) -> Document:
    """An engine that dies between two that do not, and one that is absent."""
    directory = tmp_path_factory.mktemp("stall")
    done = stall_run(directory, "--pairs", 3, "--engine", "snapstone,dies=planted:Dies,dcp-pinned,torch-save")
    assert done.returncode == 0, done.stdout + done.stderr
    assert [path.name for path in directory.iterdir()] == ["results"], "the run left something behind"
    (found,) = (directory / "results").glob("partial-stall_*/stall-2gb.json")
    return results.read(found)


pytestmark = pytest.mark.timeout(300)


def test_engines_that_die_or_are_absent_leave_the_others_measured(document: Document) -> None:
    engines = {engine["name"]: engine for engine in document["engines"]}
    states = {name: engine["status"] for name, engine in engines.items()}
    assert states == {"snapstone": "measured", "dies": "partial", "dcp-pinned": "absent", "torch-save": "measured"}
    for name in ("snapstone", "torch-save"):
        (cadence,) = engines[name]["cadences"]
        assert (cadence["name"], len(cadence["stall_seconds"])) == ("relaxed", 3)
        assert engines[name]["truth"] == {"checks": 1, "failures": [], "kills": 1}
    assert not document["complete"]
    assert "dies: not measured to the end" in document["problems"]


def test_the_document_says_on_what_and_how_it_was_measured(document: Document) -> None:
    assert document["workload"]["parallelism"] == "fsdp 2"
    assert document["workload"]["step_seconds"] is not None
    assert (document["protocol"]["pairs"], document["protocol"]["saves_per_block"]) == (3, 1)
    assert document["command"][:2] == ["python", "benchmarks/stall_run.py"]


def test_the_document_names_neither_host_nor_user_nor_the_repository(document: Document) -> None:
    text = str(document)
    assert not re.search(rf"{re.escape(str(TESTS.parent))}|{re.escape(sys.prefix)}/", text)
    assert socket.gethostname() not in text
    if getpass.getuser() != "root":
        assert getpass.getuser() not in text


def test_an_engine_that_hangs_is_ended_with_everything_it_started(tmp_path: Path) -> None:
    """Without a measured engine there is nothing to store."""
    before = sleepers()
    done = stall_run(tmp_path, "--engine", "hangs=planted:Hangs", "--ranks", 1, "--limit", 40)
    assert done.returncode == 1
    assert "hangs: failed, no end after 40 s" in done.stdout
    assert "no engine left a result" in done.stderr
    assert "the save begins" in (tmp_path / "bench-stall" / "logs" / "hangs.txt").read_text()
    assert sleepers() == before
    assert not (tmp_path / "results").exists()
