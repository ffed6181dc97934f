"""Stager in one process: what is staged is a true copy in one shared buffer, which no save ever finds overwritten."""

from __future__ import annotations

import collections
import errno
import gc
import mmap
import os
import resource
import threading
import time
from concurrent.futures import Future
from contextlib import suppress
from multiprocessing.reduction import ForkingPickler
from typing import Any, NamedTuple

import pytest
import torch
from torch.distributed.checkpoint.staging import AsyncStager
from torch.distributed.tensor._shards_wrapper import LocalShardsWrapper

from roundtrip.bits import nested_equal
from snapstone.dcp import Stager


class Pair(NamedTuple):
    first: Any
    second: Any


def varied() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(3)
    base = torch.randn(40, 30, generator=generator)
    tied = torch.randn(5, generator=generator)
    return {
        "contiguous": base,
        "transposed": base.t(),
        "strided": base[::3, 1::2],
        "channels_last": torch.randn(2, 3, 4, 5, generator=generator).to(memory_format=torch.channels_last),
        "expanded": torch.ones(1, 3).expand(4, 3),
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 3),
        "bf16": torch.randn(9, generator=generator).to(torch.bfloat16),
        "bool": torch.tensor([True, False, True]),
        "complex": torch.randn(4, dtype=torch.complex128, generator=generator),
        "conjugated": torch.randn(4, dtype=torch.complex64, generator=generator).conj(),
        "parameter": torch.nn.Parameter(torch.randn(3, generator=generator)),
        "nested": collections.OrderedDict(a=[tied, {"b": (tied, 1)}], c=Pair(tied, "text")),
        7: torch.arange(600_000),
        "values": {"none": None, "list": [1, 2.5, "a"], "set": {1, 2}, "bytes": b"x"},
    }


def tensors_of(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    items = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return [tensor for item in items for tensor in tensors_of(item)]


def finished(result: Any) -> dict[str, Any]:
    """Of `stage`, blocking or not."""
    return result.result(30) if isinstance(result, Future) else result


def clones(state: Any) -> Any:
    if isinstance(state, torch.Tensor):
        return state.detach().clone()
    if isinstance(state, dict):
        return {key: clones(item) for key, item in state.items()}
    return [clones(item) for item in state] if isinstance(state, list) else state


def links() -> dict[int, str]:
    """What this process has open, without what the thread of its status page opens and closes."""
    found = {}
    for number in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):  # what listed the directory
            found[int(number)] = os.readlink(f"/proc/self/fd/{number}")
    return {number: link for number, link in found.items() if not link.startswith(("/proc/", "/dev/shm/snapstone-"))}


def descriptors() -> int:
    return len(links())


def segments() -> set[int]:
    """Descriptors of staging memory in this process."""
    return {number for number, link in links().items() if "snapstone-staging" in link}


@pytest.fixture(autouse=True)
def nothing_left_of_other_tests() -> None:
    """Whose descriptors would be counted until they are collected, in the middle of a test."""
    gc.collect()


@pytest.mark.parametrize("blocking", [False, True])
def test_a_staged_state_has_the_structure_and_bits_of_the_state(blocking: bool) -> None:
    stager = Stager(blocking=blocking)
    state = varied()
    result = stager.stage(state)
    staged = finished(result)
    assert isinstance(staged, dict)
    assert nested_equal(staged, state)
    assert type(staged["nested"]) is collections.OrderedDict
    assert type(staged["nested"]["c"]) is Pair
    assert staged["channels_last"].is_contiguous(memory_format=torch.channels_last)
    assert staged["values"] is not state["values"]
    expected = clones(state["contiguous"])
    state["contiguous"].zero_()
    assert torch.equal(staged["contiguous"], expected)
    assert torch.equal(staged["transposed"], expected.t())
    stager.close()


def test_ties_stay_ties() -> None:
    stager = Stager()
    tied = torch.ones(4)
    module = torch.nn.Parameter(tied)
    staged = stager.stage({"a": tied, "b": [tied.view(4), module], "other": tied[:2]}).result()
    assert len({staged["a"].data_ptr(), *(tensor.data_ptr() for tensor in staged["b"])}) == 1
    assert staged["other"].data_ptr() != staged["a"].data_ptr()
    stager.close()


def test_all_tensors_are_views_of_one_aligned_shared_buffer() -> None:
    stager = Stager()
    staged = stager.stage(varied()).result()
    tensors = [tensor for tensor in tensors_of(staged) if tensor.numel()]
    assert {tensor.untyped_storage()._cdata for tensor in tensors} == {tensors[0].untyped_storage()._cdata}
    assert tensors[0].untyped_storage().is_shared()
    assert all(tensor.data_ptr() % 64 == 0 for tensor in tensors)
    assert staged[7].data_ptr() % mmap.PAGESIZE == 0
    stager.close()


def test_another_process_gets_a_staged_state_through_one_descriptor() -> None:
    stager = Stager()
    staged = stager.stage({"list": [torch.full((100,), number) for number in range(500)]}).result()
    before = descriptors()
    message = ForkingPickler.dumps(staged)
    # The copy to send, and what Python's resource sharer listens on.
    assert descriptors() <= before + 2
    assert len(message) < 500 * 100
    stager.close()


def test_a_small_view_of_a_huge_storage_costs_its_own_bytes() -> None:
    stager = Stager()
    staged = stager.stage({"rows": torch.zeros(1 << 26)[100:200]}).result()
    assert staged["rows"].untyped_storage().nbytes() < 4 << 20
    stager.close()


def test_python_values_are_those_of_the_call() -> None:
    stager = Stager()
    held = stager.stage({"t": torch.ones(3)}).result()
    state = {"t": torch.ones(3), "values": [1]}
    future = stager.stage(state)
    state["values"].append(2)
    state["late"] = 3
    assert held is not None
    assert not future.done()
    del held
    assert future.result(30).keys() == {"t", "values"}
    assert future.result()["values"] == [1]
    stager.close()


def test_the_buffer_is_reused_and_grows_when_a_state_needs_more() -> None:
    stager = Stager()
    addresses, counts = [], []
    for size in (1000, 1000, 10, 3_000_000, 1000):
        staged = stager.stage({"t": torch.full((size,), float(size))}).result()
        assert (staged["t"] == size).all()
        addresses.append((staged["t"].data_ptr(), staged["t"].untyped_storage().nbytes()))
        counts.append(descriptors())
        del staged
    assert addresses[0] == addresses[1] == addresses[2]
    assert addresses[3] == addresses[4]
    assert addresses[4][1] >= 12_000_000
    assert len(set(counts)) == 1
    stager.close()


def test_a_state_that_is_still_read_is_never_overwritten() -> None:
    stager = Stager()
    first = stager.stage({"t": torch.full((1000,), 1.0)}).result()
    second = stager.stage({"t": torch.full((1000,), 2.0)})
    third = stager.stage({"t": torch.full((1000,), 3.0)})
    part = first["t"][10:20]
    del first
    time.sleep(0.1)
    assert not second.done()
    assert (part == 1).all()
    del part
    assert (second.result(30)["t"] == 2).all()
    time.sleep(0.1)
    assert not third.done()
    del second
    assert (third.result(30)["t"] == 3).all()
    stager.close()


@pytest.mark.parametrize("blocking", [False, True])
def test_a_busy_stager_rejects_when_told_to(blocking: bool) -> None:
    stager = Stager(on_busy="reject", blocking=blocking)
    result = stager.stage({"t": torch.ones(1000)})
    held = finished(result)
    with pytest.raises(RuntimeError, match="still reads the staging buffer"):
        stager.stage({"t": torch.zeros(1000)})
    assert (held["t"] == 1).all()
    del held, result
    result = stager.stage({"t": torch.zeros(1000)})
    assert (finished(result)["t"] == 0).all()
    stager.close()


@pytest.mark.parametrize("blocking", [False, True])
def test_a_stager_waits_no_longer_than_its_timeout(blocking: bool) -> None:
    stager = Stager(timeout=0.1, blocking=blocking)
    result = stager.stage({"t": torch.ones(10)})
    held = finished(result)
    with pytest.raises(TimeoutError, match=r"still reads the staging buffer after 0\.1 s"):
        finished(stager.stage({"t": torch.ones(10)}))
    assert (held["t"] == 1).all()
    stager.close()


@pytest.mark.parametrize(
    "tensor", [torch.eye(3).to_sparse(), torch.empty(3, device="meta"), torch.nested.nested_tensor([torch.ones(2)])]
)
def test_a_tensor_without_plain_memory_is_refused_by_name_at_once(tensor: torch.Tensor) -> None:
    stager = Stager()
    with pytest.raises(TypeError, match=r"^model\.0: "):
        stager.stage({"model": [tensor]})
    assert stager.stage({"t": torch.ones(2)}).result().keys() == {"t"}
    stager.close()


class Uncopyable(torch.Tensor):
    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.copy_:
            raise ArithmeticError("no copies")
        return super().__torch_function__(func, types, args, kwargs or {})


def test_an_error_reaches_the_future_and_the_next_call_once() -> None:
    stager = Stager()
    broken = {"good": torch.ones(3), "bad": torch.ones(3).as_subclass(Uncopyable)}
    with pytest.raises(ArithmeticError) as info:
        stager.stage(broken).result()
    assert info.value.__notes__ == ["while bad was staged"]
    with pytest.raises(ArithmeticError):
        stager.stage({"t": torch.ones(3)})
    stager.stage(broken)
    with pytest.raises(ArithmeticError):
        stager.synchronize_staging()
    assert (stager.stage({"t": torch.ones(3)}).result()["t"] == 1).all()
    stager.synchronize_staging()
    stager.close()


def test_an_error_keeps_no_tensors_alive() -> None:
    stager = Stager()
    alive = torch.ones(3)
    storage = alive.untyped_storage()
    before = torch._C._storage_Use_Count(storage._cdata)
    future = stager.stage({"alive": alive, "bad": torch.ones(3).as_subclass(Uncopyable)})
    assert isinstance(future.exception(30), ArithmeticError)
    with pytest.raises(ArithmeticError):
        stager.synchronize_staging()
    assert torch._C._storage_Use_Count(storage._cdata) == before
    stager.close()


def test_a_tensor_that_cannot_be_copied_is_refused_inside_another_one_too() -> None:
    class Own(torch.Tensor):
        def __create_write_items__(self, name: str, value: Any) -> list[Any]:
            return []

    stager = Stager()
    wrapper = LocalShardsWrapper([torch.ones(2), torch.ones(2).as_subclass(Own)], [(0,), (2,)])
    with pytest.raises(TypeError, match=r"^model\.w: cannot be staged, because it wraps a Own$"):
        stager.stage({"model": {"w": wrapper}})
    assert stager.stage({"t": torch.ones(2)}).result().keys() == {"t"}
    stager.close()


@pytest.mark.parametrize("blocking", [False, True])
def test_memory_that_the_system_does_not_give_is_an_error_that_says_how_much(blocking: bool) -> None:
    others = segments()
    stager = Stager(blocking=blocking)
    state = {"t": torch.ones(1_000_000)}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))
    try:
        with pytest.raises(OSError, match="4194304 bytes of memory to stage in: File too large") as info:
            finished(stager.stage(state))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert info.value.errno == errno.EFBIG
    assert segments() == others
    with suppress(OSError):  # the next call tells it, too
        stager.synchronize_staging()
    assert (finished(stager.stage(state))["t"] == 1).all()
    stager.close()


def test_synchronize_waits_for_the_copy() -> None:
    stager = Stager()
    stager.synchronize_staging()
    state = {"t": torch.ones(4_000_000)}
    future = stager.stage(state)
    stager.synchronize_staging()
    state["t"].zero_()
    assert (future.result()["t"] == 1).all()
    stager.close()


def test_close_gives_the_memory_back_and_ends_the_stager() -> None:
    before, others = descriptors(), segments()
    stager = Stager()
    staged = stager.stage({"t": torch.ones(1_000_000)}).result()
    mine = os.dup(min(segments() - others))
    assert os.fstat(mine).st_blocks * 512 >= 4_000_000
    del staged
    stager.close()
    stager.close()
    assert os.fstat(mine).st_blocks == 0
    os.close(mine)
    assert descriptors() == before
    with pytest.raises(RuntimeError, match="closed"):
        stager.stage({"t": torch.ones(1)})


def test_close_leaves_a_state_that_is_still_read() -> None:
    others = segments()
    stager = Stager()
    staged = stager.stage({"t": torch.ones(1_000_000)}).result()
    waiting = stager.stage({"t": torch.zeros(1_000_000)})
    stager.close()
    with pytest.raises(RuntimeError, match="closed"):
        waiting.result(30)
    assert (staged["t"] == 1).all()
    del staged
    assert segments() == others


def test_a_stager_that_is_dropped_leaves_no_thread_and_no_memory() -> None:
    others, before = segments(), threading.enumerate()
    stager = Stager()
    stager.stage({"t": torch.ones(1000)}).result()
    threads = [thread for thread in threading.enumerate() if thread not in before]
    assert threads
    del stager
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()
    assert segments() == others


def test_a_forked_child_neither_stages_nor_frees() -> None:
    stager = Stager()
    staged = stager.stage({"t": torch.ones(1_000_000)}).result()
    child = os.fork()
    if child == 0:
        stager.close()
        try:
            stager.stage({"t": torch.zeros(1)})
        except RuntimeError:
            os._exit(0)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert (staged["t"] == 1).all()
    stager.close()


def test_wrappers_of_local_shards_are_rebuilt() -> None:
    stager = Stager()
    wrapper = LocalShardsWrapper([torch.ones(2, 3), torch.zeros(2, 4)], [(0, 0), (0, 3)])
    staged = stager.stage({"w": wrapper}).result()["w"]
    assert type(staged) is LocalShardsWrapper
    assert staged.storage_metadata() == wrapper.storage_metadata()
    for copied, shard in zip(staged.local_shards(), wrapper.local_shards(), strict=True):
        assert torch.equal(copied, shard)
        assert copied.data_ptr() != shard.data_ptr()
        assert copied.untyped_storage().is_shared()
    stager.close()


def test_it_is_an_async_stager() -> None:
    stager = Stager()
    assert isinstance(stager, AsyncStager)
    assert stager.should_synchronize_after_execute is False
    stager.close()
    with pytest.raises(ValueError, match="on_busy"):
        Stager(on_busy="drop")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="timeout"):
        Stager(timeout=0)
