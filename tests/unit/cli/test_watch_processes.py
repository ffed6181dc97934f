"""`snapstone watch`: what the processes that save tell of themselves. They are real ones: slowed, killed, failing."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result

import snapstone as ss
from distributed.ranks import Ranks, announce
from snapstone import _native, status, status_page
from snapstone.dcp import StorageWriter
from snapstone.status_page import Page, Process, Ring, RunStatus, SaveStatus, StageCost
from snapstone.watch import Observation, Watcher

from .test_watch import Served, environment, samples_of, seen_when

Run = Callable[..., Result]
RunJson = Callable[..., tuple[int, dict[str, Any]]]

CHUNK = 64 << 10
CHUNKS = 48
NBYTES = CHUNK * CHUNKS
SLOW = {"SNAPSTONE_IO": "buffered", "SNAPSTONE_CHUNK_BYTES": str(CHUNK)}


@pytest.fixture(autouse=True)
def pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A place of this test alone, also for the processes that it starts, and no page of earlier tests' saves in it."""
    folder = tmp_path / "pages"
    status._publisher.silence()
    monkeypatch.setattr(status, "_publisher", status._Publisher())
    monkeypatch.setenv("SNAPSTONE_STATUS_DIR", str(folder))
    yield folder
    status._publisher.silence()


def save_slowly(rank: int, run: str, milliseconds: int) -> None:
    _native.fault_arm(f"pwrite:9+:delay={milliseconds}")
    state = {f"weights-{rank}": torch.arange(NBYTES // 4, dtype=torch.float32) + rank}
    announce("saving")
    ss.save(state, checkpoint_id=Path(run, "slow"), step=7)


def save_and_fail(rank: int, run: str) -> None:
    state = {"weights": torch.ones(NBYTES // 4)}
    ss.save(state, checkpoint_id=Path(run, "good"), step=1)
    _native.fault_arm("pwrite:9+:errno=ENOSPC")
    with pytest.raises(OSError, match="No space left"):
        ss.save({"weights": torch.zeros(NBYTES // 4)}, checkpoint_id=Path(run, "bad"), step=2)
    _native.fault_disarm()
    announce("failed")
    input_of_parent(run, "go")
    ss.save(state, checkpoint_id=Path(run, "better"), step=3)
    announce("saved")
    input_of_parent(run, "leave")


def fail_and_exit(rank: int, run: str) -> None:
    _native.fault_arm("pwrite:9+:errno=ENOSPC")
    with pytest.raises(OSError, match="No space left"):
        ss.save({"weights": torch.zeros(NBYTES // 4)}, checkpoint_id=Path(run, "bad"), step=2)
    status._leave()  # a rank of these tests ends without its exit handlers


def input_of_parent(run: str, name: str) -> None:
    while not Path(run, "..", name).exists():
        time.sleep(0.01)


def told(seen: Observation) -> list[SaveStatus]:
    return seen.processes.saving


def test_a_save_in_flight_tells_its_stage_bytes_rates_and_ring(snapstone_json: RunJson, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    watcher = Watcher(run)
    with Ranks(1, save_slowly, str(run), 300, store="none", env=SLOW) as ranks:
        ranks.wait_for(0, "saving")
        seen = seen_when(watcher, lambda seen: any(save.written_bytes for save in told(seen)))
        (save,) = told(seen)
        assert (save.rank, save.world_size, save.step, save.name, save.state) == (0, 1, 7, "slow", "saving")
        assert (save.size_bytes, save.stage in ("stage", "write")) == (NBYTES, True)
        assert 0 < save.written_bytes <= save.staged_bytes <= NBYTES
        assert save.staged_bytes_per_second is not None
        assert save.written_bytes_per_second is not None
        assert 0 < save.written_bytes_per_second <= save.staged_bytes_per_second
        assert save.stages["plan"].seconds > 0
        (process,) = seen.processes.all
        assert process.state == "live"
        assert 0 < process.ring.used_bytes <= process.ring.nbytes
        assert [one.name for one in seen.saves] == [f".staging-{save.save_id}"]
        _, document = snapstone_json("watch", run)
        (shown,) = document["ranks"]
        assert shown["staged_bytes"] >= save.staged_bytes
        assert document["processes"][0]["ring_bytes"] == process.ring.nbytes
        (result,) = ranks.results(100)
        assert result.outcome == "returned", result.trace


def test_the_ranks_of_this_machine_are_shown_together(snapstone: Run, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    watcher = Watcher(run)
    with Ranks(2, save_slowly, str(run), 300, env=SLOW) as ranks:
        ranks.wait_for(0, "saving")
        seen_when(watcher, lambda seen: [save.rank for save in told(seen) if save.written_bytes] == [0, 1])
        output = snapstone("watch", run, "--once").stdout
        assert re.search(r"^processes +2 on this machine; staging memory: .* in use$", output, re.MULTILINE)
        rows = re.findall(r"^ +([01])  (stage|write) +[\d.]+ s ", output, re.MULTILINE)
        assert sorted(rank for rank, _ in rows) == ["0", "1"], output
        pytest.importorskip("prometheus_client")
        with Served(run) as served:
            values = samples_of(served.text())
        assert values["snapstone_processes"] == 2
        assert sum(values[f"snapstone_save_stage_ranksstage={stage}"] for stage in ("stage", "write")) == 2
        assert 0 < values["snapstone_engine_written_bytes"] <= values["snapstone_engine_staged_bytes"]
        assert values["snapstone_engine_size_bytes"] == 2 * NBYTES
        assert values["snapstone_engine_written_bytes_per_second"] > 0
        assert 0 < values["snapstone_ring_used_bytes"] <= values["snapstone_ring_size_bytes"]
        assert values["snapstone_save_failures_total"] == values["snapstone_save_failing_ranks"] == 0
        for result in ranks.results(100):
            assert result.outcome == "returned", result.trace


def test_a_rank_that_waits_for_another_is_in_the_vote(tmp_path: Path) -> None:
    watcher = Watcher(tmp_path)
    with Ranks(2, save_alone_late, str(tmp_path)) as ranks:
        seen = seen_when(watcher, lambda seen: any(save.stage == "vote" for save in told(seen)))
        assert [save.rank for save in told(seen)] == [0]
        Path(tmp_path, "..", "go").resolve().touch()
        for result in ranks.results(60):
            assert result.outcome == "returned", result.trace
    Path(tmp_path, "..", "go").resolve().unlink()


def save_alone_late(rank: int, run: str) -> None:
    if rank == 1:
        input_of_parent(run, "go")
    ss.save({"weights": torch.ones(10)}, checkpoint_id=Path(run, "a"))


def test_how_long_a_stage_has_lasted_is_told_from_its_begin(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Longer than the window of the rates: the two have nothing to do with each other."""
    monkeypatch.setattr(status, "WINDOW_SECONDS", 0.3)
    monkeypatch.setenv("SNAPSTONE_IO", "buffered")
    _native.fault_arm("pwrite:3+:delay=1500")
    try:
        handle = ss.async_save({"t": torch.ones(1 << 20)}, checkpoint_id=tmp_path / "run" / "a")
        seen = seen_when(Watcher(tmp_path / "run"), lambda seen: any(save.stage == "write" for save in told(seen)))
        (save,) = told(seen)
        begun, until = save.stage_begun_at, time.time() + 0.8
        while time.time() < until:
            time.sleep(0.05)
            for later in told(Watcher(tmp_path / "run").observe()):
                if later.stage == "write":
                    assert later.stage_begun_at == pytest.approx(begun, abs=0.02)
        handle.result()
    finally:
        _native.fault_disarm()


def test_a_killed_process_is_an_error_and_its_page_goes_with_the_next_save(
    snapstone_json: RunJson, tmp_path: Path, pages: Path
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    watcher = Watcher(run)
    with Ranks(1, save_slowly, str(run), 60_000, store="none", env=SLOW) as ranks:
        ranks.wait_for(0, "saving")
        seen_when(watcher, lambda seen: any(save.written_bytes for save in told(seen)))
        ranks.signal(0, signal.SIGKILL)
        seen = seen_when(watcher, lambda seen: bool(seen.processes.troubles))
        assert told(seen) == []
        (trouble,) = seen.processes.troubles
        assert (trouble.rank, trouble.step, trouble.name) == (0, 7, "slow")
        assert re.fullmatch(r"the process \d+ died", trouble.error)
        code, document = snapstone_json("watch", run)
        assert code == 1
        assert [one["error"] for one in document["errors"]] == [trouble.error]
    (dead,) = [one for one in os.listdir(pages) if one.startswith("page-")]
    ss.save({"t": torch.ones(4)}, checkpoint_id=run / "next")
    seen_when(watcher, lambda seen: not seen.processes.troubles)
    assert dead not in os.listdir(pages)


def test_a_failed_save_is_an_error_until_one_succeeds(snapstone: Run, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    watcher = Watcher(run)
    with Ranks(1, save_and_fail, str(run), store="none", env=SLOW) as ranks:
        ranks.wait_for(0, "failed")
        seen = seen_when(watcher, lambda seen: bool(seen.processes.troubles))
        (trouble,) = seen.processes.troubles
        assert (trouble.rank, trouble.step, trouble.name) == (0, 2, "bad")
        assert "No space left" in trouble.error
        assert (seen.processes.committed, seen.processes.failed) == (1, 1)
        result = snapstone("watch", run, "--once")
        assert result.exit_code == 1
        assert re.search(
            r"^error +rank 0, bad \(step 2\), in \w+, .* ago: OSError: .*No space left", result.stdout, re.M
        )
        pytest.importorskip("prometheus_client")
        with Served(run) as served:
            values = samples_of(served.text())
        assert values["snapstone_save_failures_total"] == values["snapstone_save_failing_ranks"] == 1
        (tmp_path / "go").touch()
        ranks.wait_for(0, "saved")
        seen = seen_when(watcher, lambda seen: not seen.processes.troubles)
        assert (seen.processes.committed, seen.processes.failed) == (2, 1)
        assert snapstone("watch", run, "--once").exit_code == 0
        (tmp_path / "leave").touch()
        assert ranks.results(60)[0].outcome == "returned"


def test_why_a_process_failed_outlives_it(tmp_path: Path) -> None:
    with Ranks(1, fail_and_exit, str(tmp_path), store="none", env=SLOW) as ranks:
        assert ranks.results(60)[0].outcome == "returned"
    seen = seen_when(Watcher(tmp_path), lambda seen: bool(seen.processes.troubles))
    assert [one.state for one in seen.processes.all] == ["dead"]
    assert "No space left" in seen.processes.troubles[0].error


def test_a_process_that_ends_well_leaves_no_page(tmp_path: Path, pages: Path) -> None:
    source = f"""
import os, time, torch
import snapstone as ss
ss.save({{"t": torch.ones(4)}}, checkpoint_id={str(tmp_path / "run" / "a")!r})
while not (os.path.isdir({str(pages)!r}) and os.listdir({str(pages)!r})):
    time.sleep(0.02)
if os.fork() == 0:
    os._exit(0)  # a child has no page to remove
os.wait()
assert os.listdir({str(pages)!r})
"""
    result = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, env=environment())
    assert result.returncode == 0, result.stderr
    assert os.listdir(pages) == []


def test_a_cancelled_save_is_no_error(tmp_path: Path) -> None:
    _native.fault_arm("pwrite:1+:delay=200;uring_write:1+:delay=200")
    try:
        handle = ss.async_save({"t": torch.ones(1 << 20)}, checkpoint_id=tmp_path / "run" / "a")
        assert handle.cancel()
        with pytest.raises(ss.CheckpointError):
            handle.result()
    finally:
        _native.fault_disarm()
    time.sleep(3 * status.INTERVAL_SECONDS)
    seen = Watcher(tmp_path / "run").observe()
    assert seen.processes.troubles == []
    assert seen.processes.failed == 0


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_saves_under_dcp_have_pages_too(tmp_path: Path) -> None:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.api import CheckpointException

    run = tmp_path / "run"
    state = {"t": torch.ones(NBYTES // 4)}
    dcp.save(state, storage_writer=StorageWriter(run / "a", step=4), no_dist=True)
    seen = seen_when(Watcher(run), lambda seen: seen.processes.committed == 1)
    (process,) = seen.processes.all
    assert process.last is not None
    assert (process.last.name, process.last.step, process.last.size_bytes) == ("a", 4, NBYTES)
    _native.fault_arm("renameat2:1+:errno=EIO;rename:1+:errno=EIO")
    try:
        with pytest.raises(CheckpointException):
            dcp.save(state, storage_writer=StorageWriter(run / "b", step=5), no_dist=True)
    finally:
        _native.fault_disarm()
    seen = seen_when(Watcher(run), lambda seen: bool(seen.processes.troubles))
    assert [(one.step, one.rank) for one in seen.processes.troubles] == [(5, 0)]
    assert "Input/output error" in seen.processes.troubles[0].error
    assert (seen.processes.committed, seen.processes.failed) == (1, 1)


@pytest.mark.parametrize("place", ["a file", "a directory that cannot be made", "empty"])
def test_no_page_is_no_reason_for_a_save_to_fail(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    folder = {"a file": "file", "a directory that cannot be made": "missing/deep"}.get(place)
    monkeypatch.setenv("SNAPSTONE_STATUS_DIR", str(tmp_path / folder) if folder else "")
    ss.save({"t": torch.ones(4)}, checkpoint_id=tmp_path / "run" / "a")
    time.sleep(2 * status.INTERVAL_SECONDS)
    assert Watcher(tmp_path / "run").observe().processes.all == ()
    monkeypatch.setenv("SNAPSTONE_STATUS_DIR", str(tmp_path / "good"))
    ss.save({"t": torch.ones(4)}, checkpoint_id=tmp_path / "run" / "b")  # the thread has survived it
    seen_when(Watcher(tmp_path / "run"), lambda seen: len(seen.processes.all) == 1)


def test_nothing_is_written_between_saves(tmp_path: Path, pages: Path) -> None:
    ss.save({"t": torch.ones(4)}, checkpoint_id=tmp_path / "run" / "a")
    seen_when(Watcher(tmp_path / "run"), lambda seen: any(one.last for one in seen.processes.all))
    time.sleep(2 * status.INTERVAL_SECONDS)
    before = {path: path.stat().st_mtime_ns for path in pages.iterdir()}
    time.sleep(4 * status.INTERVAL_SECONDS)
    assert {path: path.stat().st_mtime_ns for path in pages.iterdir()} == before
    threads = [thread for thread in threading.enumerate() if thread.name == "snapstone-status"]
    ss.save({"t": torch.ones(4)}, checkpoint_id=tmp_path / "run" / "b")
    assert [thread for thread in threading.enumerate() if thread.name == "snapstone-status"] == threads


def a_page(run: Path) -> Page:
    save = SaveStatus(
        name="a",
        step=3,
        save_id="0" * 32,
        rank=5,
        world_size=8,
        state="failed",
        stage="write",
        stage_begun_at=time.time(),
        begun_at=time.time(),
        ended_at=time.time(),
        size_bytes=10,
        staged_bytes=9,
        written_bytes=8,
        staged_bytes_per_second=1.5,
        written_bytes_per_second=None,
        stages={"plan": StageCost(0.5, 0, 2)},
        error="OSError: evil\x1b[31m",
    )
    return Page(Process.mine(), time.time(), Ring(4096, 4, 1), (RunStatus(str(run), 1, 1, (save,)),))


NAME = f"page-{'a' * 32}.json"


def test_a_page_is_read_as_it_was_written(tmp_path: Path, pages: Path, snapstone: Run) -> None:
    page = a_page(tmp_path)
    status_page.write(page, str(pages), NAME)
    assert list(status_page.find(str(pages))) == [(NAME, page)]
    output = snapstone("watch", tmp_path, "--once").stdout
    assert r"OSError: evil\x1b[31m" in output
    assert "\x1b" not in output


def test_hostile_pages_are_no_pages(tmp_path: Path, pages: Path) -> None:
    """Each value of a page replaced by what it must not be."""
    status_page.write(a_page(tmp_path), str(pages), NAME)
    good = json.loads((pages / NAME).read_text())
    bad: list[Any] = [
        None,
        True,
        -1,
        1 << 70,
        float("nan"),
        float("inf"),
        "x" * 5000,
        "\ud800",
        [],
        [[]] * 99,
        {"a": 1},
    ]
    tried = 0
    for place in places_of(good):
        for value in bad:
            document = json.loads(json.dumps(good))
            holder = document
            for key in place[:-1]:
                holder = holder[key]
            before, holder[place[-1]] = holder[place[-1]], value
            (pages / NAME).write_text(json.dumps(document))
            found = [page for _, page in status_page.find(str(pages))]
            tried += 1
            if found:  # another value of the same kind
                assert acceptable(place, before, value), (place, value)
    assert tried > 300
    Watcher(tmp_path).observe()
    for text in ("", "{", "[" * 100_000, "null", "7", "x" * 100, json.dumps({**good, "x": "y" * (1 << 17)})):
        (pages / NAME).write_text(text)
        assert list(status_page.find(str(pages))) == [], text[:80]
    (pages / NAME).unlink()
    os.mkfifo(pages / NAME)
    assert list(status_page.find(str(pages))) == []
    (pages / NAME).unlink()
    (tmp_path / "real").write_text(json.dumps(good))
    (pages / NAME).symlink_to(tmp_path / "real")
    assert list(status_page.find(str(pages))) == []


def acceptable(place: list[Any], before: Any, value: Any) -> bool:
    nullable = {"step", "ended_at", "error", "staged_bytes_per_second", "written_bytes_per_second"}
    if value is None:
        return place[-1] in nullable
    if value == -1:
        return place[-1] == "step"
    return value == [] and place[-1] in ("runs", "saves")


def places_of(value: Any, place: tuple[Any, ...] = ()) -> list[list[Any]]:
    items = (
        list(value.items()) if isinstance(value, dict) else list(enumerate(value)) if isinstance(value, list) else []
    )
    return [found for key, one in items for found in [[*place, key], *places_of(one, (*place, key))]]


def test_a_number_given_to_another_process_does_not_bring_a_dead_one_back(tmp_path: Path, pages: Path) -> None:
    page = a_page(tmp_path)
    assert page.process.liveness() == "live"
    assert replace(page.process, start=page.process.start + 1).liveness() == "dead"
    assert replace(page.process, boot="another").liveness() == "unknown"
    assert replace(page.process, namespace="pid:[1]").liveness() == "unknown"
    saving = replace(page.runs[0].saves[0], state="saving", ended_at=None, error=None)
    elsewhere = replace(
        page,
        process=replace(page.process, namespace="pid:[1]"),
        runs=(replace(page.runs[0], saves=(saving,)),),
    )
    status_page.write(elsewhere, str(pages), NAME)
    assert [save.rank for save in Watcher(tmp_path).observe().processes.saving] == [5]
    status_page.write(replace(elsewhere, updated_at=time.time() - 100), str(pages), NAME)
    seen = Watcher(tmp_path).observe()
    assert (seen.processes.saving, [one.rank for one in seen.processes.troubles]) == ([], [5])


def test_the_place_in_memory_is_this_users_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its name can be guessed: somebody else may have made it, or a link to a place of theirs."""
    monkeypatch.delenv("SNAPSTONE_STATUS_DIR")
    assert status_page.directory() in (None, f"/dev/shm/snapstone-{os.geteuid()}")
    page = a_page(tmp_path)
    mine, open_to_all, link = tmp_path / "mine", tmp_path / "open", tmp_path / "link"
    status_page.write(page, str(mine), NAME)
    assert mine.stat().st_mode & 0o777 == 0o700
    status_page.write(page, str(mine), NAME)
    open_to_all.mkdir()
    open_to_all.chmod(0o777)
    link.symlink_to(mine)
    for place in (open_to_all, link):
        with pytest.raises(PermissionError):
            status_page.write(page, str(place), NAME)
