"""Delta checkpoints put together from two full saves: chunks that the earlier one has are links into its files."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np

import snapstone as ss
from snapstone import _native, index, manifest
from snapstone.index import CHUNK_DTYPE
from snapstone.manifest import Base, FileEntry, Manifest, Writer
from snapstone.reader import Reader

PAGE_BYTES = 4096


def save_delta(
    state: dict[str, Any], path: Path, base: Path, step: int | None = None, metadata: dict[str, Any] | None = None
) -> Path:
    """Saves `state` at `path`, as far as its chunks are not those of the checkpoint at `base`."""
    full = path.with_name(f"full-of-{path.name}")
    ss.save(state, checkpoint_id=full, step=step, metadata=metadata)
    make_delta(full, path, base)
    shutil.rmtree(full)
    return path


def make_delta(full: Path, path: Path, base: Path) -> None:
    """Makes `path` the checkpoint at `full` with the chunks of `base`, writer by writer."""
    new, old = Reader(full), Reader(base)
    path.mkdir(mode=0o700)
    shared: dict[str, FileEntry] = {}
    writers = [_write(path, new, old, number, shared) for number in range(new.manifest.world_size)]
    depth = 1 if old.manifest.base is None else old.manifest.base.depth + 1
    document = Manifest(
        save_id=new.manifest.save_id,
        step=new.manifest.step,
        world_size=new.manifest.world_size,
        nbytes=new.manifest.nbytes,
        writers=tuple(writers),
        metadata=new.manifest.metadata,
        environment=new.manifest.environment,
        base=Base(old.manifest.save_id, old.manifest.step, base.name, depth),
        shared=tuple(shared.values()),
    )
    (path / manifest.MANIFEST_NAME).write_bytes(document.to_bytes())
    (path / manifest.DIGEST_NAME).write_bytes(manifest.digest_line(document.to_bytes()))


def _write(path: Path, new: Reader, old: Reader, number: int, shared: dict[str, FileEntry]) -> Writer:
    """One writer's files; the links that it needs are made and counted in `shared`."""
    writer, parsed = new.manifest.writers[number], new.indexes[number]
    known = _chunks_of(old)
    table = np.frombuffer(parsed.table, CHUNK_DTYPE).copy()
    source = (Path(new.path) / writer.data[0].name).read_bytes()
    data, files = b"", [writer.data[0].name]
    for record in table:
        found = known.get((record["digest"].tobytes(), int(record["raw_bytes"])))
        if found is None:
            begin, size = int(record["offset"]), int(-(-int(record["stored_bytes"]) // PAGE_BYTES) * PAGE_BYTES)
            record["offset"], record["file"] = len(data), 0
            data += source[begin : begin + size]
            continue
        entry, where, row = found
        name = _link(path, entry, where, shared)
        if name not in files:
            files.append(name)
        for column in ("offset", "stored_bytes", "codec"):
            record[column] = row[column]
        record["file"] = files.index(name)
    (path / files[0]).write_bytes(data)
    encoded = index.encode(
        save_id=parsed.save_id,
        rank=parsed.rank,
        world_size=parsed.world_size,
        files=files,
        chunk_bytes=parsed.chunk_bytes,
        tensors_json=index.encode_tensors(parsed.tensors),
        objects=parsed.objects,
        table=table.tobytes(),
    )
    (path / writer.index.name).write_bytes(encoded)
    rows = table[table["file"] == 0].tobytes()
    return Writer(
        writer.rank,
        FileEntry(writer.index.name, len(encoded), _native.digest_hex(encoded)),
        (FileEntry(files[0], len(data), _native.digest_hex(rows)),),
    )


def _chunks_of(old: Reader) -> dict[tuple[bytes, int], tuple[FileEntry, Path, Any]]:
    """Digest and size -> the file's entry under the name that a link has, where the file is, and the record."""
    entries = {entry.name: entry for writer in old.manifest.writers for entry in writer.data}
    links = {
        name: FileEntry(manifest.shared_name(old.manifest.save_id, name), entry.nbytes, entry.xxh128)
        for name, entry in entries.items()
    } | old.manifest.shared_by_name
    known = {}
    for parsed in old.indexes:
        for record in np.frombuffer(parsed.table, CHUNK_DTYPE):
            name = parsed.files[int(record["file"])]
            known[record["digest"].tobytes(), int(record["raw_bytes"])] = (links[name], Path(old.path) / name, record)
    return known


def _link(path: Path, entry: FileEntry, where: Path, shared: dict[str, FileEntry]) -> str:
    if entry.name not in shared:
        (path / manifest.BASE_NAME).mkdir(mode=0o700, exist_ok=True)
        os.link(where, path / entry.name)
        shared[entry.name] = entry
    return entry.name
