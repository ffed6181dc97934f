"""What a save of tensors on CUDA devices holds, whatever happens to them afterwards.

Training goes on at once in every test: what it writes is ordered by streams alone, and the host waits for nothing but
the save. On the fake driver a copy that something does not order is a violation even where its bytes were right.
"""

from __future__ import annotations

import threading
import time
import weakref
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch

import snapstone as ss
from cuda.device import Devices
from cuda.states import (
    CODECS,
    KIB,
    MIB,
    adamw,
    assert_same,
    assert_saved,
    crowd,
    host_copy,
    model,
    numbers,
    save,
    scribble,
    state_of,
)
from snapstone import _native, devices


def test_a_save_holds_what_the_stream_had_made_of_the_state(device: Devices, tmp_path: Path) -> None:
    state, host = model(device.cuda)
    state["large"].zero_()
    device.delay(0.02)
    state["large"].copy_(host["large"].to(device.cuda))
    saved = ss.save(state, checkpoint_id=tmp_path / "c")
    scribble(state)
    assert_saved(tmp_path / "c", host)
    found = saved.stats["devices"]
    assert found["ordinals"] == [0]
    assert found["bytes"] == sum(tensor.nbytes for name, tensor in host.items() if name != "on_host")
    assert "cuda_unused" not in saved.stats


def test_the_stream_may_change_the_state_when_async_save_returns(device: Devices, tmp_path: Path) -> None:
    ss.prepare("cuda", 32 * MIB)
    for step in range(3):
        state, host = model(device.cuda)
        handle = ss.async_save(state, checkpoint_id=tmp_path / f"c{step}")
        scribble(state)
        handle.staging_completion.result()
        scribble(state)
        handle.result()
        assert_saved(tmp_path / f"c{step}", host)


def test_several_devices_and_streams_that_are_not_the_default_ones(device: Devices, tmp_path: Path) -> None:
    first, second = torch.cuda.Stream(device.cuda), torch.cuda.Stream(device.other)
    with torch.cuda.stream(first), torch.cuda.stream(second):
        state, host = model(device.cuda, other=device.other)
        state["matrix"].zero_()
        device.delay(0.02, second)
        state["matrix"].copy_(host["matrix"].to(device.other))
        handle = ss.async_save(state, checkpoint_id=tmp_path / "c")
        scribble(state)
    handle.result()
    assert_saved(tmp_path / "c", host)
    assert handle.stats["devices"]["ordinals"] == sorted({device.cuda.index, device.other.index})


@pytest.mark.parametrize("wait_first", [False, True])
def test_memory_that_is_freed_after_the_call_is_saved_all_the_same(
    device: Devices, tmp_path: Path, wait_first: bool
) -> None:
    state, host = model(device.cuda)
    torch.cuda.synchronize()
    addresses = {tensor.data_ptr() for tensor in state.values() if tensor.is_cuda}
    handle = ss.async_save(state, checkpoint_id=tmp_path / "c")
    gone = weakref.ref(state["large"])
    state.clear()
    if wait_first:
        handle.staging_completion.result()
    again = [torch.full((3 * MIB + 17,), 7, dtype=torch.uint8, device=device.cuda) for _ in range(4)]
    handle.result()
    assert gone() is None
    assert_saved(tmp_path / "c", host)
    if wait_first:
        assert any(tensor.data_ptr() in addresses for tensor in again)  # the save let go of it


def test_an_optimizers_step_comes_after_the_snapshot(device: Devices, tmp_path: Path) -> None:
    stream = torch.cuda.Stream(device.cuda)
    with torch.cuda.stream(stream):
        optimizer = adamw(device.cuda)
        running = torch.arange(1000.0).to(device.cuda)
        state = state_of(optimizer, running)
        for step in range(3):
            expected = host_copy(device, state)
            device.delay(0.01)
            handle = ss.async_save(state, checkpoint_id=tmp_path / f"c{step}", fence=optimizer)
            running.add_(1)  # volatile: may change at once
            optimizer.step()
            handle.result()
            loaded = ss.Checkpoint.open(tmp_path / f"c{step}").state_dict()
            assert_same(expected, loaded)


def test_parameters_that_are_not_contiguous_are_saved_behind_a_fence(device: Devices, tmp_path: Path) -> None:
    matrix = numbers(2 * KIB).float().reshape(32, -1)
    parameter = torch.nn.Parameter(matrix.to(device.cuda).t())
    assert not parameter.is_contiguous()
    optimizer = torch.optim.SGD([parameter], lr=1.0, foreach=False)
    parameter.grad = torch.ones_like(parameter)
    device.delay(0.02)
    handle = ss.async_save({"p": parameter}, checkpoint_id=tmp_path / "c", fence=optimizer)
    optimizer.step()
    handle.result()
    assert_saved(tmp_path / "c", {"p": matrix.t()})
    assert torch.equal(device.on_host(parameter.detach()), matrix.t() - 1)


def test_copies_behind_a_fence_take_one_stream_for_good(device: Devices, tmp_path: Path) -> None:
    parameter = torch.nn.Parameter(torch.zeros(64, 32, device=device.cuda).t())
    optimizer = torch.optim.SGD([parameter], lr=1.0, foreach=False)
    made: set[int] = set()
    for step in range(3):
        device.delay(0.005)
        parameter.detach().copy_(torch.full((32, 64), float(step)))
        handle = ss.async_save({"p": parameter}, checkpoint_id=tmp_path / f"c{step}", fence=optimizer)
        optimizer.step()
        handle.result()
        assert_saved(tmp_path / f"c{step}", {"p": torch.full((32, 64), float(step))})
        made.add(_native.cuda_stream(0))
        assert devices._side_stream(0).cuda_stream in made
    assert len(made) == 1


def test_lazy_conjugation_and_negation_are_resolved_on_the_device(device: Devices, tmp_path: Path) -> None:
    host = torch.view_as_complex(torch.arange(200.0).reshape(100, 2))
    on_device = host.to(device.cuda)
    lazy = {"conj": on_device.conj(), "neg": on_device.conj().imag}
    assert lazy["conj"].is_conj()
    assert lazy["neg"].is_neg()
    ss.async_save(lazy, checkpoint_id=tmp_path / "c").result()
    saved = ss.Checkpoint.open(tmp_path / "c").load_tensors()
    assert torch.equal(saved["conj"], host.conj().resolve_conj())
    assert torch.equal(saved["neg"], -host.imag)


def test_a_capturable_optimizer_is_no_fence(device: Devices, tmp_path: Path) -> None:
    optimizer = adamw(device.cuda)
    optimizer.param_groups[0]["capturable"] = True
    with pytest.raises(ValueError, match='use fence="now"'):
        ss.async_save({"p": torch.zeros(3)}, checkpoint_id=tmp_path / "c", fence=optimizer)


@pytest.mark.parametrize("fence", ["sync", "now", "optimizer"])
def test_a_save_inside_a_capture_is_refused(device: Devices, tmp_path: Path, fence: str) -> None:
    optimizer = adamw(device.cuda)
    state = state_of(optimizer, torch.zeros(8, device=device.cuda))
    torch.cuda.synchronize()
    how = optimizer if fence == "optimizer" else fence
    with (
        device.capturing(torch.cuda.Stream(device.cuda)),
        pytest.raises(RuntimeError, match="save before or after the capture"),
    ):
        save(how, state, tmp_path / "c")
    assert not (tmp_path / "c").exists()
    ss.save(state, checkpoint_id=tmp_path / "c")


def test_a_capture_may_begin_while_a_save_is_under_way(device: Devices, tmp_path: Path) -> None:
    state, host = model(device.cuda)
    stream = torch.cuda.Stream(device.cuda)
    torch.cuda.synchronize()
    handle = ss.async_save(state, checkpoint_id=tmp_path / "c")
    with device.capturing(stream):
        handle.result()
    assert_saved(tmp_path / "c", host)


def test_a_save_prepared_in_the_background_leaves_captures_of_other_threads_alone(
    device: Devices, tmp_path: Path
) -> None:
    """It has torch copy what is not contiguous, for which torch may allocate memory, which ends captures."""
    matrix = numbers(3000).float().reshape(60, -1)
    parameter = torch.nn.Parameter(matrix.to(device.cuda).t())
    optimizer = torch.optim.SGD([parameter], lr=1.0, foreach=False)
    torch.cuda.synchronize()
    captured, done = threading.Event(), threading.Event()
    failures: list[BaseException] = []

    def capture() -> None:
        try:
            with device.capturing(torch.cuda.Stream(device.cuda)):
                captured.set()
                done.wait(60)
        except BaseException as failure:
            failures.append(failure)
        finally:
            captured.set()

    thread = threading.Thread(target=capture)
    thread.start()
    try:
        captured.wait(60)
        ss.async_save({"p": parameter}, checkpoint_id=tmp_path / "c", fence=optimizer).result()
    finally:
        done.set()
        thread.join()
    assert failures == []
    assert_saved(tmp_path / "c", {"p": matrix.t()})


def test_background_saves_copy_in_the_same_stream_each_time(device: Devices, tmp_path: Path) -> None:
    """So that what torch keeps of the memory of one save is there for the next."""
    parameter = torch.nn.Parameter(numbers(KIB).float().reshape(32, -1).to(device.cuda).t())
    optimizer = torch.optim.SGD([parameter], lr=1.0, foreach=False)
    streams = set()
    stream_of = torch.cuda.stream

    def seen(stream: torch.cuda.Stream | None) -> AbstractContextManager[None]:
        streams.add(stream)
        return stream_of(stream)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "stream", seen)
        for turn in range(3):
            ss.async_save({"p": parameter}, checkpoint_id=tmp_path / f"c{turn}", fence=optimizer).result()
    assert len({stream for stream in streams if stream is not None and stream.device == device.cuda}) == 1


def test_tensors_that_lie_next_to_each_other_are_copied_one_by_one(
    device: Devices, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Allocations of their own may, and the driver refuses a copy out of two of them."""
    monkeypatch.setenv("SNAPSTONE_CHUNK_BYTES", str(MIB))
    ss.prepare(device.cuda, 32 * MIB)
    host = {str(i): numbers(2 * MIB, i) for i in range(8)}
    state = {name: tensor.to(device.cuda) for name, tensor in host.items()}
    ss.save(state, checkpoint_id=tmp_path / "sync")
    assert_saved(tmp_path / "sync", host)
    handle = ss.async_save(state, checkpoint_id=tmp_path / "now", host_memory_budget=8 * MIB)
    scribble(state)
    handle.result()
    assert_saved(tmp_path / "now", host)


def test_a_torch_for_other_devices_copies_to_the_host_itself(device: Devices, tmp_path: Path) -> None:
    """Tensors of torch for ROCm say that they are on CUDA."""
    state, host = model(device.cuda)
    devices.absence.cache_clear()
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.version, "hip", "6.4")
            saved = ss.save(state, checkpoint_id=tmp_path / "c")
            ss.load(state, checkpoint_id=tmp_path / "c")
    finally:
        devices.absence.cache_clear()
    assert "ROCm" in saved.stats["cuda_unused"]
    assert_saved(tmp_path / "c", host)


def test_volatile_state_is_copied_on_the_device_at_the_call(device: Devices, tmp_path: Path) -> None:
    optimizer = adamw(device.cuda)
    running = torch.arange(1000.0).to(device.cuda)
    state = state_of(optimizer, running)
    device.delay(0.02)
    running.add_(5)
    handle = ss.async_save(state, checkpoint_id=tmp_path / "c", fence=optimizer)
    running.zero_()
    handle.result()
    saved = ss.Checkpoint.open(tmp_path / "c").state_dict()
    assert torch.equal(saved["buffers"]["running"], torch.arange(1000.0) + 5)


def test_a_prepared_save_leaves_nothing_for_later(device: Devices, tmp_path: Path) -> None:
    ss.prepare(device.cuda, 32 * MIB)
    state, host = model(device.cuda)
    ss.save(state, checkpoint_id=tmp_path / "warm")  # what a first save from a device makes is made
    handle = ss.async_save(state, checkpoint_id=tmp_path / "c")
    scribble(state)
    handle.result()
    found = handle.stats["devices"]
    assert found["late_bytes"] == found["unregistered_bytes"] == found["overflow_bytes"] == 0
    assert found["refusal"] == ""
    assert found["copied_bytes"] >= found["bytes"]
    assert_saved(tmp_path / "c", host)


def test_what_finds_no_staging_memory_waits_in_device_memory(
    device: Devices, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SNAPSTONE_CHUNK_BYTES", str(64 * KIB))
    ss.prepare(device.cuda, 4 * MIB)
    state, host = crowd(device.cuda, 64 * KIB)
    handle = ss.async_save(state, checkpoint_id=tmp_path / "c", host_memory_budget=MIB)
    scribble(state)
    handle.result()
    assert handle.stats["devices"]["overflow_bytes"] > 0
    assert handle.stats["devices"]["late_bytes"] == 0
    assert_saved(tmp_path / "c", host)


@pytest.mark.parametrize("refused", ["fraction", "memory"])
def test_without_device_memory_the_caller_waits_for_the_file(
    device: Devices, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: str
) -> None:
    monkeypatch.setenv("SNAPSTONE_CHUNK_BYTES", str(64 * KIB))
    state, host = crowd(device.cuda, 64 * KIB)
    if refused == "fraction":
        monkeypatch.setenv("SNAPSTONE_HBM_FRACTION", "0")
    else:
        _native.fault_arm("cuMemAllocAsync:1+:errno=2")
    handle = ss.async_save(state, checkpoint_id=tmp_path / "c", host_memory_budget=MIB)
    scribble(state)
    handle.result()
    assert handle.stats["devices"]["overflow_bytes"] == 0
    assert handle.stats["devices"]["late_bytes"] > 0
    assert_saved(tmp_path / "c", host)


@pytest.mark.parametrize("digest", ["host", "device", "auto"])
@pytest.mark.parametrize("codec", CODECS)
def test_digests_and_codecs(
    device: Devices, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, digest: str, codec: str | None
) -> None:
    monkeypatch.setenv("SNAPSTONE_DIGEST", digest)
    state, host = model(device.cuda, other=device.other)
    handle = ss.async_save(state, checkpoint_id=tmp_path / "c", codec=codec)
    scribble(state)
    handle.result()
    assert (handle.stats["devices"]["digested_bytes"] > 0) == (digest != "host")
    assert_saved(tmp_path / "c", host)
    assert ss.verify(tmp_path / "c")


def test_a_delta_save_leaves_what_did_not_change_on_the_device(device: Devices, tmp_path: Path) -> None:
    state, host = model(device.cuda)
    ss.save(state, checkpoint_id=tmp_path / "base")
    host["small"] = numbers(700, 77)
    state["small"].copy_(host["small"].to(device.cuda))
    saved = ss.save(state, checkpoint_id=tmp_path / "c", base=tmp_path / "base")
    scribble(state)
    assert_saved(tmp_path / "c", host)
    assert saved.stats["unchanged_chunks"] >= 3
    assert saved.stats["devices"]["copied_bytes"] < 2 * MIB


@pytest.mark.parametrize("fence", ["now", "optimizer"])
def test_delta_saves_behind_fences(device: Devices, tmp_path: Path, fence: str) -> None:
    optimizer = adamw(device.cuda, nbytes=512 * KIB)
    state = state_of(optimizer, torch.zeros(8, device=device.cuda))
    ss.save(state, checkpoint_id=tmp_path / "c0")
    for step in range(1, 4):
        expected = host_copy(device, state)
        handle = ss.async_save(
            state,
            checkpoint_id=tmp_path / f"c{step}",
            base="auto",
            fence=optimizer if fence == "optimizer" else "now",
            on_unchanged="ignore",
        )
        if step != 1:
            optimizer.step()
        handle.result()
        assert_same(expected, ss.Checkpoint.open(tmp_path / f"c{step}").state_dict())


def test_derived_parameters_stay_on_the_device(device: Devices, tmp_path: Path) -> None:
    master = (numbers(64 * KIB, 1).float() / 7).reshape(256, 256)
    state = {"master": master.to(device.cuda), "p": master.to(device.cuda).bfloat16()}
    handle = ss.async_save(state, checkpoint_id=tmp_path / "c", derive=True)
    scribble(state)
    handle.result()
    assert handle.stats["derived_bytes"] == master.numel() * 2
    assert_saved(tmp_path / "c", {"master": master, "p": master.bfloat16()})


def test_the_call_does_not_wait_for_the_device(device: Devices, tmp_path: Path) -> None:
    ss.prepare(device.cuda, 32 * MIB)
    optimizer = adamw(device.cuda)
    state = state_of(optimizer, torch.zeros(8, device=device.cuda))
    for fence in ("now", optimizer):
        ss.async_save(state, checkpoint_id=tmp_path / f"{type(fence).__name__}-warm", fence=fence).result()
        torch.cuda.synchronize()
        begin = time.monotonic()
        device.delay(2.0)
        handle = ss.async_save(state, checkpoint_id=tmp_path / type(fence).__name__, fence=fence)
        called = time.monotonic() - begin
        assert not handle.staging_completion.done()
        handle.result()
        assert called < 1.5
        assert time.monotonic() - begin >= 1.5


def test_a_step_is_enqueued_without_waiting_for_the_snapshot(device: Devices, tmp_path: Path) -> None:
    ss.prepare(device.cuda, 32 * MIB)
    parameter = torch.nn.Parameter(torch.zeros(1000, device=device.cuda))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    ss.save({"p": parameter}, checkpoint_id=tmp_path / "warm")
    torch.cuda.synchronize()
    begin = time.monotonic()
    device.delay(2.0)
    handle = ss.async_save({"p": parameter}, checkpoint_id=tmp_path / "c", fence=optimizer)
    optimizer.step()  # without gradients: nothing but the hook
    parameter.detach().fill_(1)
    assert time.monotonic() - begin < 1.5
    handle.result()
    assert_saved(tmp_path / "c", {"p": torch.zeros(1000)})


def test_saves_of_several_threads_follow_their_own_streams(device: Devices, tmp_path: Path) -> None:
    failures: list[BaseException] = []

    def train(number: int) -> None:
        try:
            stream = torch.cuda.Stream(device.cuda)
            with torch.cuda.stream(stream):
                for step in range(3):
                    state, host = model(device.cuda, seed=10 * number + step)
                    state["large"].zero_()
                    device.delay(0.005, stream)
                    state["large"].copy_(host["large"].to(device.cuda))
                    handle = ss.async_save(state, checkpoint_id=tmp_path / f"{number}-{step}")
                    scribble(state)
                    handle.result()
                    assert_saved(tmp_path / f"{number}-{step}", host)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=train, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_what_a_device_lacks_is_an_argument_that_is_refused(device: Devices) -> None:
    with pytest.raises(ValueError, match="cpu and cuda"):
        ss.prepare("meta")
    with pytest.raises(ss.CudaError, match="INVALID_DEVICE"):
        ss.prepare("cuda:63", MIB)
