"""Typed JSON of the reference reader: Python values as docs/format.md writes them; pickles are never run."""

from __future__ import annotations

import base64
import datetime
import struct
from pathlib import PurePosixPath
from typing import Any, NamedTuple

import numpy as np


class FormatError(Exception):
    """The first thing that is not as the format says."""


class Tagged(NamedTuple):  # a value that only torch has, or a pickle, which nobody runs here
    tag: str
    payload: Any


def check(condition: object, *what: object) -> None:
    if not condition:
        raise FormatError(" ".join(map(str, what)))


def decode(value: Any) -> Any:
    """The Python value of typed JSON. Values of torch's own types come back as `Tagged`, and so do pickles."""
    if type(value) is list:
        return [decode(item) for item in value]
    if type(value) is not dict:
        return value
    ((tag, payload),) = value.items() if len(value) == 1 else (("", None),)
    if not tag.startswith("$"):
        check(not any(key.startswith("$") for key in value), "a tag among other keys")
        return {key: decode(item) for key, item in value.items()}
    check(tag in DECODERS or tag in TORCH_TAGS, "unknown tag", tag)
    return DECODERS[tag](payload) if tag in DECODERS else Tagged(tag, payload)


def array(payload: dict[str, Any], shape: list[int]) -> Any:
    dtype = payload["dtype"]
    dtype = np.dtype(dtype if dtype[0] in "<>|" else np.dtype(dtype).newbyteorder("<"))
    return np.frombuffer(base64.b64decode(payload["data"], validate=True), dtype).reshape(shape)


def special_float(text: str) -> float:
    return struct.unpack(">d", bytes.fromhex(text))[0] if len(text) == 16 else float(text)


TORCH_TAGS = {"$dtype", "$device", "$size", "$tensor", "$pickle"}
DECODERS: dict[str, Any] = {
    "$tuple": lambda payload: tuple(map(decode, payload)),
    "$set": lambda payload: set(map(decode, payload)),
    "$frozenset": lambda payload: frozenset(map(decode, payload)),
    "$dict": lambda payload: {decode(key): decode(item) for key, item in payload},
    "$slice": lambda payload: slice(*map(decode, payload)),
    "$range": lambda payload: range(*payload),
    "$ellipsis": lambda payload: ...,
    "$complex": lambda payload: complex(*map(decode, payload)),
    "$float": special_float,
    "$int": lambda payload: int(payload, 16),
    "$str": lambda payload: base64.b64decode(payload, validate=True).decode("utf-8", "surrogatepass"),
    "$bytes": lambda payload: base64.b64decode(payload, validate=True),
    "$bytearray": lambda payload: bytearray(base64.b64decode(payload, validate=True)),
    "$path": lambda payload: PurePosixPath(decode(payload)),
    "$datetime": datetime.datetime.fromisoformat,
    "$date": datetime.date.fromisoformat,
    "$timedelta": lambda payload: datetime.timedelta(*payload),
    "$numpy": lambda payload: array(payload, [1])[0],
    "$ndarray": lambda payload: array(payload, payload["shape"]),
}
