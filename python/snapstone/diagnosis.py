"""What damage looks like, and what to do about it.

Some findings are proof, because with them the bytes have the digest that was recorded: a flipped bit, bytes in another
order, the content of another chunk, the difference from a good copy. A run of zeros without a good copy is a guess.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

from . import _native
from .chunks import Chunk, Chunks, Library, digest_of, neighbours
from .errors import CheckpointError, CorruptCheckpointError
from .index import PAGE_BYTES
from .reader import Reader

__all__ = ["Diagnosis", "Pattern", "diagnose", "flipped_bit", "looks_like", "of_file"]

Kind = Literal[
    "flipped bit", "zeros", "other content", "byte order", "swapped pages", "shifted", "truncated", "extended",
    "missing", "padding", "reference", "unknown",
]  # fmt: skip

CHUNKS_MAX = 4  # of each file, that are looked at closely
SEARCH_SECONDS = 2.0  # for a flipped bit, per chunk
_DECODING_SECONDS = 0.2  # the same where each bit needs a chunk to be decoded, which finds it in small ones alone
_SECTOR_BYTES = 512
_SHIFTS = (*range(1, 65), *range(_SECTOR_BYTES, 129 * _SECTOR_BYTES, _SECTOR_BYTES))
_FROM = "restore it with `snapstone verify --repair --from COPY`, or resume from another step"
_ADVICE: dict[str, str] = {
    "flipped bit": "`snapstone verify --repair` flips it back; test the memory, look at the disk's error log",
    "zeros": f"a write that never reached the disk: look at the logs of disk and file system; {_FROM}",
    "other content": f"a write that went to the wrong place, or was lost: look at the disk and its controller; {_FROM}",
    "byte order": f"a program rewrote the file: find out which; {_FROM}",
    "swapped pages": f"writes that went to the wrong place: look at the disk and its controller; {_FROM}",
    "shifted": f"a program rewrote the file, or copied it wrongly: find out which; {_FROM}",
    "truncated": f"a copy that ended early, or a full disk: copy it again; {_FROM}",
    "extended": f"a program wrote to the file: find out which; {_FROM}",
    "missing": f"somebody removed it, or a copy left it out: copy it again; {_FROM}",
    "padding": "no value is wrong; `snapstone verify --repair` puts the zeros back; look at the disk",
    "reference": f"only what it refers to is damaged; {_FROM}",
    "unknown": f"look at the disk's error log, test the memory; {_FROM}",
}


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """What the damage of a chunk or a file looks like. `offset`, `nbytes`: the damaged bytes of the file at `path`, as
    far as they are known. `advice`: what to do about it.
    """

    path: str
    kind: Kind
    detail: str
    offset: int | None = None
    nbytes: int | None = None
    tensor: str | None = None
    chunk: int | None = None
    rank: int | None = None

    @property
    def advice(self) -> str:
        return _ADVICE[self.kind]

    def __str__(self) -> str:
        return f"looks like {self.detail}; {self.advice}"


class Pattern(NamedTuple):
    """`offset` counts from the beginning of the stored bytes."""

    kind: Kind
    detail: str
    offset: int | None = None
    nbytes: int | None = None


def diagnose(
    reader: Reader, errors: Sequence[CorruptCheckpointError], others: Iterable[str] | None = None
) -> tuple[Diagnosis, ...]:
    """Of chunks that `Reader.scrub` found to be wrong: the first few of each file. `others`: checkpoints that may hold
    the same bytes; those beside it unless they are given.
    """
    own = Chunks(reader)
    library = Library([own], neighbours(reader.path) if others is None else others)
    found: list[Diagnosis] = []
    seen: dict[str | None, int] = {}
    for error in errors:
        seen[error.path] = seen.get(error.path, 0) + 1
        if error.chunk is None or error.rank is None or seen[error.path] > CHUNKS_MAX:
            continue
        table = next(number for number, one in enumerate(reader.indexes) if one.rank == error.rank)
        chunk = Chunk(own, table, error.chunk)
        try:
            pattern = _look_at(chunk, library)
        except OSError as failure:
            pattern = Pattern("unknown", f"bytes that cannot be read: {failure.strerror}", 0, chunk.stored_bytes)
        offset = None if pattern.offset is None else chunk.offset + pattern.offset
        where = (error.tensor, error.chunk, error.rank)
        found.append(Diagnosis(chunk.path, pattern.kind, pattern.detail, offset, pattern.nbytes, *where))
    return tuple(found)


def _look_at(chunk: Chunk, library: Library) -> Pattern:
    stored = chunk.stored()
    if len(stored) < chunk.stored_bytes:
        return Pattern("truncated", "a file that ends in this chunk", len(stored), chunk.stored_bytes - len(stored))
    reference = None
    if chunk.reference is not None:
        try:
            reference = chunk.reference.raw()
        except CheckpointError:
            detail = f"damage of what it refers to, {chunk.reference.describe()}"
            return Pattern("reference", detail)
    try:
        raw = chunk.decoded(stored, reference)
    except CheckpointError:
        raw = b""
    if digest_of(raw) == chunk.digest:
        return Pattern("padding", "bytes behind the chunk that are not zero", chunk.stored_bytes)
    good = next(_good_stored(chunk, library), None)
    if good is not None:
        return looks_like(stored, good)
    return _without_copy(chunk, stored, raw, reference, library)


def _good_stored(chunk: Chunk, library: Library) -> Iterator[bytes]:
    """The stored bytes as they were, where another file has them."""
    for other in library.with_digest(chunk.digest, chunk.raw_bytes):
        if (other.codec, other.stored_bytes) != (chunk.codec, chunk.stored_bytes) or other.reference is not None:
            continue
        try:
            stored = other.stored()
            if digest_of(other.decoded(stored)) == chunk.digest:
                yield stored
        except (CheckpointError, OSError):
            continue


def looks_like(bad: bytes, good: bytes) -> Pattern:
    """How `bad` differs from the bytes that it should be."""
    difference = np.bitwise_xor(np.frombuffer(bad, np.uint8), np.frombuffer(good, np.uint8))
    at = np.flatnonzero(difference)
    if len(at) == 1 and int(difference[at[0]]).bit_count() == 1:
        return _flip(8 * int(at[0]) + int(difference[at[0]]).bit_length() - 1)
    first, end = int(at[0]), int(at[-1]) + 1
    if not any(bad[first:end]):
        while first > 0 and bad[first - 1] == 0:
            first -= 1
        while end < len(bad) and bad[end] == 0:
            end += 1
        return _zeros(first, end - first, "")
    for shift in _SHIFTS:
        if shift >= len(bad) - 64:
            break
        if bad[first + shift :] == good[first:-shift] or bad[first : len(bad) - shift] == good[first + shift :]:
            return Pattern("shifted", f"bytes that moved by {shift} from byte {first} of the chunk on", first)
    return Pattern("unknown", f"{len(at)} wrong bytes, the first and the last {end - first} apart", first, end - first)


def _without_copy(chunk: Chunk, stored: bytes, raw: bytes, reference: bytes | None, library: Library) -> Pattern:
    whose = next((other for other in _same_content(raw, chunk, library)), None)
    if whose is not None:
        return Pattern("other content", f"the content of {whose.describe()}", 0, chunk.stored_bytes)
    if not any(stored):
        return _zeros(0, len(stored), "")
    found = _rearranged(chunk, stored, reference)
    if found is not None:
        return found
    bit, complete = flipped_bit(chunk, stored, reference, _DECODING_SECONDS if chunk.codec else SEARCH_SECONDS)
    if bit is not None:
        return _flip(bit)
    begin, nbytes = _longest_zeros(stored)
    if nbytes >= _SECTOR_BYTES and (chunk.codec or nbytes < len(stored)):
        return _zeros(begin, nbytes, "perhaps ")
    more = "more than one wrong bit" if complete else "no single wrong bit that was found in the time given"
    return Pattern("unknown", f"{more}, and no content of another chunk", 0, chunk.stored_bytes)


def _same_content(raw: bytes, chunk: Chunk, library: Library) -> Iterator[Chunk]:
    for other in library.with_digest(digest_of(raw), len(raw)):
        if other.digest != chunk.digest:
            yield other


def _rearranged(chunk: Chunk, stored: bytes, reference: bytes | None) -> Pattern | None:
    """The same bytes in another order, or from another place of the file."""
    for item in (2, 4, 8):
        whole = len(stored) // item * item
        turned = np.frombuffer(stored, np.uint8, whole).reshape(-1, item)[:, ::-1].tobytes() + stored[whole:]
        if _is_right(chunk, turned, reference):
            return Pattern("byte order", f"{item}-byte items with their bytes reversed", 0, len(stored))
    for begin in range(0, len(stored) - 2 * PAGE_BYTES + 1, PAGE_BYTES):
        middle, end = begin + PAGE_BYTES, begin + 2 * PAGE_BYTES
        swapped = stored[:begin] + stored[middle:end] + stored[begin:middle] + stored[end:]
        if _is_right(chunk, swapped, reference):
            return Pattern("swapped pages", "two pages in each other's place", begin, 2 * PAGE_BYTES)
    margin = min(chunk.offset, _SHIFTS[-1])
    with open(chunk.path, "rb") as file:
        file.seek(chunk.offset - margin)
        around = file.read(margin + len(stored) + _SHIFTS[-1])
    for shift in (sign * shift for shift in _SHIFTS for sign in (1, -1)):
        moved = around[margin + shift : margin + shift + len(stored)] if margin + shift >= 0 else b""
        if len(moved) == len(stored) and _is_right(chunk, moved, reference):
            return Pattern("shifted", f"bytes that moved by {abs(shift)} in the file", 0, len(stored))
    return None


def _is_right(chunk: Chunk, stored: bytes, reference: bytes | None) -> bool:
    try:
        return digest_of(chunk.decoded(stored, reference)) == chunk.digest
    except CheckpointError:
        return False


def flipped_bit(
    chunk: Chunk, stored: bytes, reference: bytes | None, seconds: float = SEARCH_SECONDS
) -> tuple[int | None, bool]:
    """8 * byte + bit of the stored bytes, if flipping that one makes them right; and whether all were tried. Compressed
    bytes have to be decoded for each bit, so of these only few are tried.
    """
    if chunk.codec == 0:
        found: tuple[int | None, bool] = _native.find_flipped_bit(stored, chunk.digest, seconds)
        return found
    end = time.monotonic() + seconds
    flipped = bytearray(stored)
    for bit in range(8 * len(stored)):
        if time.monotonic() > end:
            return None, False
        flipped[bit // 8] ^= 1 << bit % 8
        if _is_right(chunk, bytes(flipped), reference):
            return bit, True
        flipped[bit // 8] ^= 1 << bit % 8
    return None, True


def _flip(bit: int) -> Pattern:
    return Pattern("flipped bit", f"a single flipped bit: bit {bit % 8} of byte {bit // 8} of the chunk", bit // 8, 1)


def _zeros(begin: int, nbytes: int, guess: str) -> Pattern:
    whole = "bytes"
    for size, name in ((PAGE_BYTES, "pages"), (_SECTOR_BYTES, "sectors")):
        if begin % size == 0 and nbytes % size == 0:
            whole = f"bytes, whole {name}"
            break
    return Pattern(
        "zeros", f"{guess}a lost write: {nbytes} zero {whole}, from byte {begin} of the chunk", begin, nbytes
    )


def _longest_zeros(data: bytes) -> tuple[int, int]:
    """Where the longest run of zeros begins, and its length."""
    nonzero = np.flatnonzero(np.frombuffer(data, np.uint8))
    edges = np.concatenate([np.array([-1]), nonzero, np.array([len(data)])])
    gaps = np.diff(edges) - 1
    longest = int(np.argmax(gaps))
    return int(edges[longest]) + 1, int(gaps[longest])


def of_file(reader: Reader, entry: Any, rank: int | None) -> Diagnosis:
    """Of a data file that is not there, or has another size than the manifest says."""
    path = os.path.join(reader.path, entry.name)
    try:
        actual = os.lstat(path).st_size
    except OSError:
        return Diagnosis(path, "missing", "a file that was removed or never copied", 0, entry.nbytes, rank=rank)
    if actual > entry.nbytes:
        extra = actual - entry.nbytes
        return Diagnosis(path, "extended", f"{extra} bytes too many", entry.nbytes, extra, rank=rank)
    chunks = [one for one in Chunks(reader).of_file(entry.name) if one.offset + one.stored_bytes > actual]
    lost = f"a file cut off at byte {actual} of {entry.nbytes}; {len(chunks)} chunks are lost"
    if chunks:
        lost += f", from {chunks[0].describe()} on"
    return Diagnosis(path, "truncated", lost, actual, entry.nbytes - actual, rank=rank)
