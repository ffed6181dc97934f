"""What a directory of results says becomes figures and engines; what cannot be used is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import pytest

from snapstone.bench import results
from snapstone.bench.cluster import Cluster, Findings, engines_of, figures_of, findings, model_document, timing_of
from snapstone.bench.environment import environment
from snapstone.bench.results import EngineResult

NODES, RANKS = 2, 16


def write(
    directory: Path, kind: results.Kind, label: str, *, date: str = "2026-11-21T12:00:00+00:00", **parts: Any
) -> Path:
    document = results.new_document(kind, ["snapstone", "bench", kind], environment(".", ranks=RANKS, nodes=NODES))
    document["date"] = date
    document.update(cast("results.Document", parts))
    return results.write(document, directory, label)


def probe(operation: str, rates: list[float], reason: str | None = None) -> dict[str, Any]:
    return {
        "tool": "probe",
        "rung": "uring",
        "operation": operation,
        "bytes_per_second": rates,
        "nbytes": 1 << 30,
        "reason": reason,
    }


def engine(
    name: str, stall: list[float], durable: list[float], *, cadence: str = "relaxed", status: str = "measured"
) -> EngineResult:
    found: Any = {
        "name": name,
        "title": name,
        "version": "1",
        "status": status,
        "reason": None if status == "measured" else "it is not installed",
        "options": [],
        "syncs": True,
        "truth": {"checks": 1, "failures": [], "kills": 0},
        "cadences": [
            {
                "name": cadence,
                "interval_steps": 10,
                "stall_seconds": stall,
                "ledger": {row: [0.0] for row in results.LEDGER_ROWS},
                "durable_seconds": durable,
                "skipped": 0,
            }
        ],
        "first_save": None,
        "changed_plan_save": None,
        "counters": None,
        "timeline": [],
        "steps": [],
    }
    return cast("EngineResult", found)


def write_stall(
    directory: Path,
    label: str,
    *engines: EngineResult,
    step: float = 2.0,
    rank_bytes: int = 2_000_000_000,
    **options: Any,
) -> Path:
    workload = {
        "model": "tiny",
        "parallelism": "fsdp 16",
        "state_only": False,
        "tensors": 4,
        "nbytes": RANKS * rank_bytes,
        "nbytes_of_rank": [rank_bytes] * RANKS,
        "step_seconds": {"median": step, "low": step, "high": step},
    }
    protocol = {"pairs": 5, "saves_per_block": 8, "steps_per_block": 80, "seed": 0}
    return write(directory, "stall", label, workload=workload, protocol=protocol, engines=list(engines), **options)


def test_figures_are_those_that_were_measured(tmp_path: Path) -> None:
    probes = [probe("write", [3e9, 5e9, 4e9]), probe("write", [1e9]), probe("read", [9e9]), probe("read", [], "no fio")]
    write(tmp_path, "disk", "nvme", probes=probes)
    write_stall(tmp_path, "a", engine("fast", [0.4, 0.2, 0.3], [4.0, 8.0, 2.0]))
    found = findings(tmp_path)
    cluster, sources = figures_of({}, found)
    assert (cluster.disk_write_bytes_per_second, cluster.disk_read_bytes_per_second) == (4e9, 9e9)
    assert (cluster.step_seconds, cluster.state_bytes_per_gpu) == (2.0, 2e9)
    assert sources["disk_write_bytes_per_second"] == "measured: disk-nvme.json"
    assert cluster.sources(sources)["step_seconds"] == "measured: stall-a.json"
    assert cluster.sources(sources)["mtbf_gpu_hours"].startswith("default: ")
    assert found.problems == []


def test_an_engine_costs_what_it_cost_where_it_was_measured(tmp_path: Path) -> None:
    """Median stall and time to durable, at the measured size, on 8 GPUs to a host: 16 GB of each host in 4 s."""
    write_stall(tmp_path, "a", engine("fast", [0.4, 0.2, 0.3], [4.0, 8.0, 2.0]))
    checkpoint = {"checkpoint": {}, "loads": [load("fast", "direct", [8.0]), load("fast", "scatter", [5.0, 4.0, 3.0])]}
    write(tmp_path, "load", "a", **checkpoint)
    found = findings(tmp_path)
    timing = timing_of(found.engines["fast"], Cluster(state_bytes_per_gpu=2e9, restart_seconds=0), 16)
    assert timing.stall_seconds == pytest.approx(0.3)
    assert timing.durable_seconds == pytest.approx(4.0)
    assert timing.recovery_seconds == pytest.approx(4.0)
    double = timing_of(found.engines["fast"], Cluster(state_bytes_per_gpu=4e9), 1024)
    assert (double.stall_seconds, double.durable_seconds) == (pytest.approx(0.6), pytest.approx(8.0))


def load(name: str, strategy: str, seconds: list[float], status: str = "measured") -> dict[str, Any]:
    return {
        "engine": name,
        "strategy": strategy,
        "seconds": seconds,
        "nbytes": 32_000_000_000,
        "bytes_read": None,
        "cold_by": "fadvise",
        "status": status,
        "reason": None,
    }


def test_ranks_that_all_load_everything_load_that_often(tmp_path: Path) -> None:
    write_stall(tmp_path, "a", engine("fast", [0.3], [4.0]))
    write(tmp_path, "load", "a", checkpoint={"layout": "replicated"}, loads=[load("fast", "auto", [8.0])])
    write(tmp_path, "load", "b", checkpoint={}, loads=[load("fast", "auto", [0.1], status="failed")])
    assert findings(tmp_path).engines["fast"].load_bytes_per_second == 32e9 * RANKS / NODES / 8


def test_options_win_over_measurements(tmp_path: Path) -> None:
    write_stall(tmp_path, "a", engine("fast", [0.3], [4.0]))
    cluster, sources = figures_of({"step_seconds": 7.0, "state_bytes": None}, findings(tmp_path))
    assert cluster.step_seconds == 7.0
    assert sources["step_seconds"] == "option"
    assert "state_bytes" not in sources


def test_the_newest_of_two_measurements_counts(tmp_path: Path) -> None:
    write_stall(tmp_path, "a", engine("fast", [0.9], [9.0]), date="2026-11-21T13:00:00+00:00", step=3.0)
    write_stall(tmp_path, "b", engine("fast", [0.1], [1.0]), date="2026-11-21T12:00:00+00:00")
    found = findings(tmp_path)
    assert found.figures["step_seconds"] == 3.0
    assert found.engines["fast"].stall_seconds_per_byte == pytest.approx(0.9 / 2e9)


def test_engines_without_a_time_are_left_out_and_named(tmp_path: Path) -> None:
    path = write_stall(
        tmp_path,
        "a",
        engine("good", [-0.1], [4.0]),
        engine("gone", [], [], status="absent"),
        engine("wrong", [0.1], [1.0], status="failed"),
        engine("hasty", [0.1], [1.0], cadence="tight"),
    )
    (tmp_path / "stall-new.json").write_text(json.dumps({**json.loads(path.read_text()), "version": 2}))
    found = findings(tmp_path)
    assert list(found.engines) == ["good"]
    assert found.engines["good"].stall_seconds_per_byte == 0, "a loop with saves was faster: noise, not a gain"
    assert len(found.problems) == 5
    assert "stall-new.json: version 2" in found.problems[0]
    assert found.problems[1].endswith("good: a stall of -0.1 s is noise, taken for 0")
    assert found.problems[2].endswith("gone: left out: absent: it is not installed")
    assert found.problems[3].endswith("wrong: left out: failed: it is not installed")
    assert found.problems[4].endswith("hasty: left out: no stall was measured at the relaxed cadence")


def test_sizes_make_a_line_with_a_fixed_part(tmp_path: Path) -> None:
    """0.5 s and 0.1 s per GB of a rank; 1 s and 0.125 s per GB of a host, which has eight of them."""
    for number, gigabytes in enumerate((1, 2, 4)):
        each = engine("line", [0.5 + 0.1 * gigabytes], [1 + 8 * gigabytes / 8])
        write_stall(tmp_path, f"{number}", each, rank_bytes=gigabytes * 10**9)
    found = findings(tmp_path).engines["line"]
    for gigabytes in (0.5, 16):
        timing = timing_of(found, Cluster(state_bytes_per_gpu=gigabytes * 1e9), 64)
        assert timing.stall_seconds == pytest.approx(0.5 + 0.1 * gigabytes)
        assert timing.durable_seconds == pytest.approx(1 + gigabytes)


def test_sizes_that_make_no_line_are_in_proportion_to_the_largest(tmp_path: Path) -> None:
    """Noise that makes the larger save the faster one, or the stall at no bytes negative."""
    for number, (gigabytes, faster, steeper) in enumerate(((1, 3.0, 0.1), (2, 2.0, 2.0))):
        engines = engine("faster", [faster], [faster]), engine("steeper", [steeper], [steeper])
        write_stall(tmp_path, f"{number}", *engines, rank_bytes=gigabytes * 10**9)
    for name, measured in findings(tmp_path).engines.items():
        timing = timing_of(measured, Cluster(state_bytes_per_gpu=4e9), 64)
        assert (timing.stall_seconds, timing.durable_seconds) == (pytest.approx(4.0), pytest.approx(4.0)), name


def test_a_plan_far_from_what_was_measured_says_so(tmp_path: Path) -> None:
    write_stall(tmp_path, "a", engine("fast", [0.3], [4.0]))
    found = findings(tmp_path)
    engines = engines_of(["fast", "staged"], found)
    for state_bytes, expected in ((20e9, []), (21e9, ["fast: planned for 10.5 times the bytes"])):
        document, _ = model_document(
            Cluster(state_bytes_per_gpu=state_bytes), {}, engines, (8, 16), command=[], environment=environment(".")
        )
        assert [
            problem[: len("fast: planned for 10.5 times the bytes")] for problem in document["problems"]
        ] == expected


def test_a_directory_without_measurements_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nothing to model with: no document of bench disk or bench stall"):
        findings(tmp_path)
    (tmp_path / "stall-torn.json").write_text("{")
    with pytest.raises(ValueError, match=r"nothing to model with: .*stall-torn\.json: not a result"):
        findings(tmp_path)
    with pytest.raises(FileNotFoundError):
        findings(tmp_path / "absent")


def test_engines_by_name(tmp_path: Path) -> None:
    write_stall(tmp_path, "a", engine("fast", [0.3], [4.0]), engine("slow", [3.0], [4.0]))
    found = findings(tmp_path)
    assert [each.name for each in engines_of([], found)] == ["fast", "slow"]
    assert [each.name for each in engines_of([], Findings())] == ["blocking", "staged", "hidden"]
    chosen = engines_of(["slow", "staged", "mine=2.5/40"], found, fixed_seconds=0.5)
    timings = [timing_of(each, Cluster(), 8) for each in chosen]
    assert timings[1].stall_seconds == pytest.approx(0.5 + 8 / 55)
    assert (timings[2].stall_seconds, timings[2].durable_seconds) == (2.5, 40)
    for wrong, message in (
        (["dcp"], "unknown engine 'dcp': one of fast, slow, blocking, staged, hidden, or NAME=STALL/DURABLE"),
        (["mine=2"], "'mine=2': NAME=STALL/DURABLE"),
        (["=1/2"], "'=1/2': NAME=STALL/DURABLE"),
        (["mine=1/x"], "'mine=1/x': NAME=STALL/DURABLE"),
        (["staged", "staged"], "each name once"),
    ):
        with pytest.raises(ValueError, match=message):
            engines_of(wrong, found)
