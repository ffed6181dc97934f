"""`snapstone bench disk`: real files through fio, the own probe and every rung that works, and nothing left of them."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

import snapstone as ss
from snapstone import _native
from snapstone.bench import results
from snapstone.bench.disk_probes import BLOCK_BYTES, RUNGS, Fio, OwnProbe, ProbeError, Rung
from snapstone.cli import cli

MIB = 1 << 20


@pytest.fixture(autouse=True)
def no_faults_left() -> Iterator[None]:
    yield
    _native.fault_disarm()


def bench_disk(*arguments: str | Path, env: dict[str, str] | None = None) -> Result:
    return CliRunner().invoke(cli, ["bench", "disk", *map(str, arguments)], env=env, catch_exceptions=False)


def document_of(*arguments: str | Path, env: dict[str, str] | None = None) -> tuple[int, dict[str, Any]]:
    result = bench_disk(*arguments, "--json", env=env)
    return result.exit_code, json.loads(result.stdout)


def path_without_fio(tmp_path: Path) -> dict[str, str]:
    (tmp_path / "bin").mkdir()
    return {"PATH": str(tmp_path / "bin")}


def path_with_fio(tmp_path: Path, script: str) -> dict[str, str]:
    """An executable of that name that does what `script` says."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "fio").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "fio").chmod(0o755)
    return {"PATH": f"{folder}:{os.environ['PATH']}"}


def rows_of(document: dict[str, Any]) -> dict[tuple[str, str, str], dict[str, Any]]:
    return {(row["tool"], row["rung"], row["operation"]): row for row in document["probes"]}


def test_every_rung_that_works_is_sampled_and_the_others_say_why_not(tmp_path: Path) -> None:
    code, document = document_of(tmp_path, "--size", "2MiB", "--samples", "2", env=path_without_fio(tmp_path))
    assert code == 0
    rows = rows_of(document)
    for rung in RUNGS:
        refusal = _native.try_rung(str(tmp_path), rung)
        for operation in ("write", "read"):
            row = rows["snapstone", rung, operation]
            assert row["reason"] == (refusal or None)
            assert len(row["bytes_per_second"]) == (0 if refusal else 2)
            assert all(rate > 0 for rate in row["bytes_per_second"])
            assert row["nbytes"] == 2 * MIB
    assert document["complete"] is True
    assert document["problems"] == []
    assert [path.name for path in tmp_path.iterdir()] == ["bin"]


def test_without_fio_the_own_probe_measures_the_limit(tmp_path: Path) -> None:
    _, document = document_of(tmp_path, "--size", "2MiB", "--samples", "1", env=path_without_fio(tmp_path))
    rows = rows_of(document)
    assert rows["fio", "uring", "write"]["reason"] == "fio is not installed"
    direct = not _native.try_rung(str(tmp_path), "threads-direct")
    assert len(rows["probe", "threads-direct" if direct else "buffered", "read"]["bytes_per_second"]) == 1


def test_with_fio_the_limit_is_what_fio_says(tmp_path: Path) -> None:
    if shutil.which("fio") is None:
        pytest.skip("fio is not installed")
    if refusal := _native.try_rung(str(tmp_path), "uring"):
        pytest.skip(f"io_uring with O_DIRECT: {refusal}")
    code, document = document_of(tmp_path, "--size", "8MiB", "--samples", "2", "--out", tmp_path / "R")
    assert code == 0
    rows = rows_of(document)
    assert [len(rows["fio", "uring", operation]["bytes_per_second"]) for operation in ("write", "read")] == [2, 2]
    assert not any(tool == "probe" for tool, _, _ in rows)
    written = results.read(tmp_path / "R" / "disk-limit.json")
    assert written["probes"] == document["probes"]
    assert [path.name for path in tmp_path.iterdir()] == ["R"]


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("echo 'fio: engine io_uring not loadable' >&2; exit 1", "fio: fio: engine io_uring not loadable"),
        ("echo '{}'", "fio printed something else than its results: 'jobs'"),
        ('echo \'note: {"jobs": [{"write": {"io_bytes": 4096, "runtime": 1}, "error": 0}]}\'', "fio moved 4096 bytes"),
        ('echo \'{"jobs": [{"write": {"io_bytes": 0, "runtime": 0}, "error": 28}]}\'', "No space left on device"),
    ],
)
def test_a_fio_that_fails_is_a_problem_and_stops_nothing_else(tmp_path: Path, script: str, reason: str) -> None:
    if refusal := _native.try_rung(str(tmp_path), "uring"):
        pytest.skip(f"fio is not tried: {refusal}")
    code, document = document_of(tmp_path, "--size", "1MiB", "--samples", "2", env=path_with_fio(tmp_path, script))
    assert code == 1
    assert document["complete"] is False
    (problem,) = document["problems"]
    assert reason in problem
    rows = rows_of(document)
    assert reason in rows["fio", "uring", "write"]["reason"]
    assert len(rows["snapstone", "buffered", "write"]["bytes_per_second"]) == 2


def test_the_rate_is_bytes_over_the_time_that_fio_names(tmp_path: Path) -> None:
    script = (
        'for last; do :; done\ncase "$*" in *--rw=write*) operation=write ;; *) operation=read ;; esac\n'
        'echo "{\\"jobs\\": [{\\"$operation\\": {\\"io_bytes\\": 1048576, \\"runtime\\": 250}, \\"error\\": 0}]}"'
    )
    os.environ["PATH"], before = path_with_fio(tmp_path, script)["PATH"], os.environ["PATH"]
    try:
        assert (Fio(MIB).write(str(tmp_path)), Fio(MIB).read(str(tmp_path))) == (0.25, 0.25)
    finally:
        os.environ["PATH"] = before


def test_too_little_space_is_said_with_the_numbers_before_anything_is_written(tmp_path: Path) -> None:
    free = os.statvfs(tmp_path).f_bavail * os.statvfs(tmp_path).f_frsize
    result = bench_disk(tmp_path, "--size", str(free), "--out", tmp_path / "R")
    assert result.exit_code == 4
    assert f"{-(-free // MIB) * MIB + 256 * MIB} bytes are needed and " in result.stderr
    assert str(tmp_path) in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_is_not_there_is_not_found(tmp_path: Path) -> None:
    assert bench_disk(tmp_path / "absent").exit_code == 3
    assert bench_disk(tmp_path, "--size", "much").exit_code == 2
    assert bench_disk(tmp_path, "--size", "0").exit_code == 2


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_directory_that_cannot_be_written_is_an_io_error(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    result = bench_disk(tmp_path, "--size", "1MiB")
    tmp_path.chmod(0o700)
    assert result.exit_code == 4


def test_a_rung_that_fails_on_the_way_is_a_problem_and_leaves_no_files(tmp_path: Path) -> None:
    _native.fault_arm("pwrite:60+:errno=EIO")  # after the warm-up, of the rungs that write with threads
    code, document = document_of(tmp_path, "--size", "4MiB", "--samples", "6", env=path_without_fio(tmp_path))
    _native.fault_disarm()
    assert code == 1
    rows = rows_of(document)
    assert "Input/output error" in rows["snapstone", "buffered", "write"]["reason"]
    assert any("snapstone buffered, write" in problem for problem in document["problems"])
    assert [path.name for path in tmp_path.iterdir()] == ["bin"]


def test_bytes_that_come_back_wrong_are_a_problem(tmp_path: Path) -> None:
    source = torch.arange(MIB // 8)
    probe = Rung("buffered", MIB, source, torch.zeros_like(source))
    probe.write(str(tmp_path))
    source[5] = -1
    with pytest.raises(ProbeError, match="not what was saved"):
        probe.read(str(tmp_path))


def test_the_rung_of_the_environment_is_left_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = torch.arange(MIB // 8)
    monkeypatch.setenv("SNAPSTONE_IO", "threads-direct")
    Rung("buffered", MIB, source, torch.zeros_like(source)).write(str(tmp_path))
    assert os.environ["SNAPSTONE_IO"] == "threads-direct"
    monkeypatch.delenv("SNAPSTONE_IO")
    Rung("buffered", MIB, source, torch.zeros_like(source)).write(str(tmp_path / ".."))
    assert "SNAPSTONE_IO" not in os.environ
    shutil.rmtree(tmp_path.parent / "checkpoint")


@pytest.mark.parametrize("rung", ["buffered", pytest.param("threads-direct", marks=pytest.mark.needs_o_direct)])
def test_the_own_probe_writes_every_block_and_notices_a_short_file(tmp_path: Path, rung: str) -> None:
    probe = OwnProbe(rung, 5 * BLOCK_BYTES)
    assert probe.write(str(tmp_path)) > 0
    data = (tmp_path / "probe.data").read_bytes()
    assert len(data) == 5 * BLOCK_BYTES
    blocks = {data[at : at + BLOCK_BYTES] for at in range(0, len(data), BLOCK_BYTES)}
    assert bytes(BLOCK_BYTES) not in blocks
    assert probe.read(str(tmp_path)) > 0
    os.truncate(tmp_path / "probe.data", 5 * BLOCK_BYTES - 4096)
    with pytest.raises(OSError, match="moved 1044480 bytes instead of 1048576"):
        probe.read(str(tmp_path))


def test_ctrl_c_leaves_what_was_measured_and_no_files(tmp_path: Path) -> None:
    place = tmp_path / "place"
    place.mkdir()
    environment = {
        **os.environ,
        **path_without_fio(tmp_path),
        "PYTHONPATH": os.pathsep.join([str(Path(ss.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]),
    }
    arguments = ["bench", "disk", str(place), "--size", "1MiB", "--samples", "1000", "--out", str(tmp_path / "R")]
    process = subprocess.Popen(
        [sys.executable, "-m", "snapstone", *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        deadline = time.monotonic() + 60
        while not list(place.glob(".snapstone-bench-*/*")):
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.02)
        time.sleep(2)  # some rounds
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 130, errors
    assert list(place.iterdir()) == []
    document = results.read(tmp_path / "R" / "disk-limit.json")
    assert (document["complete"], document["problems"]) == (False, ["interrupted"])
    rows = [row for row in document["probes"] if row["tool"] == "snapstone" and row["reason"] is None]
    assert rows
    assert all(0 < len(row["bytes_per_second"]) < 1000 for row in rows)
    assert "problem: interrupted" in output


def test_the_table_has_median_and_spread(tmp_path: Path) -> None:
    result = bench_disk(tmp_path, "--size", "1MiB", "--samples", "3", env=path_without_fio(tmp_path))
    header, *rows = result.stdout.splitlines()[1:]
    assert header.split() == ["tool", "rung", "operation", "GB/s", "low", "high", "samples"]
    numbers = [row.split()[-4:] for row in rows if row.startswith("snapstone ")]
    assert len(numbers) >= 2
    assert all(float(low) <= float(middle) <= float(high) for middle, low, high, _ in numbers)
    assert {samples for *_, samples in numbers} == {"3"}
