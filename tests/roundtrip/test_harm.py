"""What a save must not do to others: to things in its way, to the trainer's memory, to forked children."""

from __future__ import annotations

import gc
import os
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from torch import nn, optim

import snapstone as ss
from snapstone import _native, writer


def test_a_directory_that_holds_more_than_a_checkpoint_is_not_replaced(tmp_path: Path) -> None:
    ss.save({"t": torch.ones(1)}, checkpoint_id=tmp_path / "run")
    (tmp_path / "run" / "notes.txt").write_text("only copy")
    foreign = tmp_path / "thesis"
    foreign.mkdir()
    (foreign / "MANIFEST.json").write_text("{}")
    (foreign / "only_copy.txt").write_text("x")
    for path in (tmp_path / "run", foreign):
        before = sorted(os.listdir(path))
        with pytest.raises(FileExistsError, match="holds other things"):
            ss.save({"t": torch.zeros(1)}, checkpoint_id=path, overwrite=True)
        assert sorted(os.listdir(path)) == before


def test_nothing_is_saved_into_a_checkpoint(tmp_path: Path) -> None:
    ss.save({"t": torch.ones(1)}, checkpoint_id=tmp_path / "run")
    with pytest.raises(ValueError, match="is a checkpoint, which holds nothing else"):
        ss.save({"t": torch.ones(1)}, checkpoint_id=tmp_path / "run" / "step-1")
    assert ss.verify(tmp_path / "run")


def test_a_damaged_checkpoint_can_be_replaced(tmp_path: Path) -> None:
    ss.save({"t": torch.ones(1)}, checkpoint_id=tmp_path / "c")
    (tmp_path / "c" / "MANIFEST.json").write_text("{")
    ss.save({"t": torch.zeros(1)}, checkpoint_id=tmp_path / "c", overwrite=True)
    assert ss.Checkpoint.open(tmp_path / "c").get_tensor("t").item() == 0


@pytest.fixture
def slow_writes() -> Iterator[None]:
    _native.fault_arm("uring_write:1+:delay=20;pwrite:1+:delay=20")
    yield
    _native.fault_disarm()


@pytest.mark.usefixtures("slow_writes")
def test_memory_that_the_trainer_swaps_out_is_kept_until_it_is_copied(tmp_path: Path) -> None:
    parameters = [nn.Parameter(torch.full((1 << 20,), float(number))) for number in range(24)]
    optimizer = optim.SGD(parameters, lr=1.0)
    state = {"m": {str(number): parameter for number, parameter in enumerate(parameters)}}
    handle = ss.async_save(state, checkpoint_id=tmp_path / "c", fence=optimizer, host_memory_budget=8 << 20)
    while handle.stats.get("predicted_stall_seconds", "unset") == "unset" and not handle.done():
        pass  # until the addresses have been taken
    for parameter in parameters:
        parameter.data = torch.empty(0)
    handle.result(60)
    opened = ss.Checkpoint.open(tmp_path / "c")
    stored = [opened.get_tensor(f"m.{number}") for number in range(len(parameters))]
    assert all((tensor == number).all() for number, tensor in enumerate(stored))


def open_below(directory: Path) -> list[str]:
    """What this process holds open in the directory; other tests' threads hold what they like."""
    found = []
    for number in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):  # the descriptor that listed them
            found.append(os.readlink(f"/proc/self/fd/{number}"))
    return [name for name in found if name.startswith(str(directory))]


def test_failed_saves_keep_no_descriptors_without_the_collector(tmp_path: Path) -> None:
    ss.save({"t": torch.ones(1)}, checkpoint_id=tmp_path / "warm")
    gc.collect()
    gc.disable()
    try:
        for _ in range(5):
            _native.fault_arm("fsync:1:errno=EIO")
            with pytest.raises(OSError, match="fsync"):
                ss.save({"t": torch.ones(1)}, checkpoint_id=tmp_path / "c")
        assert open_below(tmp_path) == []
    finally:
        _native.fault_disarm()
        gc.enable()


def test_a_step_after_an_interrupted_call_does_not_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parameter = nn.Parameter(torch.ones(3))
    optimizer = optim.SGD([parameter])

    start = threading.Thread.start

    def interrupted(thread: threading.Thread) -> None:
        if thread.name == "snapstone-save":
            raise KeyboardInterrupt
        start(thread)

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", interrupted)
        with pytest.raises(KeyboardInterrupt):
            ss.async_save({"w": parameter}, checkpoint_id=tmp_path / "c", fence=optimizer)
    optimizer.step()
    ss.wait(5)
    assert os.listdir(tmp_path) == []


@pytest.mark.usefixtures("slow_writes")
def test_tensors_are_let_go_once_they_are_copied_and_not_when_they_are_written(tmp_path: Path) -> None:
    tensor = torch.ones(8 << 20)
    kept = weakref.ref(tensor)
    handle = ss.async_save({"w": tensor}, checkpoint_id=tmp_path / "c")
    handle.staging_completion.result(60)
    del tensor
    end = time.monotonic() + 5
    while kept() is not None and time.monotonic() < end:
        time.sleep(0.001)
    assert kept() is None
    assert not handle.upload_completion.done()
    handle.result(60)


CHUNK_BYTES = 1 << 16
CHUNKS_IN_FLIGHT_MAX = 512  # which may be written after the save has ended


def written() -> int:
    return int(_native.fault_seen("uring_write") + _native.fault_seen("pwrite"))


@pytest.fixture
def many_chunks(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, torch.Tensor]]:
    """A state that takes seconds to write."""
    monkeypatch.setenv("SNAPSTONE_CHUNK_BYTES", str(CHUNK_BYTES))
    _native.fault_arm("uring_write:1+:delay=4;pwrite:1+:delay=4")
    yield {"w": torch.ones(8 * CHUNKS_IN_FLIGHT_MAX * CHUNK_BYTES, dtype=torch.uint8)}
    _native.fault_disarm()


def test_a_cancelled_save_writes_no_further(tmp_path: Path, many_chunks: dict[str, torch.Tensor]) -> None:
    handle = ss.async_save(many_chunks, checkpoint_id=tmp_path / "c")
    assert handle.cancel()
    before = written()
    with pytest.raises(ss.CheckpointError, match="cancelled"):
        handle.result(60)
    assert written() - before < 2 * CHUNKS_IN_FLIGHT_MAX


def test_a_cancel_between_the_last_vote_and_the_commit_leaves_nothing_visible(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    voted, go = threading.Event(), threading.Event()

    def wait(*_: object, **__: object) -> None:
        voted.set()
        assert go.wait(20)

    monkeypatch.setattr(writer, "heed_unchanged", wait)
    handle = ss.async_save({"t": torch.ones(3)}, checkpoint_id=tmp_path / "c")
    assert voted.wait(20)
    assert handle.cancel()
    go.set()
    with pytest.raises(ss.CheckpointError, match="cancelled"):
        handle.result(30)
    assert [name for name in os.listdir(tmp_path) if not name.startswith(".")] == []


def test_a_save_that_its_callback_ends_writes_no_further(tmp_path: Path, many_chunks: dict[str, torch.Tensor]) -> None:
    def fails(done: int, total: int) -> None:
        raise ValueError("enough")

    with pytest.raises(ValueError, match="enough") as caught:
        ss.save(many_chunks, checkpoint_id=tmp_path / "c", progress=fails)
    before, now = -1, written()
    while before < now:
        time.sleep(1.5)
        before, now = now, written()
    assert now < 2 * CHUNKS_IN_FLIGHT_MAX
    assert caught.value.__traceback__ is not None  # the frames in it are no reason to go on


@pytest.mark.usefixtures("slow_writes")
def test_a_forked_child_waits_for_nothing(tmp_path: Path) -> None:
    parameter = nn.Parameter(torch.ones(8 << 20))
    optimizer = optim.SGD([parameter])
    handle = ss.async_save({"w": parameter}, checkpoint_id=tmp_path / "c", fence=optimizer, host_memory_budget=8 << 20)
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)
        optimizer.step()
        ss.wait(0)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    handle.result(60)
    assert (ss.Checkpoint.open(tmp_path / "c").get_tensor("w") == 1).all()
