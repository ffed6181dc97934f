"""Saves and loads that between them need every wait, record, poll and keep-alive of the engine; for test_steps.py.

Each is a whole use of the engine, as trainers make them, that is right in any order of work which is allowed. Those in
`FAILING` meet calls of the driver that fail, and leave behind what the devices may use for ever.
"""

from __future__ import annotations

import gc
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

import pytest
import torch

import snapstone as ss
from cuda.device import Devices
from cuda.left_out import calls_fail
from cuda.states import CODECS, KIB, Tensors, adamw, assert_same, assert_saved, host_copy, numbers, scribble, state_of

__all__ = ["CHUNK_BYTES", "FAILING", "SCENARIOS", "Scenario"]

Scenario = Callable[[Devices, Path], None]

CHUNK_BYTES = 64 * KIB  # SNAPSTONE_CHUNK_BYTES of whoever runs these
BUDGET = 24 * CHUNK_BYTES
LEAST = 8 * CHUNK_BYTES


def _tensors(device: Devices, chunks: int, seed: int = 0) -> tuple[Tensors, Tensors]:
    """On the devices with work before it that is late, and what it is."""
    host = {
        "large": numbers(chunks * CHUNK_BYTES + 17, seed),
        "other": numbers(5 * CHUNK_BYTES, seed + 1),
        **{f"tiny.{i}": numbers(500 + i, seed + 2 + i) for i in range(20)},
    }
    at = {name: device.other if name == "other" else device.cuda for name in host}
    state = {name: torch.empty(len(tensor), dtype=torch.uint8, device=at[name]) for name, tensor in host.items()}
    for where in {device.cuda, device.other}:
        device.delay(0.003, torch.cuda.current_stream(where))
    for name, tensor in host.items():
        state[name].copy_(tensor)
    return state, host


@contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _save_small(host: Tensors, path: Path) -> None:
    """With no more staging memory than the other saves here have."""
    shutil.rmtree(path, ignore_errors=True)
    ss.save(host, checkpoint_id=path, host_memory_budget=BUDGET)
    assert_saved(path, host)


def save_now(device: Devices, path: Path) -> None:
    state, host = _tensors(device, 8)
    handle = ss.async_save(state, checkpoint_id=path, host_memory_budget=BUDGET)
    scribble(state)
    handle.result()
    assert_saved(path, host)


def save_what_is_freed(device: Devices, path: Path) -> None:
    """What the save holds is its own, and nobody's stream waits for it."""
    optimizer = adamw(device.cuda, count=1, nbytes=4 * KIB)
    state, host = _tensors(device, 8)
    device.delay(0.003)
    handle = ss.async_save(state, checkpoint_id=path, fence=optimizer, host_memory_budget=BUDGET)
    state.clear()
    handle.result()
    assert_saved(path, host)


def save_more_than_fits(device: Devices, path: Path) -> None:
    state, host = _tensors(device, 60)
    handle = ss.async_save(state, checkpoint_id=path, host_memory_budget=BUDGET)
    scribble(state)
    handle.result()
    assert_saved(path, host)


def save_at_the_speed_of_the_disk(device: Devices, path: Path) -> None:
    with _environment("SNAPSTONE_HBM_FRACTION", "0"):
        save_more_than_fits(device, path)


def save_behind_a_step(device: Devices, path: Path) -> None:
    transposed = torch.nn.Parameter(torch.empty(16, 8, device=device.cuda).t())
    matrix = numbers(128).float().reshape(16, 8).t()
    optimizer = adamw(device.cuda, count=2, nbytes=32 * KIB)
    optimizer.add_param_group({"params": [transposed]})
    state = {**state_of(optimizer, torch.arange(100.0).to(device.cuda)), "transposed": transposed}
    expected = host_copy(device, state)
    device.delay(0.005)
    transposed.detach().copy_(matrix)
    state["buffers"]["running"].add_(1)
    handle = ss.async_save(state, checkpoint_id=path, fence=optimizer, host_memory_budget=BUDGET)
    state["buffers"]["running"].zero_()
    optimizer.step()
    handle.result()
    expected["transposed"] = matrix
    expected["buffers"]["running"] += 1
    assert_same(expected, ss.Checkpoint.open(path).state_dict())


def save_what_changed(device: Devices, path: Path) -> None:
    state, host = _tensors(device, 20)
    base = path.with_name(path.name + "-base")
    ss.save(state, checkpoint_id=base, host_memory_budget=BUDGET)
    host["large"][3 * CHUNK_BYTES] ^= 1
    device.delay(0.003)
    state["large"].copy_(host["large"])
    saved = ss.save(state, checkpoint_id=path, base=base, host_memory_budget=BUDGET)
    scribble(state)
    assert_saved(path, host)
    assert saved.stats["chunks"] - saved.stats["unchanged_chunks"] == 1
    packed = sum(len(tensor) for name, tensor in host.items() if name.startswith("tiny"))
    assert saved.stats["devices"]["copied_bytes"] < 3 * CHUNK_BYTES + packed, "what did not change was copied"


def save_after_one_that_was_given_up(device: Devices, path: Path) -> None:
    state, _ = _tensors(device, 20)
    device.delay(0.3)
    state["large"].fill_(1)
    handle = ss.async_save(state, checkpoint_id=path, host_memory_budget=BUDGET)
    handle.cancel()
    handle.upload_completion.exception()
    state.clear()
    _save_small({"a": numbers(20 * CHUNK_BYTES, 5)}, path)


def save_from_a_device_that_fails(device: Devices, path: Path) -> None:
    for rules in ("", "cuEventQuery:1+:errno=719", "cuEventRecord:4+:errno=719"):
        state, _ = _tensors(device, 8)
        with device.held() if rules else nullcontext():
            state["large"].fill_(3)
            with calls_fail(rules), suppress(ss.CudaError):
                ss.save(state, checkpoint_id=path, host_memory_budget=BUDGET)
            shutil.rmtree(path, ignore_errors=True)
            state.clear()
            _save_small({"a": numbers(20 * CHUNK_BYTES, 5)}, path)
        shutil.rmtree(path)
        gc.collect()


def save_behind_a_fence_that_fails(device: Devices, path: Path) -> None:
    for nth in range(1, 5):
        optimizer = adamw(device.cuda, count=1, nbytes=32 * KIB)
        state = state_of(optimizer, torch.arange(100.0).to(device.cuda))
        device.delay(0.2)
        with calls_fail(f"cuStreamWaitEvent:{nth}:errno=999"):
            handle = ss.async_save(state, checkpoint_id=path / str(nth), fence=optimizer, host_memory_budget=BUDGET)
            optimizer.step()
            assert isinstance(handle.upload_completion.exception(), ss.CudaError | None)


def _load_again(device: Devices, path: Path, host: Tensors) -> None:
    """Loads that follow each other as closely as they may, between other uses of the targets."""
    loaded = []
    for _ in range(2):
        targets = {name: torch.empty_like(tensor, device=device.cuda) for name, tensor in host.items()}
        wide = torch.empty(256, 1024, dtype=torch.uint8, device=device.cuda)
        targets["strided"] = wide[:, 100:612]
        device.delay(0.005)
        scribble(targets)
        ss.load(targets, checkpoint_id=path)
        loaded.append({name: tensor.clone() for name, tensor in targets.items()})
        scribble(targets)
    for copies in loaded:
        for name, tensor in host.items():
            assert torch.equal(device.on_host(copies[name]), tensor), name


def load_between(device: Devices, path: Path) -> None:
    """As much as staging memory and scratch are used for more than once by it."""
    host = {
        "large": numbers(320 * CHUNK_BYTES + 17, 1),
        "strided": numbers(256 * 512, 50).reshape(256, 512),
        **{f"tiny.{i}": numbers(500 + i, 2 + i) for i in range(20)},
    }
    ss.save(host, checkpoint_id=path, host_memory_budget=LEAST)
    _load_again(device, path, host)


def load_what_is_coded(device: Devices, path: Path) -> None:
    host = {"large": numbers(20 * CHUNK_BYTES, 1), "strided": numbers(256 * 512, 50).reshape(256, 512)}
    ss.save(host, checkpoint_id=path, codec=CODECS[-1], host_memory_budget=LEAST)
    _load_again(device, path, host)


def load_without_digests_of_the_device(device: Devices, path: Path) -> None:
    host = {"large": numbers(20 * CHUNK_BYTES, 1), "strided": numbers(256 * 512, 50).reshape(256, 512)}
    ss.save(host, checkpoint_id=path, host_memory_budget=LEAST)
    with _environment("SNAPSTONE_DIGEST", "host"):
        _load_again(device, path, host)


def load_after_one_that_failed(device: Devices, path: Path) -> None:
    """After some of it was written, by another stream than the one that the memory is of."""
    host = {"large": numbers(100 * CHUNK_BYTES, 3)}
    wrong = path.with_name(path.name + "-wrong")
    for where in (path, wrong):
        ss.save(host, checkpoint_id=where, host_memory_budget=LEAST)
    data = wrong / "rank-00000.data"
    content = bytearray(data.read_bytes())
    content[-CHUNK_BYTES] ^= 1
    data.write_bytes(bytes(content))
    theirs = torch.cuda.Stream(device.cuda)
    for digests in ("auto", "host"):
        with torch.cuda.stream(theirs):
            target = torch.empty(len(host["large"]), dtype=torch.uint8, device=device.cuda)
        torch.cuda.current_stream(device.cuda).wait_stream(theirs)
        device.delay(0.05)
        with _environment("SNAPSTONE_DIGEST", digests), pytest.raises(ss.CorruptCheckpointError):
            ss.load({"large": target}, checkpoint_id=wrong)
        del target
        gc.collect()
        target = torch.empty(len(host["large"]), dtype=torch.uint8, device=device.cuda)
        ss.load({"large": target}, checkpoint_id=path)
        assert torch.equal(device.on_host(target), host["large"])
    shutil.rmtree(wrong)


def load_that_is_interrupted(device: Devices, path: Path) -> None:
    """While targets are still to be written, by another stream than the one that their memory is of."""
    host = {"large": numbers(30 * CHUNK_BYTES, 3)}
    ss.save(host, checkpoint_id=path, host_memory_budget=LEAST)
    theirs = torch.cuda.Stream(device.cuda)

    def interrupt(done: int, total: int) -> None:
        if done:
            raise KeyboardInterrupt

    for digests in ("auto", "host"):
        with torch.cuda.stream(theirs):
            target = torch.empty(len(host["large"]), dtype=torch.uint8, device=device.cuda)
        torch.cuda.current_stream(device.cuda).wait_stream(theirs)
        # Where the host computes digests, the end of the load waits for what its memory goes to.
        with (
            device.held() if digests == "auto" else nullcontext(device.delay(0.5)),
            _environment("SNAPSTONE_DIGEST", digests),
        ):
            with suppress(KeyboardInterrupt):
                ss.load({"large": target}, checkpoint_id=path, progress=interrupt)
            del target
            gc.collect()
        torch.cuda.synchronize()


def load_to_a_device_that_fails(device: Devices, path: Path) -> None:
    host = {"large": numbers(30 * CHUNK_BYTES, 3)}
    ss.save(host, checkpoint_id=path, host_memory_budget=LEAST)
    for nth in range(2, 9):
        target = torch.empty(30 * CHUNK_BYTES, dtype=torch.uint8, device=device.cuda)
        device.delay(0.003)
        with calls_fail(f"cuEventRecord:{nth}+:errno=719"), suppress(ss.CudaError):
            ss.load({"large": target}, checkpoint_id=path)
        del target
        gc.collect()
        target = torch.empty(30 * CHUNK_BYTES, dtype=torch.uint8, device=device.cuda)
        ss.load({"large": target}, checkpoint_id=path)
        assert torch.equal(device.on_host(target), host["large"])


def load_straight_to_a_device_that_fails(device: Devices, path: Path) -> None:
    """What is still on its way to a target is neither the next load's nor anything else but what was saved."""
    host = {"large": numbers(30 * CHUNK_BYTES, 3)}
    ss.save(host, checkpoint_id=path, host_memory_budget=LEAST)
    other = path.with_name(path.name + "-other")
    ss.save({"large": torch.full_like(host["large"], 0x55)}, checkpoint_id=other, host_memory_budget=LEAST)
    for nth in (2, 2):
        target = torch.full_like(host["large"], 0xAA, device=device.cuda)
        with device.held(), _environment("SNAPSTONE_DIGEST", "host"):
            with calls_fail(f"cuEventRecord:{nth}+:errno=719"), suppress(ss.CudaError):
                ss.load({"large": target}, checkpoint_id=path)
            ss.load({"large": torch.empty_like(host["large"])}, checkpoint_id=other)
        found = device.on_host(target)
        assert bool(((found == host["large"]) | (found == 0xAA)).all())
    shutil.rmtree(other)


SCENARIOS: tuple[Scenario, ...] = (
    save_now,
    save_behind_a_step,
    save_what_is_freed,
    save_more_than_fits,
    save_at_the_speed_of_the_disk,
    save_what_changed,
    save_after_one_that_was_given_up,
    load_without_digests_of_the_device,
    load_after_one_that_failed,
    load_that_is_interrupted,
    load_what_is_coded,
    load_between,
)

FAILING: tuple[Scenario, ...] = (
    save_from_a_device_that_fails,
    save_behind_a_fence_that_fails,
    load_straight_to_a_device_that_fails,
    load_to_a_device_that_fails,
)
