"""Base: the earlier checkpoint that a delta save is compared with, and what of it each chunk of the new one meets.

Chunks meet when they hold the same bytes of the same shards. Where the writer of the base laid out the same shards in
the same way, every chunk meets the one of its number. Otherwise (another world size, tensors added or gone) chunks meet
where their bytes line up: the same range of the same tensor's row-major string, or of the same box.
"""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from . import _native, manifest, tensors
from .errors import CheckpointError
from .index import CHUNK_DTYPE, StoredTensor
from .index_file import files_of, open_index
from .manifest import Base, FileEntry, Manifest
from .plan import TensorItem
from .structure import Structure

__all__ = [
    "BaseCheckpoint",
    "Before",
    "Comparison",
    "Memory",
    "SharedFile",
    "Stored",
    "choose",
    "compare",
    "link",
    "sharing_stats",
]

NO_RECORD: int = _native.SaveJob.NO_RECORD
_XOR_CODECS = range(5, 9)
_REMEMBERED_MAX = 4
_DEPTH_MAX = (1 << 63) - 1


@dataclass(frozen=True, slots=True)
class BaseCheckpoint:
    path: str
    manifest: Manifest
    digest_line: bytes  # of the manifest's bytes: what its MANIFEST.xxh128 holds

    @classmethod
    def read(cls, path: str) -> BaseCheckpoint:
        """Raises as `manifest.read` does."""
        return cls(path, *manifest.read_with_digest(path))

    @property
    def depth(self) -> int:
        """Delta saves since a full one, the base included."""
        return self.manifest.base.depth if self.manifest.base else 0

    def facts(self) -> Base:
        """What the manifest of a save that is compared with this checkpoint says of it."""
        name = os.path.basename(self.path)
        found = self.manifest
        depth = min(self.depth + 1, _DEPTH_MAX)
        return Base(found.save_id, found.step, name if _native.is_file_name(name) else found.save_id, depth)


def choose(wanted: str | None, run: str, full_every: int | None) -> BaseCheckpoint | None:
    """The base of a save into the directory `run`; None for a full save.

    Raises:
        CheckpointError: the checkpoint that was asked for by its path cannot be read.
    """
    if wanted is None:
        return None
    base = _newest(run) if wanted == "auto" else BaseCheckpoint.read(wanted)
    if base is None or (full_every is not None and base.depth + 1 >= full_every):
        return None
    return base


def _newest(run: str) -> BaseCheckpoint | None:
    """The checkpoint that was committed last, of those whose manifest is intact."""
    found = []
    try:
        paths = [entry.path for entry in os.scandir(run) if manifest.is_checkpoint(entry.path)]
    except FileNotFoundError:
        return None
    for path in paths:
        try:
            found.append((os.stat(os.path.join(path, manifest.MANIFEST_NAME)).st_mtime_ns, path))
        except OSError:
            continue  # being removed
    for _, path in sorted(found, reverse=True):
        try:
            return BaseCheckpoint.read(path)
        except (CheckpointError, OSError) as error:
            warnings.warn(f"no base for a delta save: {error}", RuntimeWarning, stacklevel=2)
    return None


@dataclass(frozen=True, slots=True)
class SharedFile:
    """A data file of the base as the new checkpoint has it."""

    entry: FileEntry
    in_base: bool  # the base has it as a shared file, too
    source: str  # its name there

    def link(self) -> tuple[bool, str, str, int]:
        """As `Staging.link_shared` takes it."""
        return (self.in_base, self.source, os.path.basename(self.entry.name), self.entry.nbytes)


class Before(NamedTuple):
    """An earlier save's chunks beside those of a new one: whether there is one to compare with (bool), and its digest
    (16 bytes), by chunk of the new layout.
    """

    step: int | None
    known: Any
    digests: Any


@dataclass(frozen=True, slots=True)
class Stored:
    """What one writer of a checkpoint stored: the files that its records count, and the records. `index_xxh128` is the
    digest of the index that says so.
    """

    index_xxh128: str
    files: Sequence[FileEntry]
    table: bytes
    references: int
    contents: Sequence[StoredTensor]
    step: int | None

    @property
    def shared(self) -> list[FileEntry]:
        return [entry for entry in self.files if os.path.dirname(entry.name)]

    def before(self) -> Before:
        """For a save of the same contents."""
        table = np.frombuffer(self.table, CHUNK_DTYPE)
        digests = table["digest"][: len(table) - self.references]
        return Before(self.step, np.ones(len(digests), bool), digests)


@dataclass(frozen=True, slots=True)
class Comparison:
    """What a rank compares its chunks with. In `records` (CHUNK_DTYPE) file 0 is the data file that is being written,
    1 + i is `files[i]`. `references` and `record_of_chunk` are uint32: of each record the one that its codec refers to,
    of each chunk of the layout its record; NO_RECORD for none.
    """

    files: list[SharedFile]
    records: Any
    references: Any
    record_of_chunk: Any
    step: int | None  # of the base

    def arguments(self) -> tuple[bytes, Any, Any]:
        """As `SaveJob` takes them."""
        return self.records.tobytes(), self.references, self.record_of_chunk

    def before(self) -> Before:
        known = self.record_of_chunk != NO_RECORD
        digests = np.zeros(len(known), "V16")
        digests[known] = self.records["digest"][self.record_of_chunk[known]]
        return Before(self.step, known, digests)


@dataclass(slots=True)
class Memory:
    """What ranks of this process stored in their last few saves, so that the next one need not read it back."""

    _entries: dict[tuple[int, str], Stored] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def put(self, rank: int, save_id: str, stored: Stored) -> None:
        with self._lock:
            self._entries[rank, save_id] = stored
            while len(self._entries) > _REMEMBERED_MAX:
                del self._entries[next(iter(self._entries))]

    def find(self, rank: int, document: Manifest) -> Stored | None:
        """If the rank wrote the index that the manifest names."""
        with self._lock:
            found = self._entries.get((rank, document.save_id))
        known = rank < document.world_size and document.writers[rank].index.xxh128
        return found if found is not None and found.index_xxh128 == known else None

    def last(self, rank: int, contents: Sequence[StoredTensor]) -> Stored | None:
        """The last save of exactly these shards in exactly these places."""
        with self._lock:
            of_rank = [stored for (other, _), stored in reversed(self._entries.items()) if other == rank]
        return next((stored for stored in of_rank if stored.contents == contents), None)


def link(
    path: str, save_id: str, structure: Structure, staging: Any, rank: int, memory: Memory, stats: dict[str, Any]
) -> Comparison | None:
    """What a rank compares with, all of whose files are linked into the staging directory. None, with a warning, when
    the base cannot be used after all: the rank saves its share in full then, since a checkpoint is worth more than its
    size.
    """
    try:
        base = BaseCheckpoint.read(path)
        if base.manifest.save_id != save_id:
            raise CheckpointError("another checkpoint has taken its place", path=path)
        comparison = compare(base, structure, rank, memory)
        if not comparison.files:
            return None
        staging.link_shared(path, base.digest_line, [shared.link() for shared in comparison.files])
    except (CheckpointError, OSError) as error:
        stats["base_unused"] = f"{type(error).__name__}: {error}"
        warnings.warn(f"rank {rank} saves in full, without the base {path}: {error}", RuntimeWarning, stacklevel=2)
        return None
    return comparison


def compare(base: BaseCheckpoint, structure: Structure, rank: int, memory: Memory) -> Comparison:
    """Raises CheckpointError or OSError if indexes of the base cannot be read."""
    mine = memory.find(rank, base.manifest)
    if mine is None and rank < base.manifest.world_size:
        mine = _read(base, rank)
    chunk_count = structure.layout.chunk_count
    if mine is not None and mine.contents == structure.contents:
        return _comparison(base, [mine], np.arange(chunk_count, dtype=np.uint32))
    every = [mine if mine and other == rank else _read(base, other) for other in range(base.manifest.world_size)]
    met: dict[Any, int] = {}
    first_record = 0
    for stored in every:
        raw_bytes = np.frombuffer(stored.table, CHUNK_DTYPE)["raw_bytes"].tolist()
        for chunk, content in _contents(stored.contents, raw_bytes):
            met.setdefault(content, first_record + chunk)
        first_record += len(raw_bytes)
    record_of_chunk = np.full(chunk_count, NO_RECORD, np.uint32)
    for chunk, content in _contents(structure.contents, [structure.layout.chunk_bytes] * chunk_count):
        record_of_chunk[chunk] = met.get(content, NO_RECORD)
    return _comparison(base, every, record_of_chunk)


def _read(base: BaseCheckpoint, rank: int) -> Stored:
    writer = base.manifest.writers[rank]
    parsed = open_index(base.path, base.manifest, writer)
    contents = [stored for stored in parsed.tensors if stored.place.chunk_count]
    files = files_of(base.manifest, writer, parsed)
    return Stored(writer.index.xxh128, files, parsed.table, parsed.references, contents, base.manifest.step)


def _comparison(base: BaseCheckpoint, every: Sequence[Stored], record_of_chunk: Any) -> Comparison:
    """Of the base's files those that chunks may need. CheckpointError if two of them cannot be told apart by name."""
    tables = []
    numbers: dict[str, int] = {}
    files: list[SharedFile] = []
    references = np.full(sum(len(one.table) for one in every) // CHUNK_DTYPE.itemsize, NO_RECORD, np.uint32)
    first_record = 0
    for stored in every:
        table = np.frombuffer(stored.table, CHUNK_DTYPE).copy()
        renumbered = np.zeros(max(len(stored.files), 1), np.uint32)
        for number, entry in enumerate(stored.files):
            shared = _shared_file(base, entry)
            if shared.entry.name not in numbers:
                files.append(shared)
                numbers[shared.entry.name] = len(files)
            renumbered[number] = numbers[shared.entry.name]
            if files[renumbered[number] - 1] != shared:
                raise CheckpointError(f"two files would be {shared.entry.name}", path=base.path)
        table["file"] = renumbered[table["file"]]
        tables.append(table)
        referring = first_record + np.flatnonzero(np.isin(table["codec"], _XOR_CODECS))
        end = first_record + len(table)
        references[referring] = np.arange(end - stored.references, end)
        first_record = end
    records = np.concatenate(tables) if tables else np.empty(0, CHUNK_DTYPE)
    needed = set()
    rows = record_of_chunk[record_of_chunk != NO_RECORD]
    while len(rows):
        needed |= set(np.unique(records["file"][rows]).tolist())
        rows = references[rows]
        rows = rows[rows != NO_RECORD]
    kept = sorted(needed)
    renumbered = np.zeros(len(files) + 1, np.uint32)
    renumbered[kept] = np.arange(1, len(kept) + 1)
    records["file"] = renumbered[records["file"]]
    return Comparison([files[number - 1] for number in kept], records, references, record_of_chunk, base.manifest.step)


def _shared_file(base: BaseCheckpoint, entry: FileEntry) -> SharedFile:
    """CheckpointError for a name that this version's writer gives no file: it would not know its own checkpoint."""
    directory, name = os.path.split(entry.name)
    try:
        if directory:
            manifest.origin_of_shared(entry.name)
            return SharedFile(entry, True, name)
        shared = FileEntry(manifest.shared_name(base.manifest.save_id, name), entry.nbytes, entry.xxh128)
    except ValueError as error:
        raise CheckpointError(str(error), path=base.path) from None
    return SharedFile(shared, False, name)


def _contents(stored: Iterable[StoredTensor], raw_bytes: Sequence[int]) -> Iterator[tuple[int, Any]]:
    """(chunk, what is in it): equal for chunks of equal ranges of equal shards at equal places."""
    pieces: dict[int, list[Any]] = {}
    seen = set()
    for item, _, place, *_ in stored:
        if place in seen:  # tied to one before it
            continue
        seen.add(place)
        shard, origin = _string_of(item)
        begin, at = 0, place.at
        for chunk in range(place.first_chunk, place.first_chunk + place.chunk_count):
            nbytes = min(raw_bytes[chunk] - at, item.nbytes - begin)
            pieces.setdefault(chunk, []).append((at, shard, origin + begin, nbytes))
            begin, at = begin + nbytes, 0
    for chunk, found in pieces.items():
        yield chunk, tuple(found)


def _string_of(item: TensorItem) -> tuple[Any, int]:
    """Which string a shard's bytes are part of, and where they begin in it: the tensor's own if they are one run of it,
    else the box's.
    """
    box = list(zip(item.offsets, item.sizes, item.shape, strict=True))
    while box and box[0][1] == 1:
        box.pop(0)
    if all(size == extent for _, size, extent in box[1:]):
        origin = 0
        for offset, extent in zip(item.offsets, item.shape, strict=True):
            origin = origin * extent + offset
        return (item.name, item.dtype, item.shape), origin * tensors.dtype_bytes(item.dtype)
    return (item.name, item.dtype, item.shape, item.offsets, item.sizes), 0


def sharing_stats(document: Manifest, used_bytes: Mapping[str, int]) -> dict[str, Any]:
    """Of the checkpoint that a save with a base became: bytes of its own files, bytes that it uses of shared ones, how
    much of those that is, and how much larger the directory is than what it needs.
    """
    own = sum(entry.nbytes for writer in document.writers for entry in writer.data)
    linked = sum(entry.nbytes for entry in document.shared)
    used = sum(used_bytes[entry.name] for entry in document.shared)
    return {
        "depth": document.base.depth if document.base else 0,
        "own_bytes": own,
        "shared_bytes": used,
        "live_fraction": used / linked if linked else 1.0,
        "amplification": (own + linked) / (own + used) if own + used else 1.0,
    }
