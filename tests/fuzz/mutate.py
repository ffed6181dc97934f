"""Sound documents, changed as the bytes of a fuzzer's input say: structure first, so that most changes get past the
first check.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from copy import deepcopy
from typing import Any

from durability.forge import edit, places

EDGES = (0, 1, -1, 63, 64, 4095, 4096, 1 << 31, (1 << 31) - 1, 1 << 32, 1 << 53, (1 << 62) + 1, (1 << 63) - 1, 1 << 63)
TAGS = ("$tuple", "$dict", "$set", "$bytes", "$int", "$float", "$numpy", "$ndarray", "$tensor", "$pickle", "$range")
TEXTS = (
    "",
    ".",
    "..",
    "../x",
    "/etc/passwd",
    "a\0b",
    "\ud800",
    "\u202e",
    "__proto__",
    "x" * 300,
    "NaN",
    "1e400",
    "AA==",
)
OPCODES = (
    *(b"r\xff\xff\xff\x7f", b"r\xff\xff\xff\xff", b"j\xff\xff\xff\xff", b"q\xff", b"p99999999999\n", b"\x94", b"."),
    *(b"\x8e" + b"\xff" * 8, b"\x8d" + b"\x7f" * 8, b"\x96" + b"\x7f" * 8, b"\x95" + b"\xff" * 8, b"B\xff\xff\xff\x7f"),
    *(b"R", b"\x81", b"\x92", b"b", b"u", b"s", b"e", b"a", b"(", b"0", b"2", b"1", b"t", b"}", b"]", b"N", b"\x93"),
    *(b"cos\nsystem\n", b"ctorch\nSize\n", b"cbuiltins\neval\n", b"ccollections\nOrderedDict\n", b"Pid\n", b"\x82\x01"),
    *(
        b"I99999999999999999999\n",
        b"\x8b\xff\xff\xff\x7f",
        b"Fnan\n",
        b"Vx\n",
        b"cpathlib\nPosixPath\n",
        b"\x8f",
        b"\x90",
    ),
)


class Input:
    """Choices out of the bytes of an input; zeros once they are used up."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def take(self, count: int) -> bytes:
        taken = self._data[self._at : self._at + count]
        self._at += count
        return taken

    def below(self, count: int) -> int:
        return int.from_bytes(self.take(1 if count <= 256 else 2), "little") % max(count, 1)

    def choose(self, options: Sequence[Any]) -> Any:
        return options[self.below(len(options))]


def value(source: Input, depth: int = 3) -> Any:
    match source.below(12):
        case 0:
            return None
        case 1:
            return source.choose((True, False))
        case 2 | 3:
            return source.choose(EDGES)
        case 4:
            return source.choose((1.5, -0.0, 1e308, 0.1))
        case 5:
            return source.choose(TEXTS)
        case 6:
            return source.take(source.below(9)).decode("latin-1")
        case 7:
            return int.from_bytes(source.take(8), "little", signed=True)
        case 8 if depth:
            return [value(source, depth - 1) for _ in range(source.below(4))]
        case 9 if depth:
            return {source.choose(TEXTS): value(source, depth - 1) for _ in range(source.below(3))}
        case 10 | 11 if depth:
            return {source.choose(TAGS): value(source, depth - 1)}
        case _:
            return []


def document(source: Input, sound: Any) -> Any:
    """`sound` with one to four changes of values, keys and lengths."""
    changed = deepcopy(sound)
    for _ in range(1 + source.below(4)):
        found = list(places(changed))
        if not found:
            return value(source)
        at = source.choose(found)
        other = source.choose(found)
        kind, new = source.below(8), None
        if kind <= 3:
            new = value(source)
        elif kind == 4:
            new = _find(changed, other)
        edit(changed, at, lambda inside, key, kind=kind, new=new: _change(inside, key, kind, new, source))
    return changed


def _find(found: Any, at: tuple[Any, ...]) -> Any:
    for key in at:
        found = found[key]
    return deepcopy(found)


def _change(inside: Any, key: Any, kind: int, new: Any, source: Input) -> None:
    if kind <= 4:
        inside[key] = new
    elif kind == 5:
        del inside[key]
    elif kind == 6 and type(inside[key]) is int:
        inside[key] += source.choose(EDGES)
    elif type(inside) is list:
        inside.insert(key, deepcopy(inside[key]))
    else:
        inside[source.choose((*TEXTS, *inside))] = inside[key]


def text(source: Input, sound: Any) -> bytes:
    """A changed document as JSON; of eight, one with bytes changed after that, and one that nests deeply."""
    match source.below(8):
        case 0:
            return raw(source, json.dumps(sound).encode())
        case 1:
            depth = source.choose((10, 60, 200, 900, 1000, 5000))
            nested = json.dumps(document(source, sound)).encode()
            return b'{"a":' * depth + nested + b"}" * depth if source.below(2) else nested[:-1] + b"[" * depth
        case _:
            return json.dumps(document(source, sound)).encode()


def raw(source: Input, sound: bytes, pieces: Sequence[bytes] = ()) -> bytes:
    """Bytes overwritten, put in, left out or doubled; `pieces` are put in, too."""
    changed = bytearray(sound)
    for _ in range(1 + source.below(4)):
        at = source.below(min(len(changed) + 1, 65536))
        match source.below(6):
            case 0:
                changed[at : at + 1] = source.take(1)
            case 1:
                changed[at:at] = source.take(source.below(12))
            case 2:
                del changed[at : at + 1 + source.below(32)]
            case 3:
                changed[at:at] = changed[at : at + source.below(64)]
            case 4 if pieces:
                changed[at:at] = source.choose(pieces)
            case _ if pieces:
                changed[at : at + 1 + source.below(8)] = source.choose(pieces)
            case _:
                del changed[at:]
    return bytes(changed)
