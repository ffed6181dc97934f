"""The rows under torch.distributed.checkpoint: a quick run measures both storages, and a wrong bit gets no time."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
ROWS = ("save", "async-thread", "async-process", "load-same", "load-rows", "load-columns", "read-once")
MEASURES = {"save": ("save",), "async": ("save", "call", "stall"), "load": ("load",), "read": ("load",)}
README = "# snapstone\n\n<!-- stall:begin -->\n<!-- stall:end -->\n<!-- bench:begin -->\n<!-- bench:end -->\n"
PAGE = "# Benchmarks\n\n<!-- bench:begin -->\n<!-- bench:end -->\n"


@pytest.fixture(autouse=True)
def _benchmarks_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *map(str, arguments)], capture_output=True, text=True, timeout=110, check=False
    )


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("bench")
    places = ("--directory", directory / "work", "--results", directory / "results")
    done = run(BENCHMARKS / "run.py", "--quick", "--dcp", ",".join(ROWS), *places)
    assert done.returncode == 0, done.stderr
    assert list((directory / "work").iterdir()) == [], "the run left checkpoints behind"
    (found,) = (directory / "results").iterdir()
    return found


@pytest.fixture(scope="module")
def rows(result: Path) -> dict[str, dict[str, Any]]:
    return {row["row"]: row for row in json.loads(result.read_text())["dcp"]}


def measured(row: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The contenders of a row, but for what this version does not have."""
    entries = {name: entry for name, entry in row["engines"].items() if not entry["unavailable"]}
    for name, entry in entries.items():
        assert entry["skipped"] is None, f"{name}: {entry['skipped']}"
    return entries


def test_a_full_run_has_every_row() -> None:
    parse = importlib.import_module("run").parse
    assert tuple(parse([]).dcp) == ROWS
    assert parse(["--only", "limit"]).dcp == []
    assert parse(["--dcp", "save"]).states == []


@pytest.mark.parametrize("name", ROWS)
def test_every_contender_is_verified_and_timed(name: str, rows: dict[str, dict[str, Any]]) -> None:
    row = rows[name]
    entries = measured(row)
    assert {entry["role"] for entry in entries.values()} >= {"reference"}
    assert {entry["storage"] for entry in entries.values()} >= {"snapstone"}
    for entry in entries.values():
        assert entry["verified"], entry["label"]
        for measure in MEASURES[name.partition("-")[0]]:
            samples = entry["samples"][f"{measure}_seconds"]
            assert len(samples) == row["rounds"] == 1
            assert min(samples) > 0


@pytest.mark.parametrize("name", ROWS[:-1])
def test_stock_and_snapstone_meet_on_the_same_state(name: str, rows: dict[str, dict[str, Any]]) -> None:
    assert {entry["storage"] for entry in measured(rows[name]).values()} == {"stock", "snapstone"}
    assert {(row["nbytes"], row["tensors"]) for row in rows.values()} == {(rows["save"]["nbytes"], 99)}


@pytest.mark.parametrize("name", ["async-thread", "async-process"])
def test_the_call_ends_before_the_stall_and_the_stall_before_the_save(
    name: str, rows: dict[str, dict[str, Any]]
) -> None:
    for entry in measured(rows[name]).values():
        samples = entry["samples"]
        assert samples["call_seconds"][0] <= samples["stall_seconds"][0] < samples["save_seconds"][0]


@pytest.mark.parametrize("name", ["load-same", "load-rows", "load-columns", "read-once"])
def test_counted_bytes_are_at_least_the_state_and_at_most_the_state_per_rank(
    name: str, rows: dict[str, dict[str, Any]]
) -> None:
    """At this size indexes and the ends of chunks weigh as much as a tenth of the state, and zip headers more."""
    row = rows[name]
    comparisons = importlib.import_module("drop_in.comparisons")
    for engine, entry in measured(row).items():
        nbytes = comparisons.counted_bytes(row, engine)
        if nbytes is None:
            assert entry["bytes_counted_by"] is None, "a counter was named"
            continue
        assert nbytes > 0.99 * row["nbytes"], entry["label"]
        if entry["storage"] == "snapstone":
            assert nbytes < 1.5 * row["ranks"] * row["nbytes"], entry["label"]


def test_ratios_are_of_the_fastest_on_each_side(result: Path, rows: dict[str, dict[str, Any]]) -> None:
    engines = rows["save"]["engines"]
    seconds = {name: engines[name]["samples"]["save_seconds"][0] for name in engines}
    ratio = min(seconds["stock"], seconds["stock-2"]) / seconds["snapstone"]
    verdicts = {verdict["what"]: verdict for verdict in json.loads(result.read_text())["targets"]}
    assert verdicts["dcp.save"]["got"] == f"{ratio:.2f}x"
    assert verdicts["dcp.save"]["wanted"] == ">= 1.8x"
    assert verdicts["dcp.save"]["passed"] is (ratio >= 1.8)


def test_what_a_run_did_not_measure_is_neither_met_nor_missed() -> None:
    compare = importlib.import_module("drop_in.comparisons").compare
    assert {(one.got_text, one.passed) for one in compare([])} == {("not measured", None)}


def test_the_page_shows_ratio_target_and_verdict_of_each_row(result: Path, tmp_path: Path) -> None:
    readme, page = tmp_path / "README.md", tmp_path / "page.md"
    readme.write_text(README)
    page.write_text(PAGE)
    done = run(BENCHMARKS / "readme_table.py", "--readme", readme, "--page", page, "--result", result)
    assert done.returncode == 0, done.stderr
    text = page.read_text()
    assert re.search(r"^\| dcp\.save \| \d+\.\d\dx \| >= 1\.8x \| (met|missed) \| .*snapstone \| .*stock", text, re.M)
    assert len(re.findall(r"^\| .*(\| >= |\| <= |\| - \| - ).*$", text, re.MULTILINE)) == 8


# The harness itself ---------------------------------------------------------------------------------------------------


@pytest.fixture
def crew(_benchmarks_on_path: None) -> Iterator[Any]:
    """Two ranks, each with half of the rows of a small state."""
    with importlib.import_module("drop_in.crew").Crew(2) as found:
        found.call("build", 64, 0)
        yield found


def interleaved(step: Any) -> Any:
    """The entry of a contender whose warm-up is `step`, beside one that does nothing."""
    rows, interleave = importlib.import_module("drop_in.rows"), importlib.import_module("drop_in.interleave")
    row = rows.Row("load-rows", "a row", "load", (rows.BY_STOCK, rows.BY_SNAPSTONE))
    entries = {one.name: interleave.Entry(one.label, one.storage, one.role, None) for one in row.contenders}

    def warm_up(contender: Any) -> None:
        if contender is rows.BY_SNAPSTONE:
            step()

    def timed(contender: Any) -> dict[str, float]:
        return {"load_seconds": 1.0}

    interleave.interleave(
        row.title, row.contenders, entries, 2, warm_up=warm_up, step=timed, scrub={str(BENCHMARKS): "HERE"}
    )
    assert entries["stock"].samples == {"load_seconds": [1.0, 1.0]}
    return entries["snapstone"]


def test_ranks_that_hold_other_bits_are_found_out(crew: Any) -> None:
    assert crew.call("differences") == [[], []]
    crew.call("clear")
    assert [len(names) for names in crew.call("differences")] == [99, 99]


def test_a_contender_whose_check_fails_gets_no_time_and_names_no_path() -> None:
    def fail() -> None:
        raise RuntimeError(f"1 of 99 tensors came back different in {BENCHMARKS}")

    entry = interleaved(fail)
    assert entry.skipped == "1 of 99 tensors came back different in HERE"
    assert (entry.verified, entry.unavailable, entry.samples) == (False, False, {})


def test_what_a_rank_raises_reaches_the_caller_and_the_ranks_go_on(crew: Any, tmp_path: Path) -> None:
    failed, rows = importlib.import_module("drop_in.crew").WorkFailed, importlib.import_module("drop_in.rows")
    with pytest.raises(failed, match="CheckpointException"):
        crew.call("load", rows.BY_SNAPSTONE, tmp_path / "nothing")
    assert crew.call("differences") == [[], []]


def test_a_rank_that_dies_ends_the_crew_and_every_later_call(crew: Any) -> None:
    failed = importlib.import_module("drop_in.crew").WorkFailed
    crew._processes[1].kill()
    crew._processes[1].join()
    for _ in range(2):
        with pytest.raises(failed, match="a rank died in clear"):
            crew.call("clear")
    crew._processes[0].join(10)
    assert crew._processes[0].exitcode is not None, "the other rank lives on"
