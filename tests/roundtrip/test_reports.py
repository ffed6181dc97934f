"""What an operation tells about itself, progress and trace, and what `prepare` does ahead of it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import snapstone as ss
from snapstone import _native

NBYTES = 24 << 20


def state() -> dict[str, Any]:
    return {"w": torch.arange(NBYTES // 4, dtype=torch.int32), "step": 3}


def test_progress_of_a_save_and_a_load_grows_to_the_total(tmp_path: Path) -> None:
    reports: list[tuple[int, int]] = []
    ss.save(state(), checkpoint_id=tmp_path / "c", progress=lambda done, total: reports.append((done, total)))
    saved, reports[:] = [*reports], []
    ss.load(state(), checkpoint_id=tmp_path / "c", progress=lambda done, total: reports.append((done, total)))
    for seen in (saved, reports):
        assert seen[-1] == (NBYTES, NBYTES)
        assert {total for _, total in seen} == {NBYTES}
        assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_progress_of_a_verify_grows_to_the_total(tmp_path: Path) -> None:
    ss.save(state(), checkpoint_id=tmp_path / "c")
    stored = (tmp_path / "c" / "rank-00000.data").stat().st_size
    reports: list[tuple[int, int]] = []
    assert ss.verify(tmp_path / "c", progress=lambda done, total: reports.append((done, total)))
    assert reports[-1] == (stored, stored)
    assert reports == sorted(reports)


def test_an_error_of_the_progress_callback_ends_the_save(tmp_path: Path) -> None:
    def refuse(done: int, total: int) -> None:
        raise KeyError("no more")

    with pytest.raises(KeyError, match="no more"):
        ss.save(state(), checkpoint_id=tmp_path / "c", progress=refuse)
    assert list(tmp_path.iterdir()) == []


def test_the_trace_is_valid_json_after_every_operation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "trace.json"
    monkeypatch.setenv("SNAPSTONE_TRACE", str(path))
    counts = []

    def refused() -> None:
        with pytest.raises(FileExistsError):
            ss.save(state(), checkpoint_id=tmp_path / "c")

    operations = [
        lambda: ss.save(state(), checkpoint_id=tmp_path / "c"),
        lambda: ss.async_save(state(), checkpoint_id=tmp_path / "d").result(60),
        lambda: ss.load(state(), checkpoint_id=tmp_path / "c"),
        refused,
    ]
    for operation in operations:
        operation()
        events = json.loads(path.read_text())
        counts.append(len(events))
    assert counts == sorted(set(counts))
    whole = [event for event in events if event["tid"] == "operation"]
    assert [event["name"] for event in whole] == ["save", "save", "load", "save"]
    rungs = [event["args"]["rung"] for event in whole]
    assert rungs[:3] == [_native.choose_rung(str(tmp_path))[0]] * 3
    assert rungs[3] is None  # refused before one was chosen
    for kind, stages in (("save", {"plan", "stage", "write", "sync", "vote", "commit"}), ("load", {"read", "scatter"})):
        inside = [event for event in events if event["cat"] == kind and event["tid"] != "operation"]
        assert stages <= {event["name"] for event in inside}
        assert all(event["ph"] == "X" and event["dur"] >= 0 for event in inside)
    staged = sum(event["args"]["bytes"] for event in events if event["name"] == "stage")
    assert staged == 2 * NBYTES
    first = whole[0]
    for event in events[: counts[0]]:
        assert first["ts"] <= event["ts"]
        assert event["ts"] + event["dur"] <= first["ts"] + first["dur"]


def test_a_save_after_prepare_needs_no_more_memory(tmp_path: Path) -> None:
    ss.prepare(nbytes=2 * NBYTES)
    before = _native.ring_facts()
    ss.async_save(state(), checkpoint_id=tmp_path / "c").result(60)
    after = _native.ring_facts()
    assert before["nbytes"] >= 2 * NBYTES
    assert after["nbytes"] == before["nbytes"]
    with pytest.raises(ValueError, match="nbytes=-1"):
        ss.prepare(nbytes=-1)


@pytest.mark.parametrize("step", [1.5, "x", True, 1 << 63, -(1 << 63) - 1])
def test_a_step_that_no_manifest_can_hold_is_refused_and_harms_nothing(tmp_path: Path, step: Any) -> None:
    ss.save({"t": torch.ones(1)}, checkpoint_id=tmp_path / "c", step=7)
    with pytest.raises((TypeError, ValueError)):
        ss.save({"t": torch.zeros(1)}, checkpoint_id=tmp_path / "c", step=step, overwrite=True)
    opened = ss.Checkpoint.open(tmp_path / "c")
    assert (opened.step, opened.get_tensor("t").item()) == (7, 1)


def test_any_integer_is_a_step_and_a_value_of_the_state_only_if_it_fits(tmp_path: Path) -> None:
    assert ss.save({"t": torch.ones(1)}, checkpoint_id=tmp_path / "a", step=torch.tensor(4)).step == 4
    assert ss.save({"step": 1 << 63}, checkpoint_id=tmp_path / "b").step is None
    assert ss.Checkpoint.open(tmp_path / "b").state_dict() == {"step": 1 << 63}


def test_a_manifest_that_no_reader_takes_is_not_committed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from snapstone import manifest

    broken = manifest.FileEntry("../x", 1, "0" * 32)
    monkeypatch.setattr(manifest.FileEntry, "to_json", lambda self: {"name": broken.name, "nbytes": 1, "xxh128": "0"})
    with pytest.raises(ValueError, match="not allowed"):
        ss.save({"t": torch.ones(1)}, checkpoint_id=tmp_path / "c")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("metadata", [{1: "a", "1": "b"}, [1]])
def test_metadata_is_a_mapping_with_string_keys(tmp_path: Path, metadata: Any) -> None:
    with pytest.raises(TypeError, match="metadata"):
        ss.save({"t": torch.ones(1)}, checkpoint_id=tmp_path / "c", metadata=metadata)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("SNAPSTONE_TIMEOUT", "0"),
        ("SNAPSTONE_TIMEOUT", "nan"),
        ("SNAPSTONE_TIMEOUT", "soon"),
        ("SNAPSTONE_CHUNK_BYTES", "0"),
        ("SNAPSTONE_CHUNK_BYTES", "5"),
        ("SNAPSTONE_CHUNK_BYTES", "-4096"),
        ("SNAPSTONE_CHUNK_BYTES", str(1 << 40)),
        ("SNAPSTONE_HOST_MEMORY_BUDGET", "much"),
    ],
)
def test_a_wrong_environment_variable_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    for call in (lambda: ss.save({"t": torch.ones(1)}, checkpoint_id=tmp_path / "c"), ss.prepare):
        with pytest.raises(ValueError, match=name):
            call()


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("SNAPSTONE_DMA_BYTES", "0", "must be between 1048576 and 33554432"),
        ("SNAPSTONE_DMA_BYTES", str(1 << 30), "must be between 1048576 and 33554432"),
        ("SNAPSTONE_DMA_GBPS", "-1", "must be a number from 0 to 1e+06"),
        ("SNAPSTONE_DMA_GBPS", "fast", "must be a number from 0 to 1e+06"),
        ("SNAPSTONE_HBM_FRACTION", "1.5", "must be a number from 0 to 1"),
        ("SNAPSTONE_HBM_FRACTION", "nan", "must be a number from 0 to 1"),
        ("SNAPSTONE_DIGEST", "cpu", "use 'auto', 'host' or 'device'"),
    ],
)
def test_a_wrong_variable_about_devices_is_named_where_there_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str, reason: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=rf"^{name}='?{value}'?: {re.escape(reason)}$"):
        ss.save({"t": torch.ones(1)}, checkpoint_id=tmp_path / "c")
    assert list(tmp_path.iterdir()) == []


def test_a_level_of_verify_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    ss.save({"t": torch.ones(1)}, checkpoint_id=tmp_path / "c")
    with pytest.raises(ValueError, match="level='deep': use 'quick' or 'full'"):
        ss.verify(tmp_path / "c", level="deep")  # type: ignore[arg-type]
