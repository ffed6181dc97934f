"""A measurement finds what was planted in the row where it belongs, and gives no time to an engine that fails.

All engines with a fault run in one measurement on two ranks, which every test below reads.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.conftest import Bench, measure, memory_directory, pinned_packages
from bench.planted import PLANTED_SECONDS, FilesOfDeepSpeed
from snapstone.bench import results
from snapstone.bench.engines import NAMES, engine_class
from snapstone.bench.results import LEDGER_ROWS, Cadence, Document, EngineResult

pytestmark = pytest.mark.timeout(300)  # LIMIT_SECONDS of conftest.py, and what starts and ends

PLANTED = {
    "calls": "SleepsInCall",
    "fences": "SleepsInFence",
    "finishes": "SleepsInFinish",
    "completes": "SleepsInComplete",
    "holds": "HoldsTheInterpreter",
    "slow": "Slow",
    "torn": "Torn",
    "raises": "Raises",
    "raises-dcp": "RaisesLikeDcp",
    "exits": "Exits",
    "skips": "Skips",
}


FAILING = {"torn", "raises", "raises-dcp", "exits"}


@pytest.fixture(scope="module")
def planted() -> Iterator[Document]:
    engines = ",".join(f"{name}=planted:{kind}" for name, kind in PLANTED.items())
    with memory_directory() as directory:
        done = measure(
            Path(directory),
            *("stall", "--model", "tiny", "--state-only", "--step-seconds", 0.02, "--engine", engines),
            *("--saves", 2, "--pairs", 2, "--checks", 1, "--kills", 0, "--out", directory),
            ranks=2,
        )
        assert done.returncode != 0, done.stderr  # engines failed
        yield results.read(Path(directory) / "stall-tiny.json")


def engine_of(document: Document, name: str) -> EngineResult:
    return next(engine for engine in document["engines"] if engine["name"] == name)


def cadence_of(document: Document, engine: str, cadence: str) -> Cadence:
    return next(one for one in engine_of(document, engine)["cadences"] if one["name"] == cadence)


def rows_of(cadence: Cadence) -> dict[str, float]:
    """Median seconds per save."""
    return {row: statistics.median(seconds) for row, seconds in cadence["ledger"].items()}  # type: ignore[type-var]


def assert_found_in(cadence: Cadence, row: str) -> None:
    rows = rows_of(cadence)
    assert rows[row] >= 0.6 * PLANTED_SECONDS, rows
    others = {name: seconds for name, seconds in rows.items() if name not in (row, "unexplained")}
    assert max(others.values()) < 0.5 * PLANTED_SECONDS, rows


def test_sleep_in_the_call_is_found_in_the_call(planted: Document) -> None:
    assert_found_in(cadence_of(planted, "calls", "relaxed"), "call")


def test_sleep_in_the_fence_is_found_in_the_fence(planted: Document) -> None:
    assert_found_in(cadence_of(planted, "fences", "relaxed"), "fence")


def test_sleep_in_the_finalizer_is_found_in_finalize(planted: Document) -> None:
    assert_found_in(cadence_of(planted, "finishes", "relaxed"), "finalize")


def test_work_that_ends_a_save_is_found_where_the_training_thread_waits_for_it(planted: Document) -> None:
    """Of two saves the first is ended before the second begins, and the second in the drain."""
    rows = rows_of(cadence_of(planted, "completes", "relaxed"))
    for row in ("wait_previous", "finalize"):
        assert 0.9 * PLANTED_SECONDS / 2 <= rows[row] < 1.5 * PLANTED_SECONDS, rows
    assert max(rows["call"], rows["fence"]) < 0.4 * PLANTED_SECONDS, rows


def test_interpreter_lock_held_in_the_background_is_found_as_inflation(planted: Document) -> None:
    assert_found_in(cadence_of(planted, "holds", "relaxed"), "inflation")


def test_background_work_in_nobodys_way_costs_only_a_save_that_comes_too_early(planted: Document) -> None:
    relaxed, tight = (rows_of(cadence_of(planted, "slow", name)) for name in ("relaxed", "tight"))
    assert relaxed["wait_previous"] < 0.4 * PLANTED_SECONDS
    assert tight["wait_previous"] > 0.1 * PLANTED_SECONDS
    assert statistics.median(cadence_of(planted, "slow", "relaxed")["durable_seconds"]) >= PLANTED_SECONDS


def test_ledger_adds_up_to_the_stall(planted: Document) -> None:
    cadences = [cadence for engine in planted["engines"] for cadence in engine["cadences"]]
    assert len(cadences) == 2 * (len(PLANTED) - len(FAILING))
    for cadence in cadences:
        assert len(cadence["stall_seconds"]) == 2
        columns: dict[str, list[float]] = cadence["ledger"]  # type: ignore[assignment]
        for pair, stall in enumerate(cadence["stall_seconds"]):
            assert sum(columns[row][pair] for row in LEDGER_ROWS) == pytest.approx(stall, abs=1e-9)


def test_an_engine_that_saves_a_later_state_fails_and_gets_no_time(planted: Document) -> None:
    torn = engine_of(planted, "torn")
    assert torn["status"] == "failed"
    assert torn["reason"] is not None
    assert "step-00000001 is not what was saved: 84 of 84 tensors differ" in torn["reason"]
    assert torn["truth"]["failures"]
    assert (torn["cadences"], torn["first_save"], torn["steps"]) == ([], None, [])


@pytest.mark.parametrize(
    ("name", "error"),
    [("raises", "No space left on device"), ("raises-dcp", "CheckpointException"), ("exits", "cannot go on")],
)
def test_an_engine_that_raises_fails_with_its_error(planted: Document, name: str, error: str) -> None:
    raising = engine_of(planted, name)
    assert raising["status"] == "failed"
    assert raising["reason"] is not None
    assert error in raising["reason"]
    assert raising["cadences"] == []


def test_skipped_saves_are_counted(planted: Document) -> None:
    assert cadence_of(planted, "skips", "relaxed")["skipped"] == 2
    assert cadence_of(planted, "calls", "relaxed")["skipped"] == 0


def test_a_measurement_says_where_and_how_it_was_made(planted: Document) -> None:
    assert planted["complete"]
    assert planted["problems"] == ["only 2 pairs: 5 are the least for a spread"]
    assert planted["environment"]["world"] == {"ranks": 2, "nodes": 1, "backend": "gloo"}
    assert planted["workload"]["parallelism"] == "ddp 2"
    assert planted["workload"]["nbytes"] == planted["workload"]["nbytes_of_rank"][1]
    engine = engine_of(planted, "calls")
    assert engine["first_save"] is not None
    assert engine["first_save"]["call"] >= PLANTED_SECONDS
    assert engine["changed_plan_save"] is not None
    assert {span["rank"] for span in engine["timeline"]} == {0, 1}
    assert sum(step["saving"] for step in engine["steps"]) == 2


def test_every_installed_engine_saves_the_truth(tmp_path: Path) -> None:
    """FSDP2 on two ranks, a real optimizer. Absent may be what needs CUDA and what constraints.txt does not pin."""
    engines = "all,deepspeed-files=planted:FilesOfDeepSpeed"
    with memory_directory() as directory:
        done = measure(
            tmp_path,
            *("stall", "--model", "tiny", "--engine", engines, "--fsdp", 2, "--cadence", "tight", "--dir", directory),
            *("--saves", 2, "--pairs", 1, "--checks", 1, "--kills", 0, "--out", tmp_path),
            ranks=2,
        )
    assert done.returncode == 0, done.stdout + done.stderr
    document = results.read(tmp_path / "stall-tiny.json")
    assert document["complete"]
    installed = pinned_packages() | {"torch", "snapstone"}
    for engine in document["engines"]:
        kind = engine_class(engine["name"]) if engine["name"] in NAMES else FilesOfDeepSpeed
        if kind.needs_cuda:
            expected = {"absent"}
        else:
            expected = {"measured"} if kind.distribution in installed else {"measured", "absent"}
        assert engine["status"] in expected, engine
        assert (engine["reason"] is None) == (engine["status"] == "measured")
        assert engine["truth"]["failures"] == []
        assert len(engine["cadences"]) == (engine["status"] == "measured")


def test_replicas_are_written_by_one_rank_each_and_a_kill_leaves_the_save_before(tmp_path: Path) -> None:
    """Megatron's plan for tensors that all ranks hold, kept over the saves, and its mark of a whole checkpoint."""
    with memory_directory() as directory:
        done = measure(
            tmp_path,
            *("stall", "--model", "tiny", "--engine", "megatron-async", "--cadence", "tight", "--dir", directory),
            *("--saves", 2, "--pairs", 1, "--checks", 2, "--kills", 1, "--seed", 3, "--out", tmp_path),
            ranks=2,
        )
    assert done.returncode == 0, done.stdout + done.stderr
    (engine,) = results.read(tmp_path / "stall-tiny.json")["engines"]
    assert (engine["status"], engine["truth"]) == ("measured", {"checks": 2, "failures": [], "kills": 1})


def test_a_killed_rank_unmasks_a_checkpoint_that_only_looks_complete(tmp_path: Path) -> None:
    done = measure(
        tmp_path,
        *("stall", "--model", "tiny", "--engine", "hasty=planted:Hasty,snapstone,torch-save", "--cadence", "tight"),
        *("--saves", 1, "--pairs", 1, "--checks", 0, "--kills", 1, "--seed", 1, "--out", tmp_path),
    )
    assert done.returncode == 1, done.stderr
    document = results.read(tmp_path / "stall-tiny.json")
    hasty = engine_of(document, "hasty")
    assert hasty["status"] == "failed"
    assert hasty["reason"] is not None
    assert "after kill -9 of a rank: step-00000002 cannot be loaded" in hasty["reason"]
    for name in ("snapstone", "torch-save"):
        assert engine_of(document, name)["status"] == "measured"
        assert engine_of(document, name)["truth"]["kills"] == 1


def test_a_rank_that_dies_leaves_what_was_measured(tmp_path: Path) -> None:
    done = measure(
        tmp_path,
        *("stall", "--model", "tiny", "--state-only", "--step-seconds", 0.01, "--cadence", "relaxed"),
        *("--engine", "honest=planted:Honest,dies=planted:Dies,torch-save", "--interval-steps", 2),
        *("--saves", 1, "--pairs", 4, "--checks", 0, "--kills", 0, "--out", tmp_path),
        ranks=2,
    )
    assert done.returncode != 0
    document = results.read(tmp_path / "stall-tiny.json")
    assert not document["complete"]
    assert len(document["problems"]) == 2, document["problems"]
    states = {engine["name"]: engine["status"] for engine in document["engines"]}
    assert states == {"honest": "measured", "dies": "partial", "torch-save": "partial"}
    assert 0 < len(engine_of(document, "dies")["cadences"][0]["stall_seconds"]) < 4


def test_an_interrupt_leaves_what_was_measured(bench: Bench, tmp_path: Path) -> None:
    done = bench(
        *("stall", "--model", "tiny", "--state-only", "--step-seconds", 0.05, "--engine", "torch-save"),
        *("--saves", 2, "--pairs", 1000, "--checks", 0, "--kills", 0, "--out", tmp_path),
        interrupt_when=lambda: '"stall_seconds": [\n' in text_of(tmp_path / "stall-tiny.json"),
    )
    assert done.returncode == 130, done.stderr
    document = results.read(tmp_path / "stall-tiny.json")
    assert (document["complete"], document["problems"]) == (False, ["interrupted"])
    assert engine_of(document, "torch-save")["status"] == "partial"
    assert 0 < len(engine_of(document, "torch-save")["cadences"][0]["stall_seconds"]) < 1000
    assert not list(tmp_path.glob(".bench-*"))


def text_of(path: Path) -> str:
    return path.read_text() if path.exists() else ""
