"""`snapstone doctor`: its facts are those of the engine, and the speed test leaves nothing behind."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result

import snapstone as ss
from snapstone import _native
from snapstone.cli import machine

Run = Callable[..., Result]
RunJson = Callable[..., tuple[int, dict[str, Any]]]


def test_json_has_every_documented_key(snapstone_json: RunJson, tmp_path: Path) -> None:
    code, document = snapstone_json("doctor", tmp_path, "--no-speed")
    assert code == 0
    assert document.keys() == {
        *("schema", "directory", "versions", "cpus", "memory_available_bytes", "memlock_limit_bytes", "huge_pages"),
        *("cuda", "file_system", "io_uring", "o_direct", "hard_links", "reflinks", "rungs", "chosen", "speed"),
    }
    assert document["versions"]["snapstone"] == ss.__version__
    assert document["versions"]["torch"] == torch.__version__
    assert document["cuda"].keys() == {
        *("available", "reason", "driver_version", "devices", "torch"),
        *("batched_copies", "stream_ordered_memory", "kernel_launches"),
    }
    assert document["cuda"]["torch"] == torch.cuda.is_available()
    assert document["cuda"]["available"] == (document["cuda"]["reason"] is None)
    assert document["chosen"]["rung"] == _native.choose_rung(str(tmp_path))[0]
    assert [rung["name"] for rung in document["rungs"]] == ["uring-fixed", "uring", "threads-direct", "buffered"]
    assert all(rung["usable"] == (rung["reason"] is None) for rung in document["rungs"])
    assert document["io_uring"]["compiled_in"] == _native.uring_compiled_in()
    assert document["file_system"]["name"] == _native.file_system_facts(str(tmp_path))["name"]
    assert document["speed"] is None


def test_the_report_names_directory_file_system_and_rung(snapstone: Run, tmp_path: Path) -> None:
    result = snapstone("doctor", tmp_path, "--no-speed")
    lines = dict(line.split("  ", 1) for line in result.stdout.splitlines())
    facts = {what.strip(): value.strip() for what, value in lines.items()}
    assert facts["directory"] == str(tmp_path)
    assert facts["rung"] == _native.choose_rung(str(tmp_path))[0]
    assert facts["CUDA"].startswith(("no: ", "driver for "))


def test_speed_is_measured_in_a_directory_that_goes_again(
    snapstone_json: RunJson, snapstone: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "SPEED_TEST_BYTES", 8 << 20)
    code, document = snapstone_json("doctor", tmp_path)
    assert code == 0
    assert document["speed"]["nbytes"] == 8 << 20
    assert document["speed"]["write_bytes_per_second"] > 0
    assert document["speed"]["read_bytes_per_second"] > 0
    assert document["speed"]["identical"] is True
    assert "GB/s (8.0 MiB, durable)" in snapstone("doctor", tmp_path).stdout
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_not_written_to(tmp_path: Path) -> None:
    assert machine.speed_of(str(tmp_path), 1 << 20) == {"nbytes": 0, "skipped": "only 1048576 bytes are free"}
    assert list(tmp_path.iterdir()) == []


def test_a_failing_save_is_an_io_error_and_leaves_nothing(
    snapstone: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "SPEED_TEST_BYTES", 8 << 20)
    _native.choose_rung(str(tmp_path))  # cached: its probe is not what fails
    _native.fault_arm("fsync:3+:errno=ENOSPC")
    try:
        result = snapstone("doctor", tmp_path)
    finally:
        _native.fault_disarm()
    assert result.exit_code == 4
    assert "No space left on device" in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_forced_rung_is_named(snapstone: Run, tmp_path: Path) -> None:
    result = snapstone("doctor", tmp_path, "--no-speed", env={"SNAPSTONE_IO": "buffered"})
    assert result.exit_code == 0
    assert "buffered (SNAPSTONE_IO)" in result.stdout


def test_a_rung_that_does_not_exist_is_wrong_usage(snapstone: Run, tmp_path: Path) -> None:
    result = snapstone("doctor", tmp_path, "--no-speed", env={"SNAPSTONE_IO": "floppy"})
    assert result.exit_code == 2
    assert "floppy" in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_links_are_really_tried_and_say_what_delta_saves_get(snapstone: Run, tmp_path: Path) -> None:
    _native.choose_rung(str(tmp_path))
    text = snapstone("doctor", tmp_path, "--no-speed").stdout
    assert re.search(r"^hard links +yes; a delta save writes only what changed$", text, re.MULTILINE)
    _native.fault_arm("link:1:errno=EPERM;ioctl:1:errno=EOPNOTSUPP")
    try:
        text = snapstone("doctor", tmp_path, "--no-speed").stdout
        assert (_native.fault_seen("link"), _native.fault_seen("ioctl")) == (1, 1)
    finally:
        _native.fault_disarm()
    assert re.search(r"^hard links +no: Operation not permitted .*; every save is a full one$", text, re.MULTILINE)
    assert re.search(r"^reflinks +no: Operation not supported .*; compact copies bytes$", text, re.MULTILINE)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not os.path.isdir("/dev/shm"), reason="no memory file system at its usual place")
def test_memory_file_systems_say_so(snapstone: Run) -> None:
    result = snapstone("doctor", "/dev/shm", "--no-speed")
    assert "nothing here survives a reboot" in result.stdout
    assert "passed over" in result.stdout
