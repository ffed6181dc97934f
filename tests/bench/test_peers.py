"""Engines of other projects pass the same checks as everybody, on bfloat16 weights that two ranks share: what new
processes load is bit for bit what was saved, though the optimizer stepped at once, and after a kill -9 of a rank in
the middle of a save the newest checkpoint that bears the engine's mark is one of the two that were saved.

All run in one measurement, which every test below reads. What is not installed is skipped, unless constraints.txt pins
it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from bench.conftest import measure, memory_directory, pinned_packages
from bench.shims import NvidiaResiliencyOnCpu
from snapstone.bench import results
from snapstone.bench.engines import Engine, engine_class
from snapstone.bench.engines.moonclip import Moonclip
from snapstone.bench.results import EngineResult

pytestmark = pytest.mark.timeout(300)  # LIMIT_SECONDS of conftest.py, and what starts and ends

NAMES = ("moonclip", "moonclip-raw", "orbax", "bytecheckpoint")
SHIMMED = "nvidia-resiliency-on-cpu"


@pytest.fixture(scope="module")
def measured() -> Iterator[Mapping[str, EngineResult]]:
    engines = ",".join((*NAMES, f"{SHIMMED}=shims:{NvidiaResiliencyOnCpu.__name__}"))
    with memory_directory() as directory:
        done = measure(
            Path(directory),
            *("stall", "--model", "tiny", "--fsdp", 2, "--precision", "bf16", "--engine", engines),
            *("--cadence", "tight", "--saves", 6, "--pairs", 1, "--checks", 2, "--kills", 1, "--out", directory),
            ranks=2,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        document = results.read(Path(directory) / "stall-tiny.json")
        assert document["complete"]
        yield {engine["name"]: engine for engine in document["engines"]}


@pytest.mark.parametrize("name", [*NAMES, SHIMMED])
def test_a_peer_saves_the_truth_also_when_a_rank_is_killed(measured: Mapping[str, EngineResult], name: str) -> None:
    kind: type[Engine] = NvidiaResiliencyOnCpu if name == SHIMMED else engine_class(name)
    engine = measured[name]
    if engine["status"] == "absent":
        assert kind.distribution not in pinned_packages(), engine["reason"]
        pytest.skip(str(engine["reason"]))
    assert (engine["status"], engine["reason"]) == ("measured", None)
    assert engine["truth"] == {"checks": 2, "failures": [], "kills": 1}
    assert engine["version"]
    assert len(engine["cadences"][0]["durable_seconds"]) == 6
    assert engine["cadences"][0]["skipped"] == 0


def test_every_peer_says_which_options_it_runs_with_and_why(measured: Mapping[str, EngineResult]) -> None:
    for engine in measured.values():
        assert engine["options"]
        assert all(option["name"] and option["value"] and option["why"] for option in engine["options"])


def test_an_engine_whose_dependency_is_missing_is_absent_with_its_name() -> None:
    class Needy(Moonclip):
        module = "snapstone"
        needs = ("no_such_module",)

    assert Needy.absent("cpu") == "no_such_module, which moonclip needs, is not installed"
