"""Delta checkpoints made from two real saves without the package's writer: what an engine of another make could write.

`make_delta` takes a base and a full save of a later state, and puts together a checkpoint of that later state which
refers to the base's bytes: chunks with equal digests become records of shared files, the rest is copied.
"""

from __future__ import annotations

import json
import os
import secrets
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import zstandard

from durability.forge import MANIFEST, put, write_manifest
from snapstone.index import CHUNK_DTYPE

PAGE = 4096
XOR_CODECS = {1: 5, 2: 6, 4: 7, 8: 8}  # by bytes per item
PLANES = {0: 0, 1: 1, 2: 2, 3: 4, 4: 8, 5: 1, 6: 2, 7: 4, 8: 8}


class Record(NamedTuple):
    """A chunk record with the path of its file, that file's name in a later save, and the record that it refers to."""

    row: Any
    source: Path
    shared: str
    entry: dict[str, Any]  # the file object
    reference: Record | None

    @property
    def key(self) -> tuple[bytes, int]:
        return self.row["digest"].tobytes(), int(self.row["raw_bytes"])

    @property
    def stored(self) -> bytes:
        with self.source.open("rb") as file:
            file.seek(int(self.row["offset"]))
            return file.read(int(self.row["stored_bytes"]))

    @property
    def raw(self) -> bytes:
        codec, size = int(self.row["codec"]), int(self.row["raw_bytes"])
        if codec == 0:
            return self.stored
        data = zstandard.ZstdDecompressor().decompress(self.stored, max_output_size=size)
        item = PLANES[codec]
        items = size // item
        planes = np.frombuffer(data, np.uint8, items * item).reshape(item, items)
        data = planes.T.tobytes() + data[items * item :]
        return data if self.reference is None else exclusive_or(data, self.reference.raw)


class Part(NamedTuple):
    writer: dict[str, Any]
    header: dict[str, Any]
    records: list[Record]  # without reference chunks


def exclusive_or(left: bytes, right: bytes) -> bytes:
    return np.bitwise_xor(np.frombuffer(left, np.uint8), np.frombuffer(right, np.uint8)).tobytes()


def read_parts(path: Path) -> tuple[dict[str, Any], list[Part]]:
    manifest = json.loads((path / MANIFEST).read_bytes())
    shared = {entry["name"]: entry for entry in manifest.get("shared", [])}
    parts = []
    for writer in manifest["writers"]:
        index = (path / writer["index"]["name"]).read_bytes()
        begin = 16 + struct.unpack_from("<Q", index, 8)[0]
        header = json.loads(index[16:begin])
        table = np.frombuffer(index[-(-begin // 64) * 64 :], CHUNK_DTYPE)
        entries = shared | {entry["name"]: entry for entry in writer["data"]}
        kept = len(table) - header.get("references", 0)
        reference_of = dict(zip(np.flatnonzero(table["codec"] >= 5).tolist(), range(kept, len(table)), strict=True))
        records: dict[int, Record] = {}
        for number in reversed(range(len(table))):
            name = header["files"][table[number]["file"]]
            later = name if "/" in name else f"base/{manifest['save_id']}.{name}"
            reference = records.get(reference_of.get(number, -1))
            records[number] = Record(table[number], path / name, later, entries[name], reference)
        parts.append(Part(writer, header, [records[number] for number in range(kept)]))
    return manifest, parts


class _Writer:
    """One writer's part of a delta checkpoint."""

    def __init__(self, path: Path, part: Part) -> None:
        self.path = path
        self.header = dict(part.header, files=[])
        self.writer = {"rank": part.writer["rank"], "index": {"name": part.writer["index"]["name"]}, "data": []}
        self.rows: list[Any] = []
        self.references: list[Record] = []
        self.own = [bytearray(), bytearray()]  # data, carried
        self.carried: dict[tuple[str, int], int] = {}  # where a chunk of a shared file stands in the carried file
        self.shared: dict[str, Record] = {}

    def add_own(self, record: Record, codec: int, stored: bytes, number: int = 0) -> None:
        self._add_row(record, number, self._append(number, stored), codec, len(stored))

    def add_xor(self, record: Record, base: Record) -> None:
        """The record's chunk as its difference from the base's, which may be stored as a difference itself."""
        item = max(1, PLANES[int(record.row["codec"])])
        data = exclusive_or(record.raw, base.raw)
        items = len(data) // item
        planes = np.frombuffer(data, np.uint8, items * item).reshape(items, item).T.tobytes() + data[items * item :]
        frame = zstandard.ZstdCompressor(write_content_size=False).compress(planes)
        if len(frame) >= len(data):
            self.add_own(record, 0, record.raw)
            return
        self.add_own(record, XOR_CODECS[item], frame)
        self.references.append(base)

    def add_shared(self, record: Record, carry: bool) -> None:
        if carry:
            place = (record.shared, int(record.row["offset"]))
            if place not in self.carried:
                self.carried[place] = self._append(1, record.stored)
            self._add_row(record, 1, self.carried[place], int(record.row["codec"]), int(record.row["stored_bytes"]))
        else:
            self.shared.setdefault(record.shared, record)
            offset, stored = int(record.row["offset"]), int(record.row["stored_bytes"])
            self._add_row(record, record.shared, offset, int(record.row["codec"]), stored)
        if record.reference is not None:
            self.references.append(record.reference)

    def finish(self, carry: bool) -> list[Record]:
        """Writes the files; the records of shared files."""
        tensor_records = len(self.rows)
        for reference in iter(self._next_reference, None):
            self.add_shared(reference, carry)
        stem = f"rank-{self.writer['rank']:05d}"
        names = [f"{stem}.data", f"{stem}.carried.data"][: 2 if self.own[1] else 1]
        files: list[Any] = [*range(len(names)), *self.shared]
        table = np.array([(*row[:3], files.index(row[3]), *row[4:]) for row in self.rows], CHUNK_DTYPE)
        for number, name in enumerate(names):
            self.writer["data"].append({"name": name})
            put(self.path, self.writer["data"][-1], bytes(self.own[number]), table[table["file"] == number].tobytes())
        self.header["files"] = [*names, *self.shared]
        self.header["chunk_count"] = len(table)
        if len(table) > tensor_records:
            self.header["references"] = len(table) - tensor_records
        text = json.dumps(self.header, separators=(",", ":")).encode()
        head = struct.pack("<8sQ", b"SNAPSIDX", len(text)) + text
        put(self.path, self.writer["index"], head + bytes(-len(head) % 64) + table.tobytes())
        return list(self.shared.values())

    def _next_reference(self) -> Record | None:
        return self.references.pop(0) if self.references else None

    def _append(self, number: int, stored: bytes) -> int:
        own = self.own[number]
        offset = len(own)
        own += stored + bytes(-len(stored) % PAGE)
        return offset

    def _add_row(self, record: Record, file: Any, offset: int, codec: int, stored: int) -> None:
        row = record.row
        self.rows.append((offset, stored, int(row["raw_bytes"]), file, codec, 0, row["digest"]))


def make_delta(
    base: Path,
    full: Path,
    path: Path,
    *,
    xor: bool = False,
    carry: bool = False,
    change: Callable[[dict[str, Any]], None] | None = None,
) -> Path:
    """Makes `path` a delta checkpoint of what `full` holds, compared with `base`, which may be a delta itself.

    `xor` stores changed chunks as differences where the base has a chunk of the same size at their place, `carry`
    copies shared chunks into a file of the checkpoint's own, `change` gets the manifest before it is written.
    """
    path.mkdir(parents=True)
    base_manifest, base_parts = read_parts(base)
    manifest, parts = read_parts(full)
    manifest = dict(manifest, save_id=secrets.token_hex(16))
    known = {record.key: record for part in base_parts for record in part.records}
    links: dict[str, Record] = {}
    writers = []
    for rank, part in enumerate(parts):
        before = base_parts[rank].records if rank < len(base_parts) else []
        writer = _Writer(path, part)
        writer.header["save_id"] = manifest["save_id"]
        for number, record in enumerate(part.records):
            same = known.get(record.key)
            old = before[number] if number < len(before) else None
            if same is not None:
                writer.add_shared(same, carry)
            elif xor and old is not None and old.row["raw_bytes"] == record.row["raw_bytes"]:
                writer.add_xor(record, old)
            else:
                writer.add_own(record, int(record.row["codec"]), record.stored)
        for record in writer.finish(carry):
            links.setdefault(record.shared, record)
        writers.append(writer.writer)
    depth = (base_manifest.get("base") or {"depth": 0})["depth"] + 1
    manifest["writers"] = writers
    manifest["base"] = {
        "save_id": base_manifest["save_id"],
        "step": base_manifest["step"],
        "name": base.name,
        "depth": depth,
    }
    manifest["shared"] = [dict(record.entry, name=name) for name, record in links.items()]
    if links:
        (path / "base").mkdir(0o700)
    for name, record in links.items():
        os.link(record.source, path / name)
    if change is not None:
        change(manifest)
    write_manifest(path, json.dumps(manifest).encode())
    return path


def rewrite_manifest(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Changes a checkpoint's manifest, with its digest right."""
    document = json.loads((path / MANIFEST).read_bytes())
    change(document)
    write_manifest(path, json.dumps(document).encode())
