"""Tensors of any bits in any dtype, compared bit for bit: a NaN equals itself, and -0.0 is not 0.0."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import torch

from snapstone.values import STORED_DTYPES

DTYPES = list(STORED_DTYPES.values())
FLOATING = [dtype for dtype in DTYPES if dtype.is_floating_point and dtype.itemsize > 1]


def bits_of(tensor: torch.Tensor) -> bytes:
    """The elements of a tensor of any strides, in row-major order."""
    return raw_copy(tensor).numpy().tobytes()


def raw_copy(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.numel() == 0:
        return torch.empty(0, dtype=torch.uint8)
    resolved = tensor.detach().resolve_conj().resolve_neg()
    # A clone, because a tensor of one element counts as contiguous with any stride, and view() then refuses.
    return resolved.clone(memory_format=torch.contiguous_format).reshape(-1).view(torch.uint8)


def assert_same(actual: torch.Tensor, expected: torch.Tensor, what: object = "") -> None:
    assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape), what
    assert bits_of(actual) == bits_of(expected), what


def random_bits(dtype: torch.dtype, *shape: int, seed: int = 0) -> torch.Tensor:
    """Every bit pattern that the dtype has can occur; of bool only 0 and 1."""
    nbytes = math.prod(shape) * dtype.itemsize
    generator = torch.Generator().manual_seed(seed)
    raw = torch.randint(0, 2 if dtype is torch.bool else 256, (nbytes,), dtype=torch.uint8, generator=generator)
    return raw.view(dtype).reshape(shape) if nbytes else torch.empty(shape, dtype=dtype)


def other_bits(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor of the same dtype and shape in which every element has other bits: what a load must overwrite."""
    if tensor.numel() == 0:
        return torch.empty_like(tensor)
    raw = raw_copy(tensor) ^ (1 if tensor.dtype is torch.bool else 0xA5)
    return raw.view(tensor.dtype).reshape(tensor.shape)


def files_of(path: str | os.PathLike[str]) -> dict[str, bytes]:
    return {entry.name: entry.read_bytes() for entry in sorted(Path(path).iterdir())}


def nested_equal(actual: Any, expected: Any) -> bool:
    """Same structure, same types of containers, same bits of tensors and floats; dicts in any order."""
    if isinstance(expected, torch.Tensor):
        same = isinstance(actual, torch.Tensor) and (actual.dtype, actual.shape) == (expected.dtype, expected.shape)
        return same and bits_of(actual) == bits_of(expected)
    if isinstance(expected, dict):
        keys_agree = isinstance(actual, dict) and actual.keys() == expected.keys()
        return keys_agree and all(nested_equal(actual[key], expected[key]) for key in expected)
    if isinstance(expected, list | tuple):
        if type(actual) is not type(expected) or len(actual) != len(expected):
            return False
        return all(nested_equal(one, other) for one, other in zip(actual, expected, strict=True))
    if type(expected) is int:
        return type(actual) is int and actual == expected
    return type(actual) is type(expected) and repr(actual) == repr(expected)  # of floats: exact, and nan is nan
