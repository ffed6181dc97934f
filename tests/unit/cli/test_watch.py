"""`snapstone watch`: what it says of durable checkpoints, of a save in another process, and of what is wrong.

Saves are real ones, in processes of their own, held up in a write by the fault seam.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result

import snapstone as ss
from distributed.ranks import Ranks, announce
from snapstone import _native
from snapstone.watch import Observation, Watcher

Run = Callable[..., Result]
RunJson = Callable[..., tuple[int, dict[str, Any]]]

CHUNK = 64 << 10
CHUNKS = 48
WRITES = 8  # before a save is held up; OWNER is the first
COMMAND = [sys.executable, "-m", "snapstone", "watch"]


def save_held_up(rank: int, run: str, milliseconds: int) -> None:
    """Every write after the first few takes so long."""
    _native.fault_arm(f"pwrite:{WRITES + 1}+:delay={milliseconds}")
    state = {"weights": torch.arange(CHUNKS * CHUNK // 4, dtype=torch.float32)}
    announce("saving")
    ss.save(state, checkpoint_id=Path(run, "slow"), step=7)


def slow(rung: str) -> dict[str, str]:
    return {"SNAPSTONE_IO": rung, "SNAPSTONE_CHUNK_BYTES": str(CHUNK)}


def seen_when(watcher: Watcher, condition: Callable[[Observation], bool]) -> Observation:
    end = time.monotonic() + 60
    while not condition(seen := watcher.observe()):
        assert time.monotonic() < end, seen
        time.sleep(0.02)
    return seen


def commits_at(run: Path, ages: dict[str, float]) -> None:
    for name, age in ages.items():
        os.utime(run / name / "MANIFEST.json", (time.time() - age,) * 2)


def environment(**variables: str) -> dict[str, str]:
    path = os.pathsep.join([str(Path(ss.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": path, **variables}


def test_json_has_every_documented_key(snapstone_json: RunJson, run_path: Path) -> None:
    commits_at(run_path, {"step-9": 160, "step-10": 100})
    code, document = snapstone_json("watch", run_path)
    assert code == 0
    assert document.keys() == {
        *("schema", "path", "at", "checkpoints", "last_durable", "cadence_seconds", "cadence_steps"),
        *("next_in_seconds", "saves", "leftovers", "free_bytes", "total_bytes", "room_for", "exhausted_in_seconds"),
        *("problems", "processes", "ranks", "errors"),
    }
    last = document["last_durable"]
    assert last.keys() == {
        *("name", "path", "step", "age_seconds", "committed_at", "nbytes", "stored_bytes", "world_size")
    }
    assert (last["name"], last["step"], last["nbytes"], last["world_size"]) == ("step-10", 10, 1_200_014, 1)
    assert last["stored_bytes"] == (run_path / "step-10" / "rank-00000.data").stat().st_size
    assert last["age_seconds"] == pytest.approx(100, abs=20)
    assert (document["saves"], document["leftovers"], document["problems"]) == ([], [], [])


def test_the_next_checkpoint_is_expected_at_the_cadence_of_the_last_ones(saved_run: Path, run_path: Path) -> None:
    commits_at(run_path, {"step-9": 160, "step-10": 100})
    seen = Watcher(run_path).observe()
    assert seen.cadence_seconds == pytest.approx(60, abs=0.1)
    assert seen.cadence_steps == 1
    assert seen.next_in_seconds == pytest.approx(-40, abs=20)
    assert seen.next_in_seconds == pytest.approx(60 - (seen.age_seconds or 0), abs=0.1)


def test_free_space_lasts_as_long_as_cadence_and_size_say(run_path: Path) -> None:
    commits_at(run_path, {"step-9": 160, "step-10": 100})
    seen = Watcher(run_path).observe()
    space = os.statvfs(run_path)
    assert seen.free_bytes == pytest.approx(space.f_bavail * space.f_frsize, rel=0.2)
    each = (run_path / "step-10" / "rank-00000.data").stat().st_size
    assert seen.room_for == seen.free_bytes // each
    assert seen.exhausted_in_seconds == pytest.approx(seen.free_bytes / each * 60, rel=0.01)


@pytest.mark.parametrize("rung", ["buffered", pytest.param("threads-direct", marks=pytest.mark.needs_o_direct)])
def test_a_save_in_flight_shows_what_it_has_written_and_then_its_death(
    snapstone_json: RunJson, tmp_path: Path, rung: str
) -> None:
    """Written directly, the file is allocated whole before: its size says nothing of what has been written."""
    watcher = Watcher(tmp_path)
    with Ranks(1, save_held_up, str(tmp_path), 60_000, store="none", env=slow(rung)) as ranks:
        ranks.wait_for(0, "saving")
        seen = seen_when(watcher, lambda seen: any(save.written_bytes >= (WRITES - 2) * CHUNK for save in seen.saves))
        (save,) = seen.saves
        size = CHUNKS * CHUNK if rung == "threads-direct" else save.written_bytes
        assert (save.state, save.stage) == ("live", "writing")
        assert [(one.rank, one.size_bytes, one.done) for one in save.ranks] == [(0, size, False)]
        assert save.written_bytes <= WRITES * CHUNK
        assert save.begun_at == pytest.approx(time.time(), abs=60)
        assert seen.last is None

        code, document = snapstone_json("watch", tmp_path)
        assert code == 1  # nothing is durable
        assert document["last_durable"] is None
        (shown,) = document["saves"]
        assert shown["name"] == save.name
        assert shown["ranks"] == [{"rank": 0, "written_bytes": save.written_bytes, "size_bytes": size, "done": False}]
        ranks.signal(0, signal.SIGKILL)
        seen = seen_when(watcher, lambda seen: not seen.saves)
    assert [(one.name, one.state) for one in seen.leftovers] == [(save.name, "dead")]


def test_a_save_has_a_rate_while_it_writes_and_is_durable_in_the_end(tmp_path: Path) -> None:
    watcher = Watcher(tmp_path)
    with Ranks(1, save_held_up, str(tmp_path), 60, store="none", env=slow("buffered")) as ranks:
        ranks.wait_for(0, "saving")
        begun = seen_when(watcher, lambda seen: any(save.written_bytes for save in seen.saves)).saves[0]
        later = seen_when(
            watcher, lambda seen: bool(seen.saves) and seen.saves[0].written_bytes >= begun.written_bytes + 4 * CHUNK
        ).saves[0]
        assert later.bytes_per_second is not None
        # Four threads of each lane, each of which writes a chunk in 60 ms or more.
        assert 0 < later.bytes_per_second < 64 * 8 * CHUNK / 0.06
        (result,) = ranks.results(100)
    assert result.outcome == "returned", result.trace
    seen = watcher.observe()
    assert seen.last is not None
    assert (seen.last.name, seen.last.step, seen.saves, seen.leftovers) == ("slow", 7, (), ())


def test_a_damaged_checkpoint_is_a_finding_and_not_the_last_durable(snapstone: Run, run_path: Path) -> None:
    watcher = Watcher(run_path)
    commits_at(run_path, {"step-9": 160, "step-10": 100})
    assert watcher.observe().problems == []
    manifest = run_path / "step-10" / "MANIFEST.json"
    manifest.write_text(manifest.read_text().replace('"world_size": 1', '"world_size": 2'))
    seen = watcher.observe()
    assert seen.last is not None
    assert seen.last.name == "step-9"
    (problem,) = seen.problems
    assert str(run_path / "step-10") in problem
    result = snapstone("watch", run_path, "--once")
    assert result.exit_code == 1
    assert re.search(r"^damaged +1$", result.stdout, re.MULTILINE)


def test_a_file_of_the_newest_checkpoint_that_goes_is_noticed(run_path: Path) -> None:
    commits_at(run_path, {"step-9": 160, "step-10": 100})
    watcher = Watcher(run_path)
    watcher.observe()
    data = run_path / "step-10" / "rank-00000.data"
    os.truncate(data, 4096)
    assert watcher.observe().problems[0].startswith(f"{data}: 4096 bytes instead of ")
    data.unlink()
    assert watcher.observe().problems == [f"{data}: file is missing"]


def test_a_manifest_is_read_once_for_each_of_its_versions(run_path: Path) -> None:
    watcher = Watcher(run_path)
    watcher.observe()
    _native.fault_arm("none:1:kill")  # counts
    try:
        watcher.observe()
        assert _native.fault_seen("open") == 0
        ss.save({"step": 11}, checkpoint_id=run_path / "step-11")
        before = _native.fault_seen("open")
        assert watcher.observe().last.step == 11  # type: ignore[union-attr]
        assert _native.fault_seen("open") > before
    finally:
        _native.fault_disarm()


def test_what_is_removed_is_forgotten(run_path: Path) -> None:
    watcher = Watcher(run_path)
    assert len(watcher.observe().checkpoints) == 2
    (run_path / "step-10").rename(run_path.parent / "elsewhere")
    assert [one.name for one in watcher.observe().checkpoints] == ["step-9"]


def test_once_prints_one_frame_for_people(snapstone: Run, run_path: Path) -> None:
    commits_at(run_path, {"step-9": 160, "step-10": 100})
    (run_path / "evil\x1b[31m").mkdir()
    (run_path / "evil\x1b[31m" / "MANIFEST.json").write_text("{")
    result = snapstone("watch", run_path, "--once")
    facts = dict(re.split(r"  +", line, maxsplit=1) for line in result.stdout.splitlines() if "  " in line)
    assert re.fullmatch(r"step-10: step 10, 1 min \d+ s ago, 1.1 MiB", facts["last durable"])
    assert facts["cadence"] == "every 1 min, 1 steps"
    assert facts["next"].startswith("due 4")
    assert facts["checkpoints"] == "2"
    assert "\x1b" not in result.stdout
    assert r"evil\x1b[31m" in result.stdout


def test_a_run_that_is_not_there_is_not_found(snapstone: Run, tmp_path: Path) -> None:
    result = snapstone("watch", tmp_path / "absent", "--once")
    assert (result.exit_code, result.stdout) == (3, "")
    assert snapstone("watch", tmp_path, "--once", "--metrics-port", "0").exit_code == 2
    assert snapstone("watch", tmp_path, "--interval", "0").exit_code == 2


def test_the_live_view_follows_and_ends_with_ctrl_c(run_path: Path) -> None:
    master, slave = os.openpty()
    process = subprocess.Popen(
        [*COMMAND, str(run_path), "--interval", "0.1"],
        stdout=slave,
        stderr=slave,
        env=environment(TERM="xterm", COLUMNS="200", NO_COLOR="1"),
    )
    os.close(slave)
    output = ""
    try:
        output += until(master, "step-10")
        ss.save({"step": 11}, checkpoint_id=run_path / "step-11")
        output += until(master, "step-11: step 11")
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=20) == 0
    finally:
        process.kill()
        os.close(master)
    assert "Traceback" not in output


def until(terminal: int, text: str) -> str:
    """What the terminal got up to `text`; the test's own timeout ends this where it never comes."""
    output = ""
    while text not in output:
        output += os.read(terminal, 4096).decode(errors="replace")
    return output


def test_without_a_terminal_frames_are_lines(run_path: Path) -> None:
    process = subprocess.Popen(
        [*COMMAND, str(run_path), "--interval", "0.1"], stdout=subprocess.PIPE, env=environment(), text=True
    )
    assert process.stdout is not None
    try:
        lines = [process.stdout.readline() for _ in range(15)]
        process.send_signal(signal.SIGINT)
        process.stdout.read()
        assert process.wait(timeout=20) == 0
    finally:
        process.kill()
    assert sum(line.startswith("last durable") for line in lines) >= 2


class Served:
    """`snapstone watch --metrics-port 0` as a process."""

    def __init__(self, run: Path) -> None:
        self.process = subprocess.Popen(
            [*COMMAND, str(run), "--interval", "60", "--metrics-port", "0"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env=environment(),
            text=True,
        )
        assert self.process.stderr is not None
        self.line = self.process.stderr.readline()

    def __enter__(self) -> Served:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()

    def text(self) -> str:
        with urllib.request.urlopen(self.line.removeprefix("metrics on ").strip(), timeout=20) as answer:
            return str(answer.read().decode())


def samples_of(text: str) -> dict[str, float]:
    parser = pytest.importorskip("prometheus_client.parser")
    return {
        sample.name + ",".join(f"{key}={value}" for key, value in sorted(sample.labels.items())): sample.value
        for family in parser.text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_prometheus_gets_the_facts_anew_with_every_scrape(run_path: Path) -> None:
    pytest.importorskip("prometheus_client")
    commits_at(run_path, {"step-9": 160, "step-10": 100})
    with Served(run_path) as served:
        assert re.match(r"metrics on http://127\.0\.0\.1:\d+/metrics$", served.line)
        text = served.text()
        values = samples_of(text)
        assert values["snapstone_run_up"] == 1
        assert values["snapstone_checkpoints"] == 2
        assert values["snapstone_last_durable_step"] == 10
        assert 100 <= values["snapstone_last_durable_age_seconds"] < 160
        assert values["snapstone_checkpoint_interval_seconds"] == pytest.approx(60, abs=0.1)
        assert values["snapstone_last_durable_size_bytes"] == 1_200_014
        assert values["snapstone_saves_in_flight"] == 0
        assert values["snapstone_leftoverskind=staging,state=dead"] == 0
        assert "snapstone_save_written_bytes" not in values  # a gap, not a zero
        ss.save({"step": 11}, checkpoint_id=run_path / "step-11")
        assert samples_of(served.text())["snapstone_last_durable_step"] == 11
        run_path.rename(run_path.parent / "gone")
        assert samples_of(served.text()) == {"snapstone_run_up": 0}
        served.process.send_signal(signal.SIGINT)
        assert served.process.wait(timeout=20) == 0
    names = {line.split()[2] for line in text.splitlines() if line.startswith("# TYPE ")}
    assert {line.split()[2] for line in text.splitlines() if line.startswith("# HELP ")} == names
    assert all(re.fullmatch(r"snapstone_[a-z_]+", name) for name in names)


def test_every_metric_has_its_line_in_the_docs(run_path: Path) -> None:
    pytest.importorskip("prometheus_client")
    page = (Path(__file__).resolve().parents[3] / "docs" / "watch.md").read_text()
    with Served(run_path) as served:
        text = served.text()
    names = {line.split()[2] for line in text.splitlines() if line.startswith("# TYPE ")}
    assert set(re.findall(r"^\| `(snapstone_[a-z_]+)", page, re.MULTILINE)) == names


def test_a_save_in_flight_is_in_the_metrics(tmp_path: Path) -> None:
    pytest.importorskip("prometheus_client")
    with Ranks(1, save_held_up, str(tmp_path), 60_000, store="none", env=slow("buffered")) as ranks:
        ranks.wait_for(0, "saving")
        enough = (WRITES - 2) * CHUNK
        save = seen_when(Watcher(tmp_path), lambda seen: any(s.written_bytes >= enough for s in seen.saves)).saves[0]
        with Served(tmp_path) as served:
            values = samples_of(served.text())
    assert values["snapstone_saves_in_flight"] == 1
    assert values["snapstone_save_size_bytes"] == save.size_bytes
    assert values["snapstone_save_written_bytes"] == save.written_bytes
    rank = f"snapstone_save_rank_written_bytesrank=0,save={save.name.removeprefix('.staging-')}"
    assert values[rank] == values["snapstone_save_written_bytes"]


def test_a_port_that_is_taken_is_an_io_error(run_path: Path) -> None:
    pytest.importorskip("prometheus_client")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        result = subprocess.run(
            [*COMMAND, str(run_path), "--metrics-port", port], capture_output=True, text=True, env=environment()
        )
    assert result.returncode == 4
    assert "Address already in use" in result.stderr
    assert result.stderr.count("\n") == 1


def test_without_prometheus_client_the_error_says_what_to_install(run_path: Path) -> None:
    source = f"""
import sys
sys.modules["prometheus_client"] = None
sys.argv = ["snapstone", "watch", {str(run_path)!r}, "--metrics-port", "0"]
from snapstone.cli import main
main()
"""
    result = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, env=environment())
    assert (result.returncode, result.stdout) == (4, "")
    assert "pip install 'snapstone[bench]'" in result.stderr


def test_watching_does_not_import_torch_s_distributed_nor_hold_the_run_open(run_path: Path) -> None:
    source = f"""
import json, os
from snapstone.watch import Watcher
watcher = Watcher({str(run_path)!r})
watcher.observe(), watcher.observe()
held = [os.readlink(entry.path) for entry in os.scandir("/proc/self/fd") if os.path.lexists(entry.path)]
print(json.dumps([one for one in held if one.startswith({str(run_path)!r})]))
"""
    result = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, env=environment())
    assert json.loads(result.stdout) == [], result.stderr
