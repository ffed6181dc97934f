"""`verify`: is every byte of a checkpoint what was saved?"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from . import _native, index, manifest, tensors
from .errors import CheckpointError, CheckpointNotFoundError, CorruptCheckpointError
from .progress import Progress
from .reader import Reader
from .tensors import LocalShard

__all__ = ["VerifyReport", "verify"]


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """Truthy when nothing is wrong. `problems` name file, tensor, chunk and rank; `checked_bytes` were read and
    compared.
    """

    level: str
    checked_bytes: int
    problems: tuple[str, ...]

    def __bool__(self) -> bool:
        return not self.problems


def verify(
    path: str | os.PathLike[str],
    *,
    level: Literal["quick", "full"] = "full",
    progress: bool | Callable[[int, int], None] = False,
) -> VerifyReport:
    """Checks the checkpoint at `path` and reports everything that is wrong.

    Args:
        level: "quick" checks manifest, indexes, and the presence and size of every file; "full" also reads every
            byte of every data file and compares digests and padding, and rebuilds what is derived from other tensors.
        progress: True for a bar on a terminal, or a callback (bytes_done, bytes_total) of the data files.

    Raises:
        CheckpointNotFoundError: nothing is there. OSError: it cannot be read.
    """
    if level not in ("quick", "full"):
        raise ValueError(f"level={level!r}: use 'quick' or 'full'")
    try:
        reader = Reader(path)
    except CheckpointNotFoundError:
        raise
    except CheckpointError as error:
        return VerifyReport(level, 0, (_line(error),))
    checked = sum(writer.index.nbytes for writer in reader.manifest.writers)
    problems = [*_strays(reader), *_table_problems(reader), *_file_problems(reader)]
    if not problems and level == "full":
        with Progress(progress, "verify", reader.stored_bytes) as bar:
            problems += [_line(error) for error in reader.scrub(progress=bar)]
        if not problems:
            problems += _derived_problems(reader)
        checked += reader.stored_bytes
    return VerifyReport(level, checked, tuple(problems))


def _line(error: CheckpointError) -> str:
    return f"{type(error).__name__}: {error}"


def _strays(reader: Reader) -> list[str]:
    """A checkpoint is immutable: a file that its manifest does not name was put there by somebody else."""
    known = {entry.name for writer in reader.manifest.writers for entry in (writer.index, *writer.data)}
    known |= {manifest.MANIFEST_NAME, manifest.DIGEST_NAME, manifest.DCP_MARKER_NAME}
    return [
        f"{os.path.join(reader.path, name)}: not part of the checkpoint"
        for name in sorted(set(os.listdir(reader.path)) - known)
    ]


def _table_problems(reader: Reader) -> list[str]:
    """The manifest's digest of each data file's chunk rows, and rows that leave bytes of the file uncovered."""
    problems = []
    for writer, one in zip(reader.manifest.writers, reader.indexes, strict=True):
        table = np.frombuffer(one.table, dtype=index.CHUNK_DTYPE)
        for number, entry in enumerate(writer.data):
            rows = table[table["file"] == number]
            path = os.path.join(reader.path, entry.name)
            if _native.digest_hex(rows.tobytes()) != entry.xxh128:
                problems.append(f"{path}: the manifest's digest of its chunk table does not match (rank {writer.rank})")
            padded = (rows["stored_bytes"].astype(np.uint64) + 4095) // 4096 * 4096
            if int(padded.sum()) != entry.nbytes or len(np.unique(rows["offset"])) != len(rows):
                problems.append(f"{path}: chunks do not cover the file exactly (rank {writer.rank})")
    return problems


def _file_problems(reader: Reader) -> list[str]:
    problems = []
    for writer in reader.manifest.writers:
        for entry in writer.data:
            path = os.path.join(reader.path, entry.name)
            try:
                nbytes = os.lstat(path).st_size
            except FileNotFoundError:
                problems.append(f"{path}: data file is missing (rank {writer.rank})")
                continue
            if nbytes != entry.nbytes or not os.path.isfile(path) or os.path.islink(path):
                problems.append(
                    f"{path}: {nbytes} bytes or not a regular file, expected {entry.nbytes} bytes (rank {writer.rank})"
                )
    return problems


def _derived_problems(reader: Reader) -> list[str]:
    """Of shards that are derived: whether their masters still give the bytes that were saved."""
    problems = []
    for writer, parsed in zip(reader.manifest.writers, reader.indexes, strict=True):
        for item, _, _, master, expected in parsed.tensors:
            if master is None:
                continue
            rebuilt = LocalShard(item, torch.empty(item.sizes, dtype=tensors.dtype_named(item.dtype)))
            try:
                reader.fill([rebuilt])
                actual = _native.digest_memory(rebuilt.tensor.data_ptr(), item.nbytes)
                if actual != expected:
                    raise CorruptCheckpointError(
                        f"derived from {master!r}, which gives other bytes",
                        path=os.path.join(reader.path, writer.index.name),
                        tensor=item.name,
                        rank=writer.rank,
                        expected=expected,
                        actual=actual,
                    )
            except CheckpointError as error:
                problems.append(_line(error))
    return problems
