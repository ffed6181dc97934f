"""One safetensors file, read by the packages that are made for it.

Each is imported when it is asked to load. A load ends when every tensor stands in the caller's memory, as it does with
a checkpoint: packages that map the file, or hand out memory of their own, are charged for the copy.
"""

from __future__ import annotations

import importlib.util
import json
import os
import struct
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

__all__ = ["FILE_ENGINES", "is_tensor_file", "load_into", "missing_package", "raw_tensors"]

_LENGTH = struct.Struct("<Q")
_HEADER_BYTES_MAX = 100 << 20  # the limit of the format
_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "F32": torch.float32,
    "I64": torch.int64,
    "F64": torch.float64,
}

_Target = Mapping[str, torch.Tensor]


def is_tensor_file(path: str) -> bool:
    return path.endswith(".safetensors") and os.path.isfile(path)


def raw_tensors(path: str) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of the file, read without any of the packages: what they are compared with.

    Raises ValueError for what is no such file.
    """
    with open(path, "rb") as file:
        start = file.read(_LENGTH.size)
        nbytes = _LENGTH.unpack(start)[0] if len(start) == _LENGTH.size else _HEADER_BYTES_MAX + 1
        if nbytes > _HEADER_BYTES_MAX:
            raise ValueError(f"{path}: not a safetensors file")
        try:
            header: dict[str, Any] = json.loads(file.read(nbytes))
            header.pop("__metadata__", None)
            places = [(name, _DTYPES[one["dtype"]], one["shape"], *one["data_offsets"]) for name, one in header.items()]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}: not a safetensors file that can be read here: {error!r}") from None
        for name, dtype, shape, begin, end in places:
            file.seek(_LENGTH.size + nbytes + begin)
            data = bytearray(file.read(end - begin))
            if len(data) != end - begin:
                raise ValueError(f"{path}: damaged, it ends before {name!r} does")
            yield name, torch.frombuffer(data, dtype=dtype).view(shape) if data else torch.empty(shape, dtype=dtype)


def _safetensors(path: str, target: _Target) -> None:
    from safetensors import safe_open

    with safe_open(path, framework="pt", device="cpu") as file:
        for name, tensor in target.items():
            tensor.copy_(file.get_tensor(name))


def _fastsafetensors(path: str, target: _Target) -> None:
    from fastsafetensors import fastsafe_open

    with fastsafe_open(filenames=[path], nogds=True, device="cpu") as file:
        for name, tensor in target.items():
            tensor.copy_(file.get_tensor(name))


def _runai(path: str, target: _Target) -> None:
    from runai_model_streamer import SafetensorsStreamer

    with SafetensorsStreamer() as streamer:
        streamer.stream_file(path)
        for name, tensor in streamer.get_tensors():  # a view that the next one overwrites
            target[name].copy_(tensor)


_LOADERS: Mapping[str, tuple[str, Callable[[str, _Target], None]]] = {  # by engine: its module
    "safetensors": ("safetensors", _safetensors),
    "fastsafetensors": ("fastsafetensors", _fastsafetensors),
    "runai-model-streamer": ("runai_model_streamer", _runai),
}
FILE_ENGINES = tuple(_LOADERS)


def missing_package(engine: str) -> str | None:
    """Why `engine` cannot load here."""
    return None if importlib.util.find_spec(_LOADERS[engine][0]) else f"{engine} is not installed"


def load_into(engine: str, path: str, target: _Target) -> None:
    """Fills every tensor. Raises what the package raises."""
    with torch.no_grad():
        _LOADERS[engine][1](path, target)
