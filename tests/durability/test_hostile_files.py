"""A checkpoint whose files are not what was saved: flipped, cut, grown, swapped, missing, replaced, or none at all.

Invariants:
  1. `ss.load` returns the saved bytes or raises a CheckpointError; it never returns other bytes.
  2. `ss.verify` is falsy for every change of any byte of any file, and its problem names the file; for a byte of a
     chunk, also tensor, chunk and rank. The one exception are bits of a zstd frame that mean nothing (RFC 8878 leaves
     some unused): with them changed the reference reader, too, decodes the very same bytes.
  3. Nothing hangs: FIFOs, directories, devices and links in the place of files are refused at once.
  4. What is not a checkpoint is refused by type: nothing there (also a FileNotFoundError), not committed, too new.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import socket
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import xxhash

import snapstone as ss
from durability import hostile, small
from durability.forge import DIGEST, MANIFEST, Forge, write_manifest
from format import reference_reader
from snapstone.index import CHUNK_DTYPE

SEED = 5171
CHUNK_BYTES = 64 << 10


@pytest.fixture(autouse=True)
def seeded(monkeypatch: pytest.MonkeyPatch) -> None:
    print(f"seed {SEED}")
    monkeypatch.setenv("SNAPSTONE_CHUNK_BYTES", str(CHUNK_BYTES))


@pytest.fixture(params=[None, "zstd"], ids=["raw", "zstd"])
def saved(request: pytest.FixtureRequest, directory: Path) -> Path:
    path = directory / "step-1"
    ss.save(small.state(1), checkpoint_id=path, codec=request.param)
    return path


def assert_load_is_right_or_refused(path: Path, seed: int = 1) -> ss.CheckpointError | None:
    def load() -> None:
        assert small.load(path) == small.bits(small.state(seed)), "wrong bytes"

    return hostile.in_time(load, "load")


def problem(path: Path) -> str:
    """The first thing that verify finds wrong."""
    hostile.in_time(lambda: ss.verify(path, diagnosis=False), "verify")
    report = ss.verify(path)
    assert not report, "verify found nothing wrong"
    return report.problems[0]


def flipped(file: Path, offsets: Iterator[int] | list[int], bit: Callable[[], int]) -> Iterator[int]:
    """Yields each offset while one bit of that byte is wrong; puts everything back afterwards."""
    data = file.read_bytes()
    with open(file, "r+b", buffering=0) as opened:
        for at in offsets:
            os.pwrite(opened.fileno(), bytes([data[at] ^ 1 << bit()]), at)
            yield at
            os.pwrite(opened.fileno(), data[at : at + 1], at)


def test_any_flipped_byte_of_manifest_digest_or_index_is_found(saved: Path) -> None:
    bit = random.Random(SEED).randrange
    for name in (MANIFEST, DIGEST, "rank-00000.index"):
        nbytes = (saved / name).stat().st_size
        for at in flipped(saved / name, list(range(nbytes)), lambda: bit(8)):
            assert assert_load_is_right_or_refused(saved) is not None, (name, at)
            found = problem(saved)
            assert ("MANIFEST" if name != "rank-00000.index" else name) in found, (at, found)
    small.assert_holds(saved, 1)


def test_any_flipped_byte_of_data_is_found_and_named(saved: Path) -> None:
    """Every byte of the raw packed chunk and of its padding, the ends and a sample of the others."""
    chosen = random.Random(SEED)
    forge = Forge(saved)
    rows = [row for row in forge.header["tensors"] if row["chunks"][1]]
    for number, record in enumerate(forge.table):
        names = {row["name"] for row in rows if row["chunks"][0] <= number < sum(row["chunks"])}
        begin, stored = int(record["offset"]), int(record["stored_bytes"])
        end = begin + -(-stored // 4096) * 4096
        offsets = {begin, begin + stored - 1, *chosen.sample(range(begin, end), 40)}
        if len(names) > 1 and not record["codec"]:
            offsets = set(range(begin, end))
        elif end > begin + stored:
            offsets |= {begin + stored, end - 1}
        for at in flipped(saved / "rank-00000.data", sorted(offsets), lambda: chosen.randrange(8)):
            error = assert_load_is_right_or_refused(saved)
            if record["codec"] and at < begin + stored and decodes_the_same(saved, record):
                continue
            found = problem(saved)
            assert "rank-00000.data" in found, found
            assert f"chunk={number}" in found, found
            assert "rank=0" in found, found
            assert any(f"tensor={name!r}" in found for name in names), found
            if at < begin + stored:
                assert isinstance(error, ss.CorruptCheckpointError), (number, at)
                assert (error.path, error.chunk, error.rank) == (str(saved / "rank-00000.data"), number, 0)
                assert error.tensor in names
    small.assert_holds(saved, 1)


def decodes_the_same(path: Path, record: Any) -> bool:
    begin, stored = int(record["offset"]), int(record["stored_bytes"])
    frame = (path / "rank-00000.data").read_bytes()[begin : begin + stored]
    try:
        item_bytes = reference_reader.CODECS[int(record["codec"])]
        data = reference_reader.decode_chunk("", item_bytes, frame, int(record["raw_bytes"]))
    except reference_reader.FormatError:
        return False
    return xxhash.xxh3_128_digest(data) == bytes(record["digest"])


def test_truncated_and_extended_files_are_refused(saved: Path) -> None:
    for file in sorted(saved.iterdir()):
        data = file.read_bytes()
        cuts = {0, 1, len(data) - 1, len(data) // 2, max(0, len(data) - 4096), *range(0, len(data), 4096)}
        for changed in (*(data[:cut] for cut in sorted(cuts)), data + b"\0", data + bytes(4096), data + data):
            file.write_bytes(changed)
            assert assert_load_is_right_or_refused(saved) is not None, (file.name, len(changed))
            assert ("MANIFEST" if "MANIFEST" in file.name else file.name) in problem(saved)
        file.write_bytes(data)
    small.assert_holds(saved, 1)


def test_missing_files_make_a_checkpoint_incomplete(saved: Path) -> None:
    for file in sorted(saved.iterdir()):
        data = file.read_bytes()
        file.unlink()
        assert isinstance(assert_load_is_right_or_refused(saved), ss.IncompleteCheckpointError), file.name
        assert file.name in problem(saved)
        file.write_bytes(data)
    small.assert_holds(saved, 1)


def replacements() -> dict[str, Callable[[Path], None]]:
    def fifo(path: Path) -> None:
        os.mkfifo(path)

    def link(path: Path) -> None:
        path.symlink_to(path.with_name(path.name + ".real"))

    def unix_socket(path: Path) -> None:
        here = os.open(path.parent, os.O_RDONLY)  # names of sockets are at most 108 bytes
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(f"/proc/self/fd/{here}/{path.name}")
        os.close(here)

    def other_file(path: Path) -> None:
        (path.parents[1] / "secret").write_text("not of the checkpoint")
        os.link(path.parents[1] / "secret", path)

    def device(path: Path) -> None:
        try:
            os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(1, 5))
        except PermissionError as error:
            pytest.skip(f"no device can be made: {error}")

    return {
        "fifo": fifo,
        "directory": Path.mkdir,
        "hard link to another file": other_file,
        "device": device,
        "link to the real file": link,
        "link to nothing": lambda path: path.symlink_to("nothing"),
        "link to itself": lambda path: path.symlink_to(path.name),
        "link to a device": lambda path: path.symlink_to("/dev/zero"),
        "socket": unix_socket,
    }


@pytest.mark.timeout(30)
@pytest.mark.parametrize("kind", list(replacements()))
@pytest.mark.parametrize("name", [MANIFEST, DIGEST, "rank-00000.index", "rank-00000.data"])
def test_what_stands_in_place_of_a_file_is_refused(directory: Path, name: str, kind: str) -> None:
    path = directory / "step-1"
    ss.save(small.state(1), checkpoint_id=path)
    shutil.move(path / name, directory / f"{name}.real")  # outside, so that it is no stray
    replacements()[kind](path / name)
    if kind == "link to the real file":
        (path / name).unlink()
        (path / name).symlink_to(directory / f"{name}.real")
    error = assert_load_is_right_or_refused(path)
    assert isinstance(error, (ss.CorruptCheckpointError, ss.IncompleteCheckpointError)), error
    assert name in str(error)
    assert name in problem(path)
    with pytest.raises(ss.CheckpointError):
        ss.Checkpoint.open(path).load_tensors()


def test_files_swapped_between_steps_are_refused(directory: Path) -> None:
    for seed in (1, 2):
        ss.save(small.state(seed), checkpoint_id=directory / f"step-{seed}")
    one, two = directory / "step-1", directory / "step-2"
    for names in ([MANIFEST], [DIGEST], ["rank-00000.index"], ["rank-00000.data"], [MANIFEST, DIGEST]):
        swap([(one / name, two / name) for name in names])
        for seed, path in ((1, one), (2, two)):
            error = assert_load_is_right_or_refused(path, seed)
            assert isinstance(error, ss.CorruptCheckpointError), names
            assert problem(path)
        swap([(one / name, two / name) for name in names])
    small.assert_holds(one, 1)


def swap(pairs: list[tuple[Path, Path]]) -> None:
    for one, two in pairs:
        kept = one.read_bytes()
        one.write_bytes(two.read_bytes())
        two.write_bytes(kept)


def save_rank(rank: int, path: str) -> None:
    mine = {f"rank{rank}.{name}": value for name, value in small.state(rank).items()}
    ss.save({**mine, "same": 1}, checkpoint_id=path, step=1)


def test_files_swapped_between_ranks_are_refused_and_the_rank_is_named(directory: Path) -> None:
    from distributed import ranks

    path = directory / "c"
    ranks.values(ranks.run_ranks(2, save_rank, str(path), env={"SNAPSTONE_CHUNK_BYTES": str(CHUNK_BYTES)}))
    assert ss.verify(path)
    for suffix in ("index", "data"):
        pair = (path / f"rank-00000.{suffix}", path / f"rank-00001.{suffix}")
        swap([pair])
        with pytest.raises(ss.CorruptCheckpointError) as caught:
            ss.Checkpoint.open(path).load_tensors()
        assert caught.value.rank in (0, 1)
        assert f"rank-0000{caught.value.rank}.{suffix}" in "\n".join(ss.verify(path).problems)
        swap([pair])
    (path / "rank-00001.data").write_bytes(b"")
    assert "rank-00001.data" in problem(path)
    assert "rank 1" in problem(path)


def test_a_stray_file_is_a_problem_for_verify_alone(saved: Path) -> None:
    (saved / "rank-00001.data").write_bytes(b"not ours")
    assert "rank-00001.data" in problem(saved)
    assert small.load(saved) == small.bits(small.state(1))


def test_a_table_of_chunks_that_the_manifest_does_not_name_is_a_problem_for_verify(saved: Path) -> None:
    document = json.loads((saved / MANIFEST).read_bytes())
    document["writers"][0]["data"][0]["xxh128"] = "0" * 32
    write_manifest(saved, json.dumps(document).encode())
    problem = f"{saved / 'rank-00000.data'}: the manifest's digest of its chunk table does not match (rank 0)"
    assert ss.verify(saved).problems == (problem,)


def test_a_missing_path_is_not_found_by_both_names(directory: Path) -> None:
    for path in (directory / "absent", directory / "absent" / "deeper"):
        for read in (small.load, ss.verify, ss.Checkpoint.open):
            with pytest.raises(ss.CheckpointNotFoundError) as caught:
                read(path)
            assert isinstance(caught.value, FileNotFoundError)
            assert caught.value.filename == str(path)
    (directory / "link").symlink_to("absent")
    with pytest.raises(ss.CheckpointError):
        small.load(directory / "link")


def test_what_is_not_a_checkpoint_is_incomplete(directory: Path) -> None:
    (directory / "file").write_text("text")
    (directory / "empty").mkdir()
    (directory / "other").mkdir()
    (directory / "other" / "weights.bin").write_bytes(b"1234")
    staging = directory / f".staging-{'0' * 32}"
    staging.mkdir()
    os.mkfifo(directory / "fifo")
    (directory / "loop").symlink_to("loop")
    for path in (directory / "file", directory / "empty", directory / "other", staging, directory / "fifo"):
        for read in (small.load, ss.Checkpoint.open):
            with pytest.raises(ss.IncompleteCheckpointError, match=path.name):
                read(path)
        assert path.name in problem(path)
    with pytest.raises(ss.CheckpointError, match="loop"):
        small.load(directory / "loop")


def test_a_staging_directory_is_refused_even_when_it_looks_whole(directory: Path) -> None:
    path = directory / "c"
    ss.save(small.state(1), checkpoint_id=path)
    staging = directory / f".staging-{json.loads((path / MANIFEST).read_bytes())['save_id']}"
    path.rename(staging)
    with pytest.raises(ss.IncompleteCheckpointError, match="never committed"):
        small.load(staging)


def with_version(saved: Path, version: str, more: dict[str, object]) -> None:
    manifest = {**json.loads((saved / MANIFEST).read_bytes()), "format_version": version, **more}
    write_manifest(saved, json.dumps(manifest).encode())


def test_a_newer_major_is_incompatible_whatever_else_changed(saved: Path) -> None:
    for version in ("2.0", "2.7", "999999.0"):
        with_version(saved, version, {})
        assert isinstance(assert_load_is_right_or_refused(saved), ss.IncompatibleCheckpointError)
        assert version in problem(saved)
    write_manifest(saved, b'{"format": "snapstone", "format_version": "2.0", "elsewhere": []}')
    assert isinstance(assert_load_is_right_or_refused(saved), ss.IncompatibleCheckpointError)


def test_a_newer_minor_with_unknown_keys_is_read(saved: Path) -> None:
    forge = Forge(saved)
    forge.manifest.update(format_version="1.9", hints={"a": [1]}, signature=None)
    forge.writer.update(host="x")
    forge.writer["index"].update(crc=1)
    forge.writer["data"][0].update(tier="cold")
    forge.header.update(format_version="1.9", statistics=[1, 2])
    forge.header["tensors"][0].update(mean=0.5)
    forge.header["objects"]["step"].update(unit="steps")
    forge.write(saved)
    small.assert_holds(saved, 1)
    assert ss.Checkpoint.open(saved).format_version == (1, 9)


def test_a_chunk_of_the_same_checkpoint_in_the_wrong_place_is_refused(saved: Path) -> None:
    """A misdirected write: right bytes, wrong place."""
    forge = Forge(saved)
    data = bytearray(forge.data)
    assert len(forge.table) >= 3
    assert CHUNK_DTYPE.itemsize * len(forge.table) == forge.table.nbytes
    first, second = (int(offset) for offset in forge.table["offset"][:2])
    data[first : first + 4096], data[second : second + 4096] = (
        data[second : second + 4096],
        data[first : first + 4096],
    )
    (saved / "rank-00000.data").write_bytes(data)
    assert isinstance(assert_load_is_right_or_refused(saved), ss.CorruptCheckpointError)
    assert "chunk=0" in "\n".join(ss.verify(saved).problems)
