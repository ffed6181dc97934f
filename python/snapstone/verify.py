"""`verify`: is every byte of a checkpoint what was saved?"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from . import _native, index, manifest
from .diagnosis import Diagnosis, diagnose, of_file
from .errors import CheckpointError, CheckpointNotFoundError, CorruptCheckpointError
from .progress import Progress
from .reader import Reader
from .tensors import LocalShard

__all__ = ["VerifyReport", "verify"]


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """Truthy when nothing is wrong. `problems` name file, tensor, chunk and rank; `checked_bytes` were read and
    compared. `diagnoses` say what damaged chunks and files look like, and what to do about it.
    """

    level: str
    checked_bytes: int
    problems: tuple[str, ...]
    diagnoses: tuple[Diagnosis, ...] = ()

    def __bool__(self) -> bool:
        return not self.problems


def verify(
    path: str | os.PathLike[str],
    *,
    level: Literal["quick", "full"] = "full",
    progress: bool | Callable[[int, int], None] = False,
    diagnosis: bool = True,
) -> VerifyReport:
    """Checks the checkpoint at `path` and reports everything that is wrong.

    Args:
        level: "quick" checks manifest, indexes, and the presence and size of every file; "full" also reads every
            byte of every data file and compares digests and padding, and rebuilds what is derived from other tensors.
        progress: True for a bar on a terminal, or a callback (bytes_done, bytes_total) of the data files.
        diagnosis: of the first four damaged chunks of each file, find out what the damage looks like; this also reads
            the checkpoints beside this one, and takes two seconds per chunk at most to look for a flipped bit.

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
    diagnoses: list[Diagnosis] = []
    problems = [*_strays(reader), *_table_problems(reader), *_file_problems(reader, diagnoses)]
    if not problems and level == "full":
        try:
            job = reader.start_scrub()
        except CheckpointError as error:
            return VerifyReport(level, checked, (_line(error),))
        with Progress(progress, "verify", job.bytes_read) as bar:
            errors = reader.scrub(job, progress=bar)
        problems += map(_line, errors)
        if errors and diagnosis:
            diagnoses += diagnose(reader, errors)
        if not problems:
            problems += _derived_problems(reader)
        checked += job.bytes_read
    return VerifyReport(level, checked, tuple(problems), tuple(diagnoses) if diagnosis else ())


def _line(error: CheckpointError) -> str:
    return f"{type(error).__name__}: {error}"


def _strays(reader: Reader) -> list[str]:
    """A checkpoint is immutable: a file that its manifest does not name was put there by somebody else."""
    known = {entry.name for writer in reader.manifest.writers for entry in (writer.index, *writer.data)}
    known |= {manifest.MANIFEST_NAME, manifest.DIGEST_NAME, manifest.DCP_MARKER_NAME}
    names = set(os.listdir(reader.path))
    base = os.path.join(reader.path, manifest.BASE_NAME)
    if reader.manifest.shared and manifest.BASE_NAME in names:
        known.add(manifest.BASE_NAME)
        if os.path.islink(base) or not os.path.isdir(base):
            return [f"{base}: not a directory"]
        known |= reader.manifest.shared_by_name.keys()
        names |= {f"{manifest.BASE_NAME}/{name}" for name in os.listdir(base)}
    return [f"{os.path.join(reader.path, name)}: not part of the checkpoint" for name in sorted(names - known)]


def _table_problems(reader: Reader) -> list[str]:
    """The manifest's digest of each own data file's chunk rows, and rows that leave bytes of the file uncovered. Of a
    shared file this checkpoint has only the rows that it uses.
    """
    problems = []
    for writer, one in zip(reader.manifest.writers, reader.indexes, strict=True):
        table = np.frombuffer(one.table, dtype=index.CHUNK_DTYPE)
        for number, entry in enumerate(writer.data):
            rows = table[table["file"] == number]
            path = os.path.join(reader.path, entry.name)
            if _native.digest_hex(rows.tobytes()) != entry.xxh128:
                problems.append(f"{path}: the manifest's digest of its chunk table does not match (rank {writer.rank})")
            if not _covers(rows, entry.nbytes):
                problems.append(f"{path}: chunks do not cover the file exactly (rank {writer.rank})")
    return problems


def _covers(rows: Any, nbytes: int) -> bool:
    """Whether chunks stand end to end from the first byte of a file to its last. Equal rows are one chunk."""
    chunks = np.unique(rows.view(f"V{rows.dtype.itemsize}")).view(rows.dtype)
    chunks = chunks[np.argsort(chunks["offset"])]
    ends = np.cumsum(index.padded(chunks["stored_bytes"]))
    begins = np.concatenate([np.zeros(1, np.uint64), ends])
    return bool((begins == np.append(chunks["offset"], np.uint64(nbytes))).all())


def _file_problems(reader: Reader, diagnoses: list[Diagnosis]) -> list[str]:
    ranks: dict[str, int] = {}
    for parsed in reversed(reader.indexes):
        ranks |= dict.fromkeys(parsed.files, parsed.rank)
    own = (entry for writer in reader.manifest.writers for entry in writer.data)
    problems = []
    for entry in (*own, *reader.manifest.shared):
        path = os.path.join(reader.path, entry.name)
        whose = f" (rank {ranks[entry.name]})" if entry.name in ranks else ""
        try:
            facts = os.lstat(path)
        except (FileNotFoundError, NotADirectoryError):
            problems.append(f"{path}: data file is missing{whose}")
            diagnoses.append(of_file(reader, entry, ranks.get(entry.name)))
            continue
        if facts.st_size != entry.nbytes or not stat.S_ISREG(facts.st_mode):
            problems.append(
                f"{path}: {facts.st_size} bytes or not a regular file, expected {entry.nbytes} bytes{whose}"
            )
            if facts.st_size != entry.nbytes:
                diagnoses.append(of_file(reader, entry, ranks.get(entry.name)))
    return problems


def _derived_problems(reader: Reader) -> list[str]:
    """Of shards that are derived: whether their masters still give the bytes that were saved."""
    problems = []
    for writer, parsed in zip(reader.manifest.writers, reader.indexes, strict=True):
        for item, _, _, master, expected in parsed.tensors:
            if master is None:
                continue
            try:
                rebuilt = LocalShard(item, reader.empty(item))
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
