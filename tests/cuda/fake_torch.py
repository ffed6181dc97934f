"""torch.cuda on the fake driver: real torch tensors on `cuda:N` whose memory is the fake's, and the part of torch.cuda
that streams need, for a torch that was built without CUDA.

Memory comes from the fake's allocator, which hands out freed memory at once. Filling, copying within a device and
copying from the host are work of the current stream. Any other operation waits for the current stream, computes on the
host, and writes what it computed as work of the current stream. What waits for a stream is the "training", never the
engine: nothing of the engine calls these.
"""

from __future__ import annotations

import atexit
import bisect
import ctypes
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_leaves, tree_map

from cuda import dlpack
from cuda.fake_driver import FakeDriver

__all__ = ["FakeStream", "install", "patch"]

_CUDA = "CUDA"


class _Block:
    """An allocation; every tensor in it holds it."""

    def __init__(self, driver: FakeDriver, nbytes: int, ordinal: int, stream: int | None) -> None:
        self._driver = driver
        self.nbytes = nbytes
        self.ordinal = ordinal
        try:
            self.address = driver.alloc(nbytes, stream=stream, device=ordinal)
        except MemoryError as error:
            raise torch.OutOfMemoryError(str(error)) from None
        _blocks[self.address] = self

    def free(self) -> None:
        del _blocks[self.address]
        self._driver.free(self.address)


_lock = threading.RLock()  # a tensor may die in the middle of an allocation
_blocks: dict[int, _Block] = {}
_users: dict[int, int] = {}  # by address of the block: how many storages are in it
_living: dict[int, tuple[Any, ...]] = {}
_number = 0


@dlpack.Deleter
def _delete(managed: Any) -> None:
    with _lock:
        *_, block = _living.pop(managed.contents.context)
        if block is None:
            return
        _users[block.address] -= 1
        if _users[block.address] == 0:
            del _users[block.address]
            block.free()


@atexit.register
def _forget() -> None:
    """A tensor that outlives this module, such as one in the traceback of a failed test, calls no Python any more."""
    for managed, *_ in _living.values():
        managed.deleter = dlpack.Deleter()
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(managed))


def _block_at(address: int) -> _Block:
    addresses = sorted(_blocks)
    return _blocks[addresses[bisect.bisect_right(addresses, address) - 1]]


def _tensor(block: _Block | None, address: int, dtype: torch.dtype, shape: Any, strides: Any, ordinal: int) -> Any:
    """A tensor over memory of the block, as torch makes one from DLPack."""
    global _number
    shape, strides = list(shape), list(strides)
    code, bits = (dlpack.INTEGER, 8 * dtype.itemsize) if dtype.itemsize <= 8 else (dlpack.COMPLEX, 128)
    sizes = (ctypes.c_int64 * max(len(shape), 1))(*shape)
    steps = (ctypes.c_int64 * max(len(shape), 1))(*strides)
    with _lock:
        _number += 1
        managed = dlpack.Managed(
            dlpack.Tensor(
                address,
                dlpack.Device(dlpack.CUDA, ordinal),
                len(shape),
                dlpack.DataType(code, bits, 1),
                sizes,
                steps,
                0,
            ),
            _number,
            _delete,
        )
        _living[_number] = (managed, sizes, steps, block)
        if block is not None:
            _users[block.address] = _users.get(block.address, 0) + 1
    made = torch._C._from_dlpack(dlpack.new_capsule(ctypes.addressof(managed), b"dltensor", None))  # type: ignore[attr-defined]
    return made if made.dtype == dtype else made.view(dtype)


class FakeStream:
    """As torch.cuda.Stream."""

    def __init__(self, device: Any = None, priority: int = 0, *, handle: int | None = None) -> None:
        self.device = torch.device(_CUDA.lower(), _ordinal(device))
        self._runtime = _Runtime.of()
        self.cuda_stream = self._runtime.driver.stream(self.device.index) if handle is None else handle

    @property
    def handle(self) -> int | None:
        return self.cuda_stream or None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, FakeStream) and (other.device, other.cuda_stream) == (self.device, self.cuda_stream)

    def __hash__(self) -> int:
        return hash((self.device, self.cuda_stream))

    def synchronize(self) -> None:
        with self._runtime.context(self.device.index):
            self._runtime.call("cuStreamSynchronize", ctypes.c_void_p(self.handle))

    def record_event(self, event: FakeEvent | None = None) -> FakeEvent:
        event = event or FakeEvent()
        event.record(self)
        return event

    def wait_event(self, event: FakeEvent) -> None:
        if event.handle is not None:
            with self._runtime.context(self.device.index):
                self._runtime.call(
                    "cuStreamWaitEvent", ctypes.c_void_p(self.handle), ctypes.c_void_p(event.handle), ctypes.c_uint(0)
                )

    def wait_stream(self, other: FakeStream) -> None:
        self.wait_event(other.record_event())


class FakeEvent:
    """As torch.cuda.Event."""

    def __init__(self, **_: Any) -> None:
        self._runtime = _Runtime.of()
        self.handle: int | None = None

    def record(self, stream: FakeStream | None = None) -> None:
        stream = stream or self._runtime.current_stream()
        with self._runtime.context(stream.device.index):
            if self.handle is None:
                made = ctypes.c_void_p()
                self._runtime.call("cuEventCreate", ctypes.byref(made), ctypes.c_uint(2))
                self.handle = made.value
            self._runtime.call("cuEventRecord", ctypes.c_void_p(self.handle), ctypes.c_void_p(stream.handle))

    def synchronize(self) -> None:
        if self.handle is not None:
            with self._runtime.context(0):
                self._runtime.call("cuEventSynchronize", ctypes.c_void_p(self.handle))

    def query(self) -> bool:
        if self.handle is None:
            return True
        with self._runtime.context(0):
            return bool(self._runtime.driver.library.cuEventQuery(ctypes.c_void_p(self.handle)) == 0)


class _Runtime:
    """What torch.cuda knows: current device and streams, by thread."""

    _only: _Runtime | None = None

    def __init__(self, driver: FakeDriver | None) -> None:
        self.driver = driver or FakeDriver()
        self.contexts: dict[int, Any] = {}
        self._local = threading.local()

    @classmethod
    def of(cls, driver: FakeDriver | None = None) -> _Runtime:
        if cls._only is None:
            cls._only = cls(driver)
        return cls._only

    def call(self, name: str, *arguments: Any) -> None:
        code = getattr(self.driver.library, name)(*arguments)
        if code != 0:
            raise torch.AcceleratorError(f"{name}: CUresult {code}")

    @contextmanager
    def context(self, ordinal: int) -> Iterator[None]:
        if ordinal not in self.contexts:
            context = ctypes.c_void_p()
            self.call("cuDevicePrimaryCtxRetain", ctypes.byref(context), ctypes.c_int(ordinal))
            self.contexts[ordinal] = context
        self.call("cuCtxPushCurrent_v2", self.contexts[ordinal])
        try:
            yield
        finally:
            self.call("cuCtxPopCurrent_v2", ctypes.byref(ctypes.c_void_p()))

    @property
    def streams(self) -> dict[int, FakeStream]:
        if not hasattr(self._local, "streams"):
            self._local.streams = {}
        return self._local.streams  # type: ignore[no-any-return]

    @property
    def device(self) -> int:
        return getattr(self._local, "device", 0)

    @device.setter
    def device(self, ordinal: int) -> None:
        self._local.device = ordinal

    def current_stream(self, device: Any = None) -> FakeStream:
        ordinal = _ordinal(device)
        return self.streams.get(ordinal) or FakeStream(ordinal, handle=0)

    @contextmanager
    def use_stream(self, stream: FakeStream | None) -> Iterator[None]:
        if stream is None:
            yield
            return
        streams, before_device = self.streams, self.device
        before = streams.get(stream.device.index)
        streams[stream.device.index], self.device = stream, stream.device.index
        try:
            yield
        finally:
            self.device = before_device
            if before is None:
                del streams[stream.device.index]
            else:
                streams[stream.device.index] = before

    @contextmanager
    def use_device(self, device: Any) -> Iterator[None]:
        before, self.device = self.device, _ordinal(device)
        try:
            yield
        finally:
            self.device = before


def _ordinal(device: Any) -> int:
    if isinstance(device, int):
        return device
    index = None if device is None else torch.device(device).index
    return _Runtime.of().device if index is None else int(index)


# Operations -----------------------------------------------------------------------------------------------------------


def _empty(size: Any, *, dtype: Any = None, device: Any = None, **_: Any) -> torch.Tensor:
    described = torch.empty(size, dtype=dtype, device="meta")
    return _empty_strided(described.shape, described.stride(), dtype=dtype, device=device)


def _empty_strided(size: Any, stride: Any, *, dtype: Any = None, device: Any = None, **_: Any) -> torch.Tensor:
    dtype = dtype or torch.get_default_dtype()
    ordinal = _ordinal(device)
    nbytes = torch.empty_strided(size, stride, dtype=dtype, device="meta").untyped_storage().nbytes()
    if nbytes == 0:
        return _tensor(None, 0, dtype, size, stride, ordinal)  # type: ignore[no-any-return]
    runtime = _Runtime.of()
    with _lock:
        block = _Block(runtime.driver, nbytes, ordinal, runtime.current_stream(ordinal).handle)
        return _tensor(block, block.address, dtype, size, stride, ordinal)  # type: ignore[no-any-return]


def _as_strided(self: torch.Tensor, size: Any, stride: Any, storage_offset: int | None = None) -> torch.Tensor:
    at = self.storage_offset() if storage_offset is None else storage_offset
    address = self.data_ptr() + (at - self.storage_offset()) * self.dtype.itemsize
    with _lock:
        block = None if 0 in size else _block_at(address)
        view = _tensor(block, address if block else 0, self.dtype, size, stride, _ordinal(self.device))
    view = torch._conj(view) if self.is_conj() else view
    return torch._neg_view(view) if self.is_neg() else view


def _view(self: torch.Tensor, size: Any) -> torch.Tensor:
    described = torch.empty_strided(self.shape, self.stride(), dtype=self.dtype, device="meta").view(size)
    return _as_strided(self, described.shape, described.stride())


def _runs(tensor: torch.Tensor) -> Iterator[tuple[int, int]]:
    """(byte offset, bytes) of each run of elements that are neighbours, in row-major order."""
    sizes, strides, item = list(tensor.shape), list(tensor.stride()), tensor.dtype.itemsize
    run = item
    while sizes and (sizes[-1] == 1 or strides[-1] * item == run):
        run *= sizes.pop()
        strides.pop()
    offsets = [0]
    for size, stride in zip(sizes, strides, strict=True):
        offsets = [offset + i * stride * item for offset in offsets for i in range(size)]
    for offset in offsets if tensor.numel() else ():
        yield offset, run


def _bytes(tensor: torch.Tensor, like: torch.Tensor | None = None) -> bytes:
    """Of a tensor of the host, its elements in row-major order, as the memory of `like` holds them."""
    if like is not None:
        tensor = tensor.conj() if like.is_conj() else tensor
        tensor = -tensor if like.is_neg() else tensor
    flat = tensor.resolve_conj().resolve_neg().contiguous().reshape(-1)
    return bytes(ctypes.string_at(flat.data_ptr(), flat.numel() * flat.dtype.itemsize)) if flat.numel() else b""


def _write(target: torch.Tensor, data: bytes) -> None:
    """As work of the current stream."""
    runtime, ordinal = _Runtime.of(), _ordinal(target.device)
    stream, at = runtime.current_stream(ordinal).handle, 0
    for offset, nbytes in _runs(target):
        piece = data[at : at + nbytes]
        runtime.driver.enqueue_write(target.data_ptr() + offset, piece, stream=stream, device=ordinal)
        at += nbytes


def _read(source: torch.Tensor) -> torch.Tensor:
    """On the host, once the current stream is done."""
    runtime, ordinal = _Runtime.of(), _ordinal(source.device)
    runtime.current_stream(ordinal).synchronize()
    data = b"".join(runtime.driver.read(source.data_ptr() + offset, nbytes) for offset, nbytes in _runs(source))
    result = torch.empty(source.shape, dtype=source.dtype)
    if data:
        ctypes.memmove(result.data_ptr(), data, len(data))
    result = torch._conj(result) if source.is_conj() else result
    return torch._neg_view(result) if source.is_neg() else result


def _copy_(self: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    plain = not (self.is_conj() or self.is_neg() or source.is_conj() or source.is_neg())
    if self.device == source.device and self.dtype == source.dtype and self.shape == source.shape and plain:
        _copy_on_device(self, source)
        return self
    on_host = _read(source) if source.is_cuda else source
    if not self.is_cuda:
        return self.copy_(on_host)
    _write(self, _bytes(on_host.to(self.dtype).expand(self.shape), self))
    return self


def _copy_on_device(target: torch.Tensor, source: torch.Tensor) -> None:
    runtime, ordinal = _Runtime.of(), _ordinal(target.device)
    stream = runtime.current_stream(ordinal).handle
    sources, targets = list(_runs(source)), list(_runs(target))
    grain = min([run for _, run in sources + targets], default=1)
    pieces = [[offset + i for offset, nbytes in runs for i in range(0, nbytes, grain)] for runs in (sources, targets)]
    for from_offset, to_offset in zip(*pieces, strict=True):
        runtime.driver.enqueue_copy(
            target.data_ptr() + to_offset, source.data_ptr() + from_offset, grain, stream=stream, device=ordinal
        )


def _fill_(self: torch.Tensor, value: Any) -> torch.Tensor:
    value = value.item() if isinstance(value, torch.Tensor) else value
    _write(self, _bytes(torch.full(self.shape, value, dtype=self.dtype), self))
    return self


def _zero_(self: torch.Tensor) -> torch.Tensor:
    return _fill_(self, 0)


def _equal(self: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.equal(*[_read(one) if one.is_cuda else one for one in (self, other)])


def _computed(op: Any, *args: Any, **kwargs: Any) -> Any:
    """Any operation: on the host, between the work of the current stream."""
    found: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def to_host(value: Any) -> Any:
        if isinstance(value, torch.Tensor) and value.is_cuda:
            return found.setdefault(id(value), (value, _read(value)))[1]
        return torch.device("cpu") if isinstance(value, torch.device) else value

    host_args, host_kwargs = tree_map(to_host, (args, kwargs))
    with torch.no_grad():
        result = op(*host_args, **host_kwargs)
    schema = op._schema.arguments
    given = [*zip(schema, args, strict=False), *((one, kwargs[one.name]) for one in schema if one.name in kwargs)]
    changed = [value for one, value in given if one.alias_info is not None and one.alias_info.is_write]
    for tensor in tree_leaves(changed):
        if id(tensor) in found:
            changed_copy = found[id(tensor)][1]
            if changed_copy.shape != tensor.shape:
                raise NotImplementedError(f"{op}: no tensor of the fake's grows; make it on the host, and move it")
            _write(tensor, _bytes(changed_copy, tensor))
    originals = {id(on_host): tensor for tensor, on_host in found.values()}
    device = next((tensor.device for tensor, _ in found.values()), kwargs.get("device"))

    def to_device(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        return originals[id(value)] if id(value) in originals else value.to(device)

    return tree_map(to_device, result)


_libraries: list[Any] = []


def install() -> None:
    """Teaches torch its operations on the fake's tensors, for the rest of the process."""
    if _libraries:
        return
    if torch.backends.cuda.is_built():
        pytest.skip("this torch has a CUDA of its own, which the fake cannot stand in for")
    aten, rest = torch.library.Library("aten", "IMPL"), torch.library.Library("_", "IMPL")
    _libraries.extend((aten, rest))
    rest.fallback(_computed, _CUDA)
    for name, function in (
        ("empty.memory_format", _empty),
        ("empty_strided", _empty_strided),
        ("as_strided", _as_strided),
        ("_reshape_alias", _as_strided),
        ("view", _view),
        ("copy_", _copy_),
        ("fill_.Scalar", _fill_),
        ("fill_.Tensor", _fill_),
        ("zero_", _zero_),
        ("equal", _equal),
    ):
        aten.impl(name, function, _CUDA)
    _register_guard()


def _register_guard() -> None:
    """Operations that torch has in one form for all backends switch to the device of their tensors. This torch has
    nothing to do that with for CUDA; what it has for the host, which does nothing, does for the fake.
    """
    registry = (ctypes.c_void_p * 2).in_dll(
        ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so")), "_ZN3c104impl26device_guard_impl_registryE"
    )
    cpu, cuda = 0, 1  # c10::DeviceType
    registry[cuda] = registry[cpu]


def patch(monkeypatch: pytest.MonkeyPatch, driver: FakeDriver | None = None) -> None:
    """torch.cuda is the fake's, until the test ends."""
    runtime = _Runtime.of(driver)

    def is_current_stream_capturing() -> bool:
        status = ctypes.c_int()
        with runtime.context(runtime.device):
            handle = runtime.current_stream().handle
            runtime.call("cuStreamIsCapturing", ctypes.c_void_p(handle), ctypes.byref(status))
        return status.value != 0

    def synchronize(device: Any = None) -> None:
        runtime.driver.drain()

    for name, value in (
        *((name, lambda: None) for name in ("_lazy_init", "init")),
        *((name, lambda: True) for name in ("is_available", "is_initialized")),
        ("device_count", lambda: 2),
        ("current_device", lambda: runtime.device),
        ("current_stream", runtime.current_stream),
        ("is_current_stream_capturing", is_current_stream_capturing),
        ("stream", runtime.use_stream),
        ("device", runtime.use_device),
        ("synchronize", synchronize),
        ("Stream", FakeStream),
        ("ExternalStream", lambda handle, device=None: FakeStream(device, handle=handle)),
        ("Event", FakeEvent),
    ):
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch._C, "_cuda_hasPrimaryContext", lambda ordinal: ordinal in runtime.contexts, raising=False)
