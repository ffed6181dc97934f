"""A .safetensors file written from tensors in host memory, without the interpreter lock while bytes move.

safetensors' own function holds the lock for the whole file, which stops a training loop as if it wrote the file itself.
The bytes are the same.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

import torch

__all__ = ["can_hold", "header", "write"]

# In the order in which the format wants tensors, last first.
_NAMES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.int16: "I16",
    torch.uint16: "U16",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int32: "I32",
    torch.uint32: "U32",
    torch.float32: "F32",
    torch.complex64: "C64",
    torch.float64: "F64",
    torch.int64: "I64",
    torch.uint64: "U64",
}
_ORDER = {dtype: -position for position, dtype in enumerate(_NAMES)}


def can_hold(tensors: Mapping[str, torch.Tensor]) -> bool:
    """Whether these are what `write` knows: plain, contiguous, of a known type, none twice."""
    places = [tensor.data_ptr() for tensor in tensors.values() if tensor.numel()]
    return len(set(places)) == len(places) and all(
        tensor.dtype in _NAMES and tensor.layout is torch.strided and tensor.is_contiguous()
        for tensor in tensors.values()
    )


def write(path: str, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None) -> None:
    """Writes CPU tensors; the file is not synced."""
    names = _sorted(tensors)
    with open(path, "wb", buffering=0) as file:
        file.write(header(tensors, metadata))
        for name in names:
            view = memoryview(tensors[name].detach().reshape(-1).view(torch.uint8).numpy().data)
            while view.nbytes:
                view = view[file.write(view) :]


def header(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None) -> bytes:
    """What the file begins with."""
    document: dict[str, object] = {} if metadata is None else {"__metadata__": dict(metadata)}
    offset = 0
    for name in _sorted(tensors):
        tensor = tensors[name]
        document[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.nbytes],
        }
        offset += tensor.nbytes
    text = json.dumps(document, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _sorted(tensors: Mapping[str, torch.Tensor]) -> list[str]:
    return sorted(tensors, key=lambda name: (_ORDER[tensors[name].dtype], name))
