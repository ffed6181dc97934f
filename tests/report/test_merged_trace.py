"""Traces of ranks and hosts merged into one: whose clocks agree afterwards, and what Perfetto gets.

Invariants: slices of one row nest or follow each other; ranks of one host keep the times that their common clock gave
them; what cannot be read is named.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

import snapstone as ss
from distributed.ranks import run_ranks, values
from report.hostile import SCRIPT, write_hostile
from report.measured import stall_document, write_results
from snapstone.report import MergedTrace, merged_trace
from snapstone.report.clocks import aligned

BOOT_US = 86_400e6  # how much later the second host was started


def events_of(merged: MergedTrace, phase: str = "X") -> list[dict[str, Any]]:
    return [event for event in merged.document["traceEvents"] if event["ph"] == phase]


def names_of(merged: MergedTrace, kind: str) -> dict[tuple[int, int], str]:
    found = (event for event in events_of(merged, "M") if event["name"] == kind)
    return {(event["pid"], event["tid"]): event["args"]["name"] for event in found}


def assert_rows_nest(merged: MergedTrace) -> None:
    rows: dict[tuple[int, int], list[dict[str, Any]]] = {}
    for event in events_of(merged):
        rows.setdefault((event["pid"], event["tid"]), []).append(event)
    for row in rows.values():
        ends: list[float] = []
        for event in sorted(row, key=lambda one: (one["ts"], -one["dur"])):
            while ends and ends[-1] <= event["ts"] + 0.002:  # times are rounded to a nanosecond
                ends.pop()
            assert not ends or event["ts"] + event["dur"] <= ends[-1] + 0.002, event
            ends.append(event["ts"] + event["dur"])


# ---- clocks


def vote_ends(chance: random.Random, hosts: list[float], count: int, noticed_us: float) -> dict[int, list[float]]:
    """Two ranks per host; `hosts` are offsets of their clocks; a vote is noticed up to `noticed_us` late."""
    times = sorted(chance.uniform(0, 3600e6) for _ in range(count))
    ranks = (offset for offset in hosts for _ in range(2))
    return {
        rank: [time - offset + chance.uniform(0, noticed_us) for time in times] for rank, offset in enumerate(ranks)
    }


@settings(max_examples=50, deadline=None)
@given(
    st.integers(0, 2**32),
    st.lists(st.integers(-(10**7), 10**7), min_size=1, max_size=4, unique=True),
    st.integers(3, 30),
)
def test_offsets_are_found_within_the_time_in_which_a_vote_is_noticed(seed: int, hosts: list[int], count: int) -> None:
    """Clocks that are 0.3 s or more apart; one host has one offset."""
    noticed_us = 20_000.0
    offsets = [float(host) * 3e5 for host in hosts]
    found = aligned(vote_ends(random.Random(seed), offsets, count, noticed_us))
    for rank, one in found.items():
        assert one.votes == count
        assert abs(one.offset - (offsets[rank // 2] - offsets[0])) <= noticed_us
        assert one.offset == found[rank // 2 * 2].offset
    assert found[0].offset == 0.0


def test_a_rank_that_missed_votes_is_matched_with_those_it_has() -> None:
    ends = vote_ends(random.Random(5), [0.0, 5e6], 12, 100.0)
    ends[2], ends[3] = ends[2][4:], ends[3][:-2]
    found = aligned(ends)
    assert found[2].offset == pytest.approx(5e6, abs=200)
    assert (found[2].votes, found[3].votes) == (8, 10)


def test_without_votes_clocks_stay() -> None:
    assert [one.offset for one in aligned({0: [], 1: []}).values()] == [0.0, 0.0]
    assert aligned({0: [1.0], 1: []})[1].votes == 0


# ---- traces of real saves


def _save_and_load(rank: int, directory: Path) -> None:
    state = {"weight": torch.full((1 << 18,), float(rank)), "step": 1}
    for step in (1, 2):
        handle = ss.async_save({f"rank{rank}": state}, checkpoint_id=directory / f"step-{step}", timeout=20)
        handle.result()
    dist.barrier()
    ss.load({f"rank{rank}": state}, checkpoint_id=directory / "step-2", timeout=20)


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two ranks leave that share a host."""
    directory = tmp_path_factory.mktemp("traced")
    results = run_ranks(2, _save_and_load, directory, env={"SNAPSTONE_TRACE": str(directory / "run.json")})
    values(results)
    return directory


def moved(traced: Path, directory: Path) -> Path:
    """The same, as if rank 1 had run on a host that was started a day later."""
    for rank, offset in ((0, 0.0), (1, -BOOT_US)):
        events = json.loads((traced / f"run.rank-{rank:05d}.json").read_text())
        for event in events:
            event["ts"] += offset
        (directory / f"run.rank-{rank:05d}.json").write_text(json.dumps(events))
    return directory


def operations(merged: MergedTrace) -> dict[int, list[tuple[str, float, float]]]:
    found: dict[int, list[tuple[str, float, float]]] = {}
    for event in events_of(merged):
        if event["name"] == event["cat"]:
            found.setdefault(event["pid"], []).append((event["name"], event["ts"], event["ts"] + event["dur"]))
    return {process: sorted(times, key=lambda one: one[1]) for process, times in found.items()}


def test_ranks_of_one_host_keep_their_times(traced: Path) -> None:
    merged = merged_trace(traced)
    assert {rank: one.offset for rank, one in merged.clocks["run"].items()} == {0: 0.0, 1: 0.0}
    assert min(event["ts"] for event in events_of(merged)) == 0.0
    count = sum(len(json.loads(path.read_text())) for path in traced.glob("run.rank-*.json"))
    assert merged.event_count == count
    assert merged.skipped == []
    assert set(names_of(merged, "process_name").values()) == {"rank 0 (run)", "rank 1 (run)"}
    assert {"operation", "lane 0"} <= set(names_of(merged, "thread_name").values())
    assert_rows_nest(merged)


def test_ranks_of_two_hosts_are_brought_to_one_clock(traced: Path, tmp_path: Path) -> None:
    """As good as votes are noticed: within 50 ms. Without alignment a day lies between the ranks."""
    same, apart = merged_trace(traced), merged_trace(moved(traced, tmp_path))
    assert apart.clocks["run"][1].offset == pytest.approx(BOOT_US, abs=50_000)
    assert apart.clocks["run"][1].votes >= 3
    for process, times in operations(same).items():
        for (name, begin, end), (other, first, last) in zip(times, operations(apart)[process], strict=True):
            assert name == other
            assert abs(first - begin) <= 50_000 * 2
            assert abs(last - end) <= 50_000 * 2
    assert apart.document["otherData"]["clocks"]["run"]["rank 1"]["votes"] >= 3


# ---- time lines of results, and files that are neither


def test_time_lines_of_results_become_processes_of_their_own(tmp_path: Path) -> None:
    merged = merged_trace(write_results(tmp_path))
    processes = set(names_of(merged, "process_name").values())
    assert "rank 3 (stall-llama-1b: snapstone)" in processes
    assert "rank 0 (stall-llama-1b: DCP, synchronous)" in processes
    engine = stall_document()["engines"][0]
    process = next(key for key, name in names_of(merged, "process_name").items() if name.endswith("b: snapstone)"))[0]
    mine = [event for event in events_of(merged) if event["pid"] == process]
    assert len(mine) == len(engine["timeline"]) / 4
    assert {event["args"]["bytes"] for event in mine if event["name"] == "write"} == {1 << 20}
    assert_rows_nest(merged)


def test_overlapping_requests_of_one_lane_get_rows_beside_it(tmp_path: Path) -> None:
    def event(name: str, begin: float, seconds: float) -> dict[str, Any]:
        return {
            "name": name,
            "cat": "save",
            "ph": "X",
            "ts": begin,
            "dur": seconds,
            "pid": 0,
            "tid": "lane 0",
            "args": {},
        }

    events = [
        event("stage", 0, 10),
        event("digest", 2, 3),
        event("write", 5, 20),
        event("write", 8, 20),
        event("stage", 10, 5),
    ]
    (tmp_path / "alone.json").write_text(json.dumps(events))
    merged = merged_trace(tmp_path)
    assert sorted(names_of(merged, "thread_name").values()) == ["lane 0", "lane 0 write", "lane 0 write (2)"]
    assert_rows_nest(merged)


def test_what_is_no_trace_is_named_and_left_out(tmp_path: Path) -> None:
    write_hostile(tmp_path)
    (tmp_path / "a.rank-00000.json").write_text("[\n{")
    (tmp_path / "b.rank-00001.json").write_text("{}")
    (tmp_path / "c.rank-00000.json").write_text(
        json.dumps(
            [{"ph": "X", "ts": 1, "dur": 2, "name": SCRIPT}, {"ph": "X", "ts": float("nan"), "dur": 1}, 7, {"ph": "B"}]
        )
    )
    merged = merged_trace(tmp_path)
    text = "\n".join(merged.skipped)
    for name in ("a.rank-00000.json: not a trace", "b.rank-00001.json: not a trace", "stall-future.json: version 2"):
        assert name in text
    process = next(key for key, name in names_of(merged, "process_name").items() if name.endswith("(c)"))[0]
    assert [event["name"] for event in events_of(merged) if event["pid"] == process] == [SCRIPT]
    json.dumps(merged.document, allow_nan=False)
    assert_rows_nest(merged)
