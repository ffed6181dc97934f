"""MANIFEST.json and MANIFEST.xxh128: the root of a checkpoint. `docs/format.md` is normative."""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from . import _native
from .config import FORMAT_MAJOR, FORMAT_MINOR
from .errors import (
    CheckpointNotFoundError,
    CorruptCheckpointError,
    IncompatibleCheckpointError,
    IncompleteCheckpointError,
)
from .index import load_json

__all__ = [
    "BASE_NAME",
    "DCP_MARKER",
    "DCP_MARKER_NAME",
    "DIGEST_NAME",
    "MANIFEST_NAME",
    "NOT_REGULAR_ERRNOS",
    "Base",
    "FileEntry",
    "Manifest",
    "Writer",
    "base_of",
    "digest_line",
    "is_checkpoint",
    "is_file_of_checkpoint",
    "is_shared_file",
    "origin_of_shared",
    "read",
    "read_with_digest",
    "shared_name",
    "shared_of",
    "writer_of",
]

MANIFEST_NAME = "MANIFEST.json"
DIGEST_NAME = "MANIFEST.xxh128"
BASE_NAME = "base"  # the directory of shared files
# For trainers that look for torch.distributed.checkpoint's file of this name to find finished checkpoints. Never read.
DCP_MARKER_NAME = ".metadata"
DCP_MARKER = b"This checkpoint is in snapstone's format. Load it with snapstone.dcp.StorageReader.\n"
_DIGEST_BYTES_MAX = 4096
# What opening and reading say of a link, FIFO, socket, device or directory in the place of a file, and of anything else
# in the place of a directory.
NOT_REGULAR_ERRNOS = (errno.ELOOP, errno.EINVAL, errno.ENXIO, errno.ENODEV, errno.EISDIR, errno.ENOTDIR)
_RANK_FILE = re.compile(r"rank-\d{5,}\.(data|carried\.data|index)", re.ASCII)
_SHARED_FILE = re.compile(r"([0-9a-f]{32})\.(rank-\d{5,}\.(?:carried\.)?data)", re.ASCII)
_HEX128 = re.compile(r"[0-9a-f]{32}\Z")


@dataclass(frozen=True, slots=True)
class FileEntry:
    """`xxh128` covers a file's bytes; of a data file, whose bytes have a digest per chunk, the rows of its chunk
    table.
    """

    name: str
    nbytes: int
    xxh128: str

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, "nbytes": self.nbytes, "xxh128": self.xxh128}


@dataclass(frozen=True, slots=True)
class Writer:
    rank: int
    index: FileEntry
    data: tuple[FileEntry, ...]

    def to_json(self) -> dict[str, Any]:
        return {"rank": self.rank, "index": self.index.to_json(), "data": [entry.to_json() for entry in self.data]}


@dataclass(frozen=True, slots=True)
class Base:
    """What a delta save was compared with, for people. `depth`: delta saves since a full one, this one included."""

    save_id: str
    step: int | None
    name: str  # of its directory
    depth: int

    def to_json(self) -> dict[str, Any]:
        return {"save_id": self.save_id, "step": self.step, "name": self.name, "depth": self.depth}


@dataclass(frozen=True, slots=True)
class Manifest:
    """`shared` are the data files of earlier saves that stand in BASE_NAME, with names that begin with it."""

    save_id: str
    step: int | None
    world_size: int
    nbytes: int  # of all tensors, each counted once
    writers: tuple[Writer, ...]
    metadata: Mapping[str, Any]  # typed JSON
    environment: Mapping[str, Any]
    format_version: tuple[int, int] = (FORMAT_MAJOR, FORMAT_MINOR)
    base: Base | None = None
    shared: tuple[FileEntry, ...] = ()
    shared_by_name: Mapping[str, FileEntry] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "shared_by_name", {entry.name: entry for entry in self.shared})

    def to_bytes(self) -> bytes:
        document: dict[str, Any] = {
            "format": "snapstone",
            "format_version": ".".join(map(str, self.format_version)),
            "save_id": self.save_id,
            "step": self.step,
            "world_size": self.world_size,
            "nbytes": self.nbytes,
            "writers": [writer.to_json() for writer in self.writers],
        }
        if self.base is not None:
            document["base"] = self.base.to_json()
        if self.shared:
            document["shared"] = [entry.to_json() for entry in self.shared]
        document |= {"metadata": self.metadata, "environment": self.environment}
        data = (json.dumps(document, indent=1, ensure_ascii=True, allow_nan=False) + "\n").encode("ascii")
        _parse(load_json(data), MANIFEST_NAME)  # what no reader takes must not be committed
        return data


def digest_line(manifest: bytes) -> bytes:
    """What `xxh128sum MANIFEST.json` prints, and `xxh128sum -c` checks."""
    return f"{_native.digest_hex(manifest)}  {MANIFEST_NAME}\n".encode("ascii")


def is_checkpoint(path: str) -> bool:
    """Whether a committed checkpoint stands at `path`; says nothing about its bytes."""
    return os.path.isfile(os.path.join(path, MANIFEST_NAME)) and not os.path.basename(path).startswith(".")


def is_file_of_checkpoint(name: str) -> bool:
    """Whether this version writes files of such names into checkpoints."""
    return name in (MANIFEST_NAME, DIGEST_NAME, DCP_MARKER_NAME) or _RANK_FILE.fullmatch(name) is not None


def is_shared_file(component: str) -> bool:
    """Whether this version writes files of such names into BASE_NAME."""
    return _SHARED_FILE.fullmatch(component) is not None


def shared_name(save_id: str, file_name: str) -> str:
    """The name that data file `file_name` of a save has in the checkpoints of later ones, from their directory on."""
    name = f"{BASE_NAME}/{save_id}.{file_name}"
    origin_of_shared(name)
    return name


def shared_of(ranks: Iterable[Iterable[Any]]) -> tuple[FileEntry, ...]:
    """The shared files of a checkpoint, from the file objects that each rank uses; raises as `writer_of` does."""
    entries = {entry.name: entry for files in ranks for entry in map(_shared_file, files)}
    return tuple(entries[name] for name in sorted(entries))


def origin_of_shared(name: str) -> tuple[str, str]:
    """The inverse of `shared_name`: save_id and name of a file where it was written. ValueError for other names."""
    directory, _, component = name.partition("/")
    match = _SHARED_FILE.fullmatch(component)
    if directory != BASE_NAME or match is None:
        raise ValueError(f"{name[:160]!r} is not the name of a shared file")
    return match[1], match[2]


def read(path: str) -> Manifest:
    """The manifest of the checkpoint at `path`. Raises as `read_with_digest` does."""
    return read_with_digest(path)[0]


def read_with_digest(path: str) -> tuple[Manifest, bytes]:
    """Reads and checks the manifest of the checkpoint at `path`; with it what DIGEST_NAME holds there.

    Raises:
        CheckpointNotFoundError: nothing is there.
        IncompleteCheckpointError: a directory without a manifest: not a checkpoint, or a save that never committed.
        CorruptCheckpointError: the manifest is not what was written.
        IncompatibleCheckpointError: a format newer than this version reads.
    """
    manifest_path = os.path.join(path, MANIFEST_NAME)
    if is_unfinished(path):
        raise IncompleteCheckpointError("a save that never committed, or one being removed", path=path)
    data = _read_root_file(path, MANIFEST_NAME, _native.MANIFEST_BYTES_MAX)
    recorded = _read_root_file(path, DIGEST_NAME, _DIGEST_BYTES_MAX)
    expected = digest_line(data)
    if recorded != expected:
        raise CorruptCheckpointError(
            f"{MANIFEST_NAME} and {DIGEST_NAME} do not belong together",
            path=manifest_path,
            expected=recorded[:32].decode("ascii", "replace"),
            actual=expected[:32].decode(),
        )
    try:
        return _parse(load_json(data), manifest_path), recorded
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorruptCheckpointError(f"manifest: {type(error).__name__}: {error}", path=manifest_path) from None


def is_unfinished(path: str) -> bool:
    """Whether `path` has a name that only saves in flight and remains of replaced checkpoints have, and exists."""
    return os.path.basename(os.path.normpath(path)).startswith((".staging-", ".trash-")) and os.path.lexists(path)


def _read_root_file(path: str, name: str, limit_nbytes: int) -> bytes:
    try:
        return _native.read_file(path, name, limit_nbytes)
    except FileNotFoundError:
        if not os.path.lexists(path):
            raise CheckpointNotFoundError(path=path) from None
        raise IncompleteCheckpointError(f"not a checkpoint: it has no {name}", path=path) from None
    except NotADirectoryError:
        if os.path.lexists(path):
            raise IncompleteCheckpointError("not a checkpoint: not a directory", path=path) from None
        raise CheckpointNotFoundError(path=path) from None
    except OSError as error:
        if error.errno in NOT_REGULAR_ERRNOS:
            raise IncompleteCheckpointError(f"not a checkpoint: {name}: {error.strerror}", path=path) from None
        raise


def _parse(document: Any, manifest_path: str) -> Manifest:
    if type(document) is not dict or document.get("format") != "snapstone":
        raise ValueError("not a snapstone manifest")
    version = _version(document["format_version"])
    if version[0] == 0:
        raise ValueError(f"format_version is {version[0]}.{version[1]}; the first was 1.0")
    if version[0] > FORMAT_MAJOR:
        raise IncompatibleCheckpointError(
            f"format {version[0]}.{version[1]} is newer than this version reads ({FORMAT_MAJOR}.x); update snapstone",
            path=manifest_path,
        )
    writers = tuple(writer_of(entry) for entry in _typed(document["writers"], list))
    world_size = _count(document["world_size"])
    if len(writers) != world_size or any(writer.rank != rank for rank, writer in enumerate(writers)):
        raise ValueError(f"writers are not ranks 0 to {world_size - 1}")
    shared = tuple(_shared_file(entry) for entry in _typed(document.get("shared", []), list))
    names = [entry.name for writer in writers for entry in (writer.index, *writer.data)]
    names += [entry.name for entry in shared]
    if len(set(names)) != len(names):
        raise ValueError("two files have the same name")
    base = document.get("base")
    return Manifest(
        save_id=_hex(document["save_id"]),
        step=_step(document["step"]),
        world_size=world_size,
        nbytes=_count(document["nbytes"]),
        writers=writers,
        metadata=_typed(document["metadata"], dict),
        environment=_typed(document["environment"], dict),
        format_version=version,
        base=None if base is None else base_of(base),
        shared=shared,
    )


def _version(text: Any) -> tuple[int, int]:
    match = re.fullmatch(r"(\d{1,6})\.(\d{1,6})", _typed(text, str), re.ASCII)
    if match is None:
        raise ValueError(f"format_version is {text[:80]!r}")
    return int(match[1]), int(match[2])


def writer_of(entry: Any) -> Writer:
    """The inverse of Writer.to_json; raises ValueError, KeyError or TypeError."""
    return Writer(
        _count(entry["rank"]), _file(entry["index"]), tuple(_file(data) for data in _typed(entry["data"], list))
    )


def _file(entry: Any) -> FileEntry:
    return FileEntry(_file_name(entry["name"]), _count(entry["nbytes"]), _hex(entry["xxh128"]))


def _shared_file(entry: Any) -> FileEntry:
    directory, _, component = _typed(entry["name"], str).partition("/")
    if directory != BASE_NAME:
        raise ValueError(f"shared file {entry['name'][:80]!r} is not in {BASE_NAME!r}")
    return FileEntry(f"{BASE_NAME}/{_file_name(component)}", _count(entry["nbytes"]), _hex(entry["xxh128"]))


def base_of(entry: Any) -> Base:
    """The inverse of Base.to_json; raises ValueError, KeyError or TypeError."""
    depth = _count(entry["depth"])
    if depth == 0:
        raise ValueError("depth of a delta save is 0")
    return Base(_hex(entry["save_id"]), _step(entry["step"]), _file_name(entry["name"]), depth)


def _file_name(value: Any) -> str:
    name: str = _typed(value, str)
    if not _native.is_file_name(name):
        raise ValueError(f"file name {name[:80]!r} is not allowed")
    return name


def _step(value: Any) -> int | None:
    return None if value is None else _signed(value)


def _typed(value: Any, kind: type) -> Any:
    if type(value) is not kind:
        raise ValueError(f"{str(value)[:80]!r} is not a {kind.__name__}")
    return value


def _count(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 1 << 63:
        raise ValueError(f"{str(value)[:80]} is not a count")
    return value


def _signed(value: Any) -> int:
    if type(value) is not int or not -(1 << 63) <= value < 1 << 63:
        raise ValueError(f"{str(value)[:80]} is not a 64-bit integer")
    return value


def _hex(value: Any) -> str:
    if type(value) is not str or not _HEX128.match(value):
        raise ValueError(f"{str(value)[:80]!r} is not a 128-bit hex number")
    return value
