"""`verify` says what damage looks like.

Every kind of damage is really done to the files; the diagnosis must name it, with the bytes that are damaged.
"""

from __future__ import annotations

import errno
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import snapstone as ss
from durability import small
from durability.chain import CHUNK_BYTES, chunk_at, make_chain
from snapstone.chunks import Chunks, read_range
from snapstone.diagnosis import Diagnosis
from snapstone.reader import Reader

SEED = 4108
PAGE = 4096
pytestmark = pytest.mark.usefixtures("small_chunks")
LARGE = 3  # chunks of the large tensor


@pytest.fixture
def path(directory: Path) -> Path:
    """A checkpoint of three large chunks, bytes 0 to 3 * CHUNK_BYTES of its file, alone in its directory."""
    generator = torch.Generator().manual_seed(SEED)
    state = {"large": torch.randn(LARGE * CHUNK_BYTES // 4, generator=generator), "small": torch.arange(5.0)}
    ss.save(state, checkpoint_id=directory / "run" / "c")
    return directory / "run" / "c"


def rewrite(path: Path, change: Callable[[bytearray], object]) -> bytes:
    """Changes the data file; returns what it was."""
    file = path / "rank-00000.data"
    before = file.read_bytes()
    data = bytearray(before)
    change(data)
    file.write_bytes(data)
    return before


def only(path: Path) -> Diagnosis:
    report = ss.verify(path)
    assert not report
    (found,) = report.diagnoses
    assert str(found) == f"looks like {found.detail}; {found.advice}"
    assert found.path == str(path / "rank-00000.data")
    return found


def test_a_flipped_bit_is_found_wherever_it_is(path: Path) -> None:
    chosen = random.Random(SEED)
    size = LARGE * CHUNK_BYTES
    for bit in [0, 8 * size - 1, *(chosen.randrange(8 * size) for _ in range(4))]:

        def flip(data: bytearray, bit: int = bit) -> None:
            data[bit // 8] ^= 1 << bit % 8

        before = rewrite(path, flip)
        found = only(path)
        assert (found.kind, found.offset, found.nbytes) == ("flipped bit", bit // 8, 1)
        assert found.detail.endswith(f"bit {bit % 8} of byte {bit // 8 % CHUNK_BYTES} of the chunk")
        assert (found.tensor, found.rank) == ("large", 0)
        rewrite(path, flip)
        assert (path / "rank-00000.data").read_bytes() == before
        assert ss.verify(path).diagnoses == ()


def zero(begin: int, end: int) -> Callable[[bytearray], None]:
    def change(data: bytearray) -> None:
        data[begin:end] = bytes(end - begin)

    return change


def copy_chunk(source: int, target: int) -> Callable[[bytearray], None]:
    def change(data: bytearray) -> None:
        data[target * CHUNK_BYTES : (target + 1) * CHUNK_BYTES] = data[
            source * CHUNK_BYTES : (source + 1) * CHUNK_BYTES
        ]

    return change


def turn_items(data: bytearray) -> None:
    for at in range(0, CHUNK_BYTES, 4):
        data[at : at + 4] = data[at : at + 4][::-1]


def swap_pages(data: bytearray) -> None:
    data[PAGE : 3 * PAGE] = data[2 * PAGE : 3 * PAGE] + data[PAGE : 2 * PAGE]


def shift_all(data: bytearray) -> None:
    """Five bytes too many at the beginning, and as many lost behind the second chunk."""
    data[: 2 * CHUNK_BYTES] = b"\1\2\3\4\5" + data[: 2 * CHUNK_BYTES - 5]


def scribble(data: bytearray) -> None:
    data[100] ^= 0xFF
    data[200] ^= 0xFF


@pytest.mark.parametrize(
    ("change", "kind", "offset", "nbytes"),
    [
        (zero(0, CHUNK_BYTES), "zeros", 0, CHUNK_BYTES),
        (zero(CHUNK_BYTES + 2 * PAGE, CHUNK_BYTES + 5 * PAGE), "zeros", CHUNK_BYTES + 2 * PAGE, 3 * PAGE),
        (zero(512, 1024), "zeros", 512, 512),
        (copy_chunk(2, 0), "other content", 0, CHUNK_BYTES),
        (turn_items, "byte order", 0, CHUNK_BYTES),
        (swap_pages, "swapped pages", PAGE, 2 * PAGE),
        (scribble, "unknown", 0, CHUNK_BYTES),
    ],
    ids=["chunk of zeros", "pages of zeros", "sector of zeros", "other chunk", "byte order", "pages", "scribble"],
)
def test_what_damage_looks_like(
    path: Path, change: Callable[[bytearray], None], kind: str, offset: int, nbytes: int
) -> None:
    rewrite(path, change)
    found = only(path)
    assert (found.kind, found.offset, found.nbytes) == (kind, offset, nbytes), found
    if kind == "other content":
        assert "chunk 2 of" in found.detail
    if kind == "zeros":
        assert ("sectors" if nbytes == 512 else "pages") in found.detail


def test_bytes_that_moved_in_the_file(path: Path) -> None:
    rewrite(path, shift_all)
    first, *_ = ss.verify(path).diagnoses
    assert first.kind == "shifted"
    assert "moved by 5" in first.detail


def test_padding_alone(path: Path) -> None:
    def change(data: bytearray) -> None:
        data[-1] = 1

    rewrite(path, change)
    assert only(path).kind == "padding"


def test_content_of_another_step(path: Path) -> None:
    """A write that was lost leaves what stood there before."""
    other = path.with_name("d")
    ss.save({"large": torch.zeros(LARGE * CHUNK_BYTES // 4) + 7, "small": torch.arange(5.0)}, checkpoint_id=other)
    stale = (other / "rank-00000.data").read_bytes()[:CHUNK_BYTES]

    def change(data: bytearray) -> None:
        data[:CHUNK_BYTES] = stale

    rewrite(path, change)
    found = only(path)
    assert found.kind == "other content"
    assert str(other) in found.detail


def test_a_good_copy_makes_it_exact(path: Path) -> None:
    shutil.copytree(path, path.with_name("copy"))
    rewrite(path, scribble)
    found = only(path)
    assert (found.kind, found.offset, found.nbytes) == ("unknown", 100, 101)
    assert "2 wrong bytes" in found.detail


@pytest.mark.parametrize("nbytes", [0, 5000, CHUNK_BYTES + 1])
def test_a_file_that_was_cut_off(path: Path, nbytes: int) -> None:
    full = (path / "rank-00000.data").stat().st_size
    os.truncate(path / "rank-00000.data", nbytes)
    found = only(path)
    assert (found.kind, found.offset, found.nbytes) == ("truncated", nbytes, full - nbytes)
    assert f"from chunk {nbytes // CHUNK_BYTES} of" in found.detail


def test_a_file_that_is_too_long_or_gone(path: Path) -> None:
    file = path / "rank-00000.data"
    full = file.stat().st_size
    with file.open("ab") as target:
        target.write(b"more")
    found = only(path)
    assert (found.kind, found.offset, found.nbytes) == ("extended", full, 4)
    file.unlink()
    assert only(path).kind == "missing"


def test_a_difference_whose_reference_is_damaged(directory: Path) -> None:
    paths = make_chain(directory / "run", length=2, codec="xor-zstd")
    record, file = chunk_at(paths[1], xor=True)
    data = bytearray(file.read_bytes())
    data[record + 40] ^= 4
    file.write_bytes(data)
    kinds = {one.kind for one in ss.verify(paths[1]).diagnoses}
    assert "reference" in kinds


def test_only_the_first_chunks_of_a_file_are_looked_at(path: Path) -> None:
    rewrite(path, zero(0, LARGE * CHUNK_BYTES))
    report = ss.verify(path)
    assert len(report.diagnoses) == LARGE <= 4
    assert ss.verify(path, diagnosis=False).diagnoses == ()
    small.assert_slots_free()


def test_a_file_that_cannot_be_opened_is_not_taken_for_one_that_is_missing(directory: Path) -> None:
    file = directory / "file"
    file.write_bytes(b"abcdef")
    assert [read_range(str(file), 2, nbytes) for nbytes in (3, 9)] == [b"cde", b"cdef"]
    assert [read_range(str(directory / name), 0, 1) for name in (".", "absent")] == [b"", b""]
    with pytest.raises(OSError, match="name too long") as caught:
        read_range(str(directory / ("n" * 300)), 0, 1)
    assert caught.value.errno == errno.ENAMETOOLONG


@pytest.mark.parametrize("codec", [None, "zstd"])
def test_a_chunk_in_which_the_file_ends_says_so(directory: Path, codec: str | None) -> None:
    path = directory / "c"
    ss.save({"t": torch.arange(10_000)}, checkpoint_id=path, codec=codec)
    (chunk, *_) = Chunks(Reader(str(path))).of_file("rank-00000.data")
    assert chunk.raw()
    os.truncate(path / "rank-00000.data", chunk.offset + chunk.stored_bytes - 1)
    with pytest.raises(ss.CorruptCheckpointError, match="the file ends in this chunk"):
        chunk.raw()
