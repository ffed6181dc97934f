"""Every dtype of torch is stored bit for bit, or refused by the name of its tensor with what to do instead."""

from __future__ import annotations

import math
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import snapstone as ss
from roundtrip.bits import DTYPES, FLOATING, assert_same, bits_of, other_bits, random_bits

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # torch: complex32 is new, quantized tensors are old

SHAPES = [(), (1,), (0,), (0, 5), (5, 0, 2), (7,), (3, 5), (2, 1, 3, 1), (257, 129)]
LARGE_BYTES = (1 << 32) + (1 << 28) + 12345


def has_room(directory: Path) -> bool:
    """For the tensor, for another to load it into, for its file, and for everybody else."""
    memory = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return memory > 3 * LARGE_BYTES and shutil.disk_usage(directory).free > 2 * LARGE_BYTES


def torch_dtypes() -> list[torch.dtype]:
    found = {value for value in vars(torch).values() if isinstance(value, torch.dtype)}
    return sorted(found, key=str)


def of_every_shape(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return {str(shape): random_bits(dtype, *shape, seed=seed) for seed, shape in enumerate(SHAPES)}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_shape_of_a_dtype_comes_back_bit_for_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    state = of_every_shape(dtype)
    saved = ss.save(state, checkpoint_id=tmp_path / "c")
    assert saved.nbytes == sum(tensor.nbytes for tensor in state.values())
    target = {name: other_bits(tensor) for name, tensor in state.items()}
    assert any(bits_of(target[name]) != bits_of(state[name]) for name in state)
    ss.load(target, checkpoint_id=tmp_path / "c")
    opened = ss.Checkpoint.open(tmp_path / "c")
    assert list(opened.keys()) == list(state)
    for name, tensor in state.items():
        assert_same(target[name], tensor, name)
        assert_same(opened.get_tensor(name), tensor, name)


def test_all_dtypes_in_one_state_do_not_disturb_each_other(tmp_path: Path) -> None:
    state = {str(dtype): of_every_shape(dtype) for dtype in DTYPES}
    ss.save(state, checkpoint_id=tmp_path / "c")
    target = {name: {key: other_bits(one) for key, one in group.items()} for name, group in state.items()}
    ss.load(target, checkpoint_id=tmp_path / "c")
    for name, group in state.items():
        for key, tensor in group.items():
            assert_same(target[name][key], tensor, f"{name} {key}")


def test_every_dtype_of_torch_is_stored_or_refused_by_name(tmp_path: Path) -> None:
    stored = []
    for number, dtype in enumerate(torch_dtypes()):
        try:
            tensor = torch.empty(4, dtype=dtype)
        except (RuntimeError, TypeError):
            continue
        path = tmp_path / f"c{number}"
        if dtype in DTYPES:
            ss.save({"net": {"w": tensor}}, checkpoint_id=path)
            stored.append(dtype)
        else:
            with pytest.raises((TypeError, ValueError), match=r"^net\.w: .*(convert|int_repr)"):
                ss.save({"net": {"w": tensor}}, checkpoint_id=path)
        assert path.exists() == (dtype in DTYPES)
    assert set(stored) == set(DTYPES)
    whole = {torch.uint16, torch.uint32, torch.uint64, torch.complex32, torch.float8_e8m0fnu, torch.bool}
    assert whole <= set(stored)


NAN_BITS = {  # quiet and signalling, both signs, several payloads
    torch.float64: ("<d", [0x7FF8000000000000, 0x7FF0000000000001, 0xFFFFFFFFFFFFFFFF, 0xFFF8DEADBEEF0001]),
    torch.float32: ("<f", [0x7FC00000, 0x7F800001, 0xFFFFFFFF, 0xFFC0BEEF]),
    torch.float16: ("<e", [0x7E00, 0x7C01, 0xFFFF, 0xFE42]),
    torch.bfloat16: ("", [0x7FC0, 0x7F81, 0xFFFF, 0xFFC2]),
}


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
def test_nan_payloads_and_signed_zeros_keep_their_bits(tmp_path: Path, dtype: torch.dtype) -> None:
    size = dtype.itemsize
    patterns = [*NAN_BITS[dtype][1], 0, 1 << (8 * size - 1), 1]
    raw = b"".join(pattern.to_bytes(size, "little") for pattern in patterns)
    tensor = torch.frombuffer(bytearray(raw), dtype=dtype)
    assert int(tensor.isnan().sum()) == 4
    ss.save({"contiguous": tensor, "strided": tensor.repeat_interleave(2)[::2]}, checkpoint_id=tmp_path / "c")
    loaded = {"contiguous": torch.zeros_like(tensor), "strided": torch.zeros(2 * len(patterns), dtype=dtype)[::2]}
    ss.load(loaded, checkpoint_id=tmp_path / "c")
    assert bits_of(loaded["contiguous"]) == raw
    # torch may quieten a signalling NaN when it copies; the bits that were in memory are the ones to come back.
    assert bits_of(loaded["strided"]) == bits_of(tensor.repeat_interleave(2)[::2])
    if NAN_BITS[dtype][0]:
        assert math.isnan(struct.unpack(NAN_BITS[dtype][0], raw[:size])[0])


def wrapper() -> torch.Tensor:
    class Wrapper(torch.Tensor):
        @staticmethod
        def __new__(cls, inner: torch.Tensor) -> Wrapper:
            made: Wrapper = torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)
            return made

        @classmethod
        def __torch_dispatch__(cls, function: Any, *_: Any, **__: Any) -> Any:
            raise NotImplementedError(function)

    return Wrapper(torch.ones(3))


def fake() -> torch.Tensor:
    with FakeTensorMode():
        return torch.ones(3)


def freed() -> torch.Tensor:
    tensor = torch.ones(3)
    tensor.untyped_storage().resize_(0)
    return tensor


def quantized() -> torch.Tensor:
    return torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)


UNSUPPORTED: dict[str, tuple[Callable[[], torch.Tensor], str]] = {
    "sparse coo": (lambda: torch.eye(3).to_sparse(), "save .to_dense"),
    "sparse csr": (lambda: torch.eye(3).to_sparse_csr(), "save .to_dense"),
    "mkldnn": (lambda: torch.eye(3).to_mkldnn(), "save .to_dense"),
    "quantized": (quantized, "save .int_repr"),
    "meta": (lambda: torch.empty(3, device="meta"), "materialise it first"),
    "nested": (lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]), "save the tensors of .unbind"),
    "jagged": (
        lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged),
        "save its parts",
    ),
    "wrapper": (wrapper, "materialise it first"),
    "fake": (fake, "materialise it first"),
    "freed storage": (freed, "materialise it first"),
    "uninitialised": (lambda: torch.nn.UninitializedParameter(), "run the module once first"),
    "too many dimensions": (lambda: torch.zeros([1] * 65), "reshape it first"),
}


@pytest.mark.parametrize("kind", UNSUPPORTED)
def test_what_has_no_plain_memory_is_refused_by_name_and_remedy(tmp_path: Path, kind: str) -> None:
    make, remedy = UNSUPPORTED[kind]
    # The name is known from an earlier save of a plain tensor: a remembered description must not let the other pass.
    ss.save({"net": {"w": torch.ones(3)}}, checkpoint_id=tmp_path / "plain")
    state = {"net": {"w": make()}}
    with pytest.raises((TypeError, ValueError), match=r"^net\.w: ") as caught:
        ss.save(state, checkpoint_id=tmp_path / "c")
    assert remedy in str(caught.value)
    with pytest.raises((TypeError, ValueError), match=r"^net\.w: "):
        ss.async_save(state, checkpoint_id=tmp_path / "c")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["plain"]


@pytest.mark.parametrize(
    "kind", sorted(UNSUPPORTED.keys() - {"nested", "jagged", "uninitialised", "too many dimensions"})
)
def test_what_has_no_plain_memory_cannot_be_loaded_into(tmp_path: Path, kind: str) -> None:
    tensor = UNSUPPORTED[kind][0]()
    ss.save({"w": torch.ones(tuple(tensor.shape))}, checkpoint_id=tmp_path / "c")
    with pytest.raises((TypeError, ValueError), match=r"^w: "):
        ss.load({"w": tensor}, checkpoint_id=tmp_path / "c", cast=True)


def test_as_many_dimensions_as_torch_computes_with(tmp_path: Path) -> None:
    tensor = random_bits(torch.float32, *[2, 1] * 8, *[1] * 48)
    assert tensor.dim() == 64
    ss.save({"w": tensor}, checkpoint_id=tmp_path / "c")
    assert_same(ss.Checkpoint.open(tmp_path / "c").get_tensor("w"), tensor)


def test_subclasses_with_memory_of_their_own_are_stored(tmp_path: Path) -> None:
    class Tagged(torch.Tensor):
        pass

    inference = torch.inference_mode()(lambda: torch.arange(5.0))()
    state = {
        "parameter": torch.nn.Parameter(torch.arange(4.0)),
        "buffer": torch.nn.Buffer(torch.arange(3)),
        "subclass": torch.arange(6.0).as_subclass(Tagged),
        "inference": inference,
        "needs_grad": (torch.arange(3.0).requires_grad_() * 2),
    }
    ss.save(state, checkpoint_id=tmp_path / "c")
    loaded = ss.Checkpoint.open(tmp_path / "c").load_tensors()
    for name, tensor in state.items():
        assert bits_of(loaded[name]) == bits_of(tensor.as_subclass(torch.Tensor)), name
    ss.load({name: torch.zeros_like(tensor) for name, tensor in state.items()}, checkpoint_id=tmp_path / "c")
    fresh = {**state, "parameter": torch.nn.Parameter(torch.zeros(4)), "inference": torch.zeros(5)}
    ss.load(fresh, checkpoint_id=tmp_path / "c")
    assert fresh["parameter"].requires_grad
    assert fresh["parameter"].tolist() == [0.0, 1.0, 2.0, 3.0]


@pytest.mark.timeout(600)
def test_one_tensor_of_more_than_4_gib(tmp_path: Path) -> None:
    if not has_room(tmp_path):
        pytest.skip("needs 14 GiB of free memory and 10 GiB of disk")
    count = LARGE_BYTES
    tensor = torch.arange(251, dtype=torch.uint8).repeat(count // 251 + 1)[:count]
    saved = ss.save({"w": tensor}, checkpoint_id=tmp_path / "c")
    assert saved.nbytes == count
    opened = ss.Checkpoint.open(tmp_path / "c")
    at = (1 << 32) - 3
    assert opened.get_slice("w")[at : at + 10].equal(tensor[at : at + 10])
    assert opened.get_slice("w")[-5:].equal(tensor[-5:])
    target = {"w": torch.zeros(count, dtype=torch.uint8)}
    ss.load(target, checkpoint_id=tmp_path / "c")
    assert target["w"].equal(tensor)
    shutil.rmtree(tmp_path / "c")  # pytest keeps what is left
