"""One writer's index file: read, and checked against the manifest that names it."""

from __future__ import annotations

import os
from collections.abc import Mapping

from . import _native, index, manifest, tensors
from .errors import CorruptCheckpointError, IncompleteCheckpointError
from .index import Index
from .manifest import Manifest

__all__ = ["files_of", "not_regular", "open_index"]

_DTYPE_BYTES: Mapping[str, int] = {name: tensors.dtype_bytes(name) for name in tensors.dtype_names()}


def open_index(directory: str, document: Manifest, writer: manifest.Writer, *, uncached: bool = False) -> Index:
    """The index of one writer, checked; with `uncached` as the device has it, and not the page cache."""
    path = os.path.join(directory, writer.index.name)
    parsed = index.parse(_read_index(directory, writer, path, uncached), path=path, dtype_bytes=_DTYPE_BYTES)
    own = tuple(entry.name for entry in writer.data)
    expected = (document.save_id, writer.rank, document.world_size, own)
    actual = (parsed.save_id, parsed.rank, parsed.world_size, parsed.files[: len(own)])
    if expected != actual:
        raise CorruptCheckpointError(
            "index belongs to another save, rank or file", path=path, rank=writer.rank, expected=expected, actual=actual
        )
    shared = set(parsed.files[len(own) :])
    if len(shared) != len(parsed.files) - len(own) or not shared <= document.shared_by_name.keys():
        raise CorruptCheckpointError(
            "index uses a shared file that the manifest does not name, or names one twice",
            path=path,
            rank=writer.rank,
            actual=next((name[:80] for name in shared if name not in document.shared_by_name), None),
        )
    sizes = [entry.nbytes for entry in files_of(document, writer, parsed)]
    try:
        _native.check_chunk_table(parsed.table, sizes, parsed.chunk_bytes, path, parsed.references)
    except CorruptCheckpointError as error:
        error.rank = writer.rank
        raise
    return parsed


def files_of(document: Manifest, writer: manifest.Writer, parsed: Index) -> list[manifest.FileEntry]:
    """The files that the chunk records of an index count, in their order."""
    shared = parsed.files[len(writer.data) :]
    return [*writer.data, *(document.shared_by_name[name] for name in shared)]


def _read_index(directory: str, writer: manifest.Writer, path: str, uncached: bool) -> bytes:
    try:
        limit_nbytes = min(writer.index.nbytes, index.FILE_BYTES_MAX)
        data: bytes = _native.read_file(directory, writer.index.name, limit_nbytes, uncached)
    except FileNotFoundError:
        raise IncompleteCheckpointError("index file is missing", path=path, rank=writer.rank) from None
    except OSError as error:
        raise not_regular(error, "index file") or error from None
    except CorruptCheckpointError as error:
        error.rank = writer.rank
        raise
    actual = _native.digest_hex(data)
    if len(data) != writer.index.nbytes:
        raise CorruptCheckpointError(
            "index file has the wrong size",
            path=path,
            rank=writer.rank,
            expected=writer.index.nbytes,
            actual=len(data),
        )
    if actual != writer.index.xxh128:
        raise CorruptCheckpointError(
            "index digest mismatch", path=path, rank=writer.rank, expected=writer.index.xxh128, actual=actual
        )
    return data


def not_regular(error: OSError, what: str) -> CorruptCheckpointError | None:
    """What to raise when a link, FIFO, device or directory stands in the place of a file; None for other errors."""
    if error.errno not in manifest.NOT_REGULAR_ERRNOS or error.filename is None:
        return None
    return CorruptCheckpointError(f"{what} cannot be opened: {error.strerror}", path=error.filename)
