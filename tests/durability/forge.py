"""A hostile writer: takes a checkpoint apart and puts it together again, changed, with every digest right."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from snapstone.index import CHUNK_DTYPE

MANIFEST, DIGEST = "MANIFEST.json", "MANIFEST.xxh128"


def digest(data: bytes) -> str:
    return xxhash.xxh3_128_hexdigest(data)


class Forge:
    """A checkpoint in parts: `manifest` and `header` (JSON), `table` (chunk records), `data`; one writer's. Shared
    files are linked as they are.
    """

    def __init__(self, source: Path, rank: int = 0) -> None:
        self.source = source
        self.manifest = json.loads((source / MANIFEST).read_bytes())
        self.writer = self.manifest["writers"][rank]
        index = (source / self.writer["index"]["name"]).read_bytes()
        begin = 16 + struct.unpack_from("<Q", index, 8)[0]
        self.header = json.loads(index[16:begin])
        self.table = np.frombuffer(index[-(-begin // 64) * 64 :], CHUNK_DTYPE).copy()
        self.data = (source / self.writer["data"][0]["name"]).read_bytes()
        self.header_text: bytes | None = None  # instead of `header`
        self.header_bytes: int | None = None  # instead of its length
        self.index: bytes | None = None  # instead of all of it
        self.manifest_text: bytes | None = None

    def write(self, path: Path) -> None:
        """Makes `path` the checkpoint; names that are no file names are only written down."""
        if path.exists():
            shutil.rmtree(path)
        path.mkdir(parents=True)
        index = self.index if self.index is not None else self._index()
        put(path, self.writer.get("index"), index)
        data = self.writer.get("data")
        if type(data) is list and data and type(data[0]) is dict:
            put(path, data[0], self.data, self.table[self.table["file"] == 0].tobytes())
        if (self.source / "base").is_dir():
            shutil.copytree(self.source / "base", path / "base", copy_function=os.link)
        text = self.manifest_text
        write_manifest(path, json.dumps(self.manifest).encode() if text is None else text)

    def _index(self) -> bytes:
        text = self.header_text if self.header_text is not None else json.dumps(self.header).encode()
        head = struct.pack("<8sQ", b"SNAPSIDX", len(text) if self.header_bytes is None else self.header_bytes) + text
        return head + bytes(-len(head) % 64) + self.table.tobytes()


def put(path: Path, entry: Any, data: bytes, digested: bytes | None = None) -> None:
    """Writes a file and sets size and digest in its file object."""
    if type(entry) is not dict:
        return
    entry.update(nbytes=len(data), xxh128=digest(data if digested is None else digested))
    name = entry.get("name")
    if (
        type(name) is str
        and name
        and "/" not in name
        and "\0" not in name
        and name not in (".", "..")
        and len(name) < 250
    ):
        (path / name).write_bytes(data)


def write_manifest(path: Path, text: bytes) -> None:
    (path / MANIFEST).write_bytes(text)
    (path / DIGEST).write_text(f"{digest(text)}  {MANIFEST}\n")


def places(document: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value in a JSON document."""
    if at:
        yield at
    entries = document.items() if type(document) is dict else enumerate(document) if type(document) is list else ()
    for key, value in entries:
        yield from places(value, (*at, key))


def edit(document: Any, at: tuple[Any, ...], change: Callable[[Any, Any], None]) -> None:
    """Calls `change(container, key)` for the value at a path."""
    for key in at[:-1]:
        document = document[key]
    change(document, at[-1])
