"""A checkpoint dictionary as one text and named tensors, and back to exactly what it was.

Tensors are leaves under the names of their places ("state_dict.layer.weight"). Everything else is one text of typed
JSON (see `values`), in which containers keep their types. What that JSON has no form for (objects of classes, counters,
enums) goes through `torch.save`, by itself; such a value loads where `torch.load(weights_only=True)` takes it, or with
weights_only=False.

    {"$at": name}                     a tensor      {"$array": name}   a numpy array, stored as a tensor
    {"$ordered": [[key, value], ...], "metadata": value}     an OrderedDict, and its `_metadata` if it has one
    {"$pairs": [[key, value], ...]}   a dict with keys that are not plain names
    {"$saved": base64}  {"$saved_at": name}                  bytes of torch.save
"""

from __future__ import annotations

import base64
import io
import json
import pickle
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from .. import values
from ..errors import CorruptCheckpointError, IncompatibleCheckpointError

__all__ = ["Packed", "pack", "unpack"]

_SAVED_BYTES_MAX = 1 << 20  # of torch.save, inside the text


@dataclass(slots=True)
class Packed:
    """`tensors` are the caller's own, not copies."""

    text: str = ""
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)


def pack(checkpoint: Mapping[str, Any], *, embed_bytes: int = 0, taken: Iterable[str] = ()) -> Packed:
    """
    Args:
        taken: names that no tensor gets.
        embed_bytes: tensors of so many bytes at most are copied into the text, where they may differ from rank to rank.

    Raises:
        TypeError, ValueError: a value that cannot be pickled either, by its place.
    """
    packing = _Packing(embed_bytes, frozenset(taken))
    packing.packed.text = json.dumps(packing.node(dict(checkpoint), ""))
    return packing.packed


def unpack(text: str, tensors: Mapping[str, torch.Tensor], *, weights_only: bool = True) -> dict[str, Any]:
    """The inverse of `pack`.

    Raises:
        IncompatibleCheckpointError: a value that loads with weights_only=False alone.
        CorruptCheckpointError: a text that `pack` has not written.
    """
    try:
        found = _Unpacking(tensors, weights_only).value(json.loads(text), "")
    except (json.JSONDecodeError, RecursionError) as error:
        raise CorruptCheckpointError(f"not a packed checkpoint: {error}") from None
    if not isinstance(found, dict):
        raise CorruptCheckpointError("not a packed checkpoint")
    return found


class _Packing:
    def __init__(self, embed_bytes: int, taken: frozenset[str]) -> None:
        self.embed_bytes = embed_bytes
        self._taken = taken
        self.packed = Packed()
        self._open: set[int] = set()  # containers on the way down

    def node(self, value: Any, place: str) -> Any:
        if isinstance(value, torch.Tensor):
            return self._tensor(value, place)
        if type(value) in (dict, list, tuple, OrderedDict):
            if id(value) in self._open:
                raise ValueError(f"{place}: contains itself")
            self._open.add(id(value))
            try:
                return self._container(value, place)
            finally:
                self._open.remove(id(value))
        if isinstance(value, np.ndarray) and value.nbytes > self.embed_bytes and value.dtype.kind in "biufc":
            try:
                return {"$array": self._put(torch.from_numpy(np.ascontiguousarray(value)), place)}
            except TypeError:
                return self._saved(value, place)
        try:
            return values.encode(value, name=place)
        except (TypeError, ValueError):
            return self._saved(value, place)

    def _container(self, value: Any, place: str) -> Any:
        if type(value) is list:
            return [self.node(item, _below(place, index)) for index, item in enumerate(value)]
        if type(value) is tuple:
            return {"$tuple": [self.node(item, _below(place, index)) for index, item in enumerate(value)]}
        if type(value) is dict and all(type(key) is str and key[:1] != "$" and key.isascii() for key in value):
            return {key: self.node(item, _below(place, key)) for key, item in value.items()}
        pairs = []
        for key, item in value.items():
            try:
                encoded = values.encode(key, name=place)
            except (TypeError, ValueError):
                return self._saved(value, place)
            pairs.append([encoded, self.node(item, _below(place, key))])
        if type(value) is dict:
            return {"$pairs": pairs}
        ordered: dict[str, Any] = {"$ordered": pairs}
        if (metadata := getattr(value, "_metadata", None)) is not None:
            ordered["metadata"] = self.node(metadata, _below(place, "_metadata"))
        return ordered

    def _tensor(self, tensor: torch.Tensor, place: str) -> Any:
        plain = type(tensor) in (torch.Tensor, torch.nn.Parameter) and tensor.layout is torch.strided
        if not plain or tensor.is_meta or tensor.is_quantized or str(tensor.dtype)[6:] not in values.STORED_DTYPES:
            return self._saved(tensor, place)
        if tensor.nbytes <= self.embed_bytes:
            return values.encode(tensor, name=place)
        return {"$at": self._put(tensor.detach(), place)}

    def _put(self, tensor: torch.Tensor, place: str) -> str:
        name = place
        while name in self.packed.tensors or name in self._taken:
            name += "'"
        self.packed.tensors[name] = tensor
        return name

    def _saved(self, value: Any, place: str) -> Any:
        buffer = io.BytesIO()
        try:
            torch.save(value, buffer)
        except Exception as error:  # pickle raises whatever the object's own hooks raise
            raise TypeError(f"{place}: cannot store a {type(value).__qualname__}: {error}") from error
        data = buffer.getvalue()
        if len(data) <= _SAVED_BYTES_MAX:
            return {"$saved": base64.b64encode(data).decode("ascii")}
        return {"$saved_at": self._put(torch.frombuffer(bytearray(data), dtype=torch.uint8), place)}


def _below(place: str, key: object) -> str:
    return f"{place}.{key}" if place else str(key)


class _Unpacking:
    def __init__(self, tensors: Mapping[str, torch.Tensor], weights_only: bool) -> None:
        self.tensors = tensors
        self.weights_only = weights_only

    def value(self, node: Any, place: str) -> Any:
        if type(node) is list:
            return [self.value(item, _below(place, index)) for index, item in enumerate(node)]
        if type(node) is not dict:
            return node
        tag = next((key for key in node if key[:1] == "$"), None)
        if tag is None:
            return {key: self.value(item, _below(place, key)) for key, item in node.items()}
        known = getattr(self, f"_{tag[1:]}", None) if tag in _TAGS else None
        return values.decode(node, name=place) if known is None else known(node, node[tag], place)

    def _at(self, node: Mapping[str, Any], name: Any, place: str) -> torch.Tensor:
        try:
            return self.tensors[name]
        except (KeyError, TypeError):
            raise CorruptCheckpointError(f"{place}: its tensor is missing") from None

    def _array(self, node: Mapping[str, Any], name: Any, place: str) -> Any:
        return self._at(node, name, place).cpu().numpy()

    def _tuple(self, node: Mapping[str, Any], items: Any, place: str) -> tuple[Any, ...]:
        return tuple(self.value(_listed(items, place), place))

    def _pairs(self, node: Mapping[str, Any], pairs: Any, place: str) -> dict[Any, Any]:
        return dict(self._items(pairs, place))

    def _ordered(self, node: Mapping[str, Any], pairs: Any, place: str) -> OrderedDict[Any, Any]:
        ordered = OrderedDict(self._items(pairs, place))
        if "metadata" in node:
            ordered._metadata = self.value(node["metadata"], _below(place, "_metadata"))  # type: ignore[attr-defined]
        return ordered

    def _items(self, pairs: Any, place: str) -> Iterable[tuple[Any, Any]]:
        for pair in _listed(pairs, place):
            if type(pair) is not list or len(pair) != 2:
                raise CorruptCheckpointError(f"{place}: not an item of a dict")
            key = values.decode(pair[0], name=place)
            yield key, self.value(pair[1], _below(place, key))

    def _saved(self, node: Mapping[str, Any], text: Any, place: str) -> Any:
        try:
            return self._load(base64.b64decode(text, validate=True), place)
        except (TypeError, ValueError):
            raise CorruptCheckpointError(f"{place}: not bytes") from None

    def _saved_at(self, node: Mapping[str, Any], name: Any, place: str) -> Any:
        return self._load(self._at(node, name, place).cpu().numpy().tobytes(), place)

    def _load(self, data: bytes, place: str) -> Any:
        try:
            return torch.load(io.BytesIO(data), map_location="cpu", weights_only=self.weights_only)
        except pickle.UnpicklingError as error:
            reason = str(error).partition("\n")[0]
            raise IncompatibleCheckpointError(
                f"{place}: needs pickle, which can run code; pass weights_only=False if you trust the checkpoint, or "
                f"name its classes to torch.serialization.add_safe_globals ({reason})"
            ) from None


_TAGS = ("$at", "$array", "$tuple", "$pairs", "$ordered", "$saved", "$saved_at")


def _listed(items: Any, place: str) -> list[Any]:
    if type(items) is not list:
        raise CorruptCheckpointError(f"{place}: not a list")
    return items
