"""The states that are saved and loaded: flat dicts of CPU tensors, bf16 parameters, fp32 Adam moments, random bits."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

__all__ = ["State", "bits_differ", "build", "differences", "empty_like", "flip_bits", "nbytes_of", "tensors_of"]

State = dict[str, torch.Tensor]

LARGE_LAYERS = 5
LARGE_VOCABULARY = 8896
SMALL_ELEMENTS_MIN, SMALL_ELEMENTS_MAX = 256, 4096
SEED = 20


def build(kind: str, size: int) -> State:
    """`kind` "2gb": a transformer of hidden size `size` (1536: 2.16 GB, 99 tensors). "small": `size` small tensors."""
    return dict(tensors_of(kind, size))


def tensors_of(kind: str, size: int) -> Iterator[tuple[str, torch.Tensor]]:
    """What `build` makes, the same bits each time, one tensor after another: for who cannot hold them all."""
    bits = np.random.SFC64(SEED)
    for name, shape in _shapes(kind, size):
        yield f"model.{name}", _random(bits, shape, torch.bfloat16)
        for slot in ("exp_avg", "exp_avg_sq"):
            yield f"optim.{name}.{slot}", _random(bits, shape, torch.float32)
    if kind == "small":
        for number in range(size % 3):  # frozen ones, without moments
            yield f"model.frozen.{number}.weight", _random(bits, (SMALL_ELEMENTS_MIN,), torch.bfloat16)


def _shapes(kind: str, size: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    if kind == "small":
        elements = np.random.default_rng(SEED)
        for number in range(size // 3):
            yield f"layers.{number}.weight", (int(elements.integers(SMALL_ELEMENTS_MIN, SMALL_ELEMENTS_MAX + 1)),)
        return
    vocabulary = LARGE_VOCABULARY * size // 1536
    yield "embedding.weight", (vocabulary, size)
    for layer in range(LARGE_LAYERS):
        yield f"layers.{layer}.norm1.weight", (size,)
        yield f"layers.{layer}.qkv.weight", (3 * size, size)
        yield f"layers.{layer}.out.weight", (size, size)
        yield f"layers.{layer}.norm2.weight", (size,)
        yield f"layers.{layer}.gate_up.weight", (8 * size, size)
        yield f"layers.{layer}.down.weight", (size, 4 * size)
    yield "norm.weight", (size,)
    yield "head.weight", (vocabulary, size)


def _random(bits: np.random.SFC64, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    # Through torch's own allocator: its 64-byte alignment is what an engine meets in training.
    tensor = torch.empty(shape, dtype=dtype)
    words = bits.random_raw(-(-tensor.nbytes // 8))
    _bytes(tensor).copy_(torch.from_numpy(words.view(np.uint8)[: tensor.nbytes]))
    return tensor


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.flatten().view(torch.uint8)


def empty_like(state: State) -> State:
    """The same shapes, zeroed: memory that a load fills, its pages touched."""
    return {name: torch.zeros_like(tensor) for name, tensor in state.items()}


def nbytes_of(state: State) -> int:
    return sum(tensor.nbytes for tensor in state.values())


def differences(state: State, other: State) -> list[str]:
    """The names of tensors that are not the same bit for bit (random bits hold NaNs, which equal nothing)."""
    return [name for name, tensor in state.items() if bits_differ(tensor, other[name])]


def bits_differ(tensor: torch.Tensor, other: torch.Tensor) -> bool:
    return not torch.equal(_bytes(tensor), _bytes(other))


def flip_bits(state: State) -> None:
    """Changes the first and the last byte of every tensor; doing it twice changes nothing."""
    for tensor in state.values():
        flat = _bytes(tensor)
        flat[0] ^= 0xFF
        if len(flat) > 1:
            flat[-1] ^= 0xFF
