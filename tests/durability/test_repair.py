"""`repair` puts damage right, and never makes it worse.

Invariants:
  1. Whatever file of a checkpoint is damaged, and however, a replica puts it right: full, delta, zstd and xor
     checkpoints load bit for bit afterwards, and verify finds nothing.
  2. A file that several checkpoints share is put right in all of them, and is one file again.
  3. A flipped bit needs no copy; other damage of a chunk needs one checkpoint with the same digest.
  4. What could not be repaired is said, and stays as it was.
  5. Killed at any call, each file is the damaged one or the right one; the next repair ends it.
"""

from __future__ import annotations

import errno
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

import snapstone as ss
from distributed import ranks
from durability import small
from durability.chain import CHUNK_BYTES, assert_step, contents, make_chain, shared_files
from durability.doomed import forked, how_it_ended
from durability.seam import calls_of, faults, outcome_of
from snapstone import _native

ALL = os.environ.get("SNAPSTONE_TEST_KILLS") == "all"
STRIDE = 1 if ALL else 3  # of the calls at which a repair is killed
AGAIN = 1 if ALL else 6  # of those, after which the next one ends it
pytestmark = [pytest.mark.timeout(1200), pytest.mark.usefixtures("small_chunks")]


def scribble(file: Path, at: int, nbytes: int = 64) -> None:
    """In place: all names of the file have it."""
    with file.open("r+b") as target:
        target.seek(at)
        found = target.read(nbytes)
        target.seek(at)
        target.write(bytes(byte ^ 0xA5 for byte in found))


def bytes_of(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


def assert_clean(run: Path) -> None:
    assert small.leftovers(run) == []
    assert small.open_files(run) == []
    small.assert_slots_free()


def damage(file: Path, how: str) -> None:
    if how == "missing":
        file.unlink()
    elif how == "truncated":
        os.truncate(file, file.stat().st_size // 2)
    elif how == "extended":
        with file.open("ab") as target:
            target.write(b"x" * 5000)
    elif how == "zeros":
        size = file.stat().st_size
        os.truncate(file, 0)
        os.truncate(file, size)
    else:
        scribble(file, min(100, file.stat().st_size // 3))


@pytest.mark.parametrize("how", ["missing", "truncated", "extended", "zeros", "scribbled"])
@pytest.mark.parametrize("codec", [None, "zstd", "xor-zstd"])
def test_every_file_comes_back_from_a_replica(directory: Path, codec: str | None, how: str) -> None:
    run, replica = directory / "run", directory / "replica"
    path = make_chain(run, codec=codec)[-1]
    shutil.copytree(run, replica)
    before = bytes_of(path)
    for name in before:
        damage(path / name, how)
        report = ss.verify(path)
        assert not report, name
        if how == "missing" and name.startswith("MANIFEST.json"):
            assert "no MANIFEST.json" in report.problems[0]
        fixed = ss.repair(path, sources=[replica])
        assert fixed, (name, fixed.problems)
        assert any(name in line for line in fixed.repaired), (name, fixed.repaired)
        if not name.startswith("base/"):  # of these, what no checkpoint with the file uses is zero
            assert bytes_of(path)[name] == before[name], name
        assert_step(path, 3)
    assert_step(run / "step-1", 1)
    assert_step(run / "step-2", 2)
    assert_clean(run)


def test_the_directory_of_shared_files_comes_back(directory: Path) -> None:
    run, replica = directory / "run", directory / "replica"
    path = make_chain(run)[-1]
    shutil.copytree(run, replica)
    before = bytes_of(path)
    shutil.rmtree(path / "base")
    assert not ss.verify(path)
    report = ss.repair(path, sources=[replica])
    assert report, report.problems
    assert bytes_of(path).keys() == before.keys()
    for step in (1, 2, 3):
        assert_step(run / f"step-{step}", step)
    assert_clean(run)


def test_a_shared_file_is_put_right_in_every_checkpoint_that_has_it(directory: Path) -> None:
    run, replica = directory / "run", directory / "replica"
    paths = make_chain(run)
    shutil.copytree(run, replica)
    right = [bytes_of(path) for path in paths]
    origin = paths[0] / "rank-00000.data"
    for chunk in range(2):  # one that the last step uses, one that it does not
        scribble(origin, chunk * CHUNK_BYTES * 2 + 100)
    before = origin.stat().st_ino
    assert sum(not ss.verify(path) for path in paths) == 3
    report = ss.repair(paths[-1], sources=[replica])
    assert report
    assert set(report.checkpoints) == {str(path) for path in paths}
    assert [bytes_of(path) for path in paths] == right
    names = [file for path in paths for file in path.rglob("*.data") if file.stat().st_ino == origin.stat().st_ino]
    assert len(names) == 3, "one file again"
    assert origin.stat().st_ino != before
    for step, path in enumerate(paths, 1):
        assert_step(path, step)
    assert_clean(run)


def test_a_name_outside_the_run_is_counted_and_left_alone(directory: Path) -> None:
    run, replica = directory / "run", directory / "replica"
    path = make_chain(run, length=1)[0]
    shutil.copytree(run, replica)
    elsewhere = directory / "elsewhere"
    os.link(path / "rank-00000.data", elsewhere)
    scribble(elsewhere, 10)
    bad = elsewhere.read_bytes()
    report = ss.repair(path, sources=[replica])
    assert not report
    assert len(report.problems) == 1
    assert "1 more names" in report.problems[0]
    assert elsewhere.read_bytes() == bad
    assert_step(path, 1)


@pytest.mark.parametrize("name", ["MANIFEST.json", "MANIFEST.xxh128", "rank-00000.index", "rank-00000.data"])
def test_a_flipped_bit_needs_no_copy(directory: Path, name: str) -> None:
    path = make_chain(directory / "run", length=1)[0]
    before = bytes_of(path)
    for at in (0, 20, len(before[name]) // 2, len(before[name]) - 1):
        data = bytearray(before[name])
        data[at] ^= 0x10
        (path / name).write_bytes(data)
        assert not ss.verify(path)
        report = ss.repair(path)
        assert report, (at, report.problems)
        assert bytes_of(path) == before, at
    assert_clean(path.parent)


def test_chunks_come_from_another_step(directory: Path) -> None:
    """Full saves of two steps: what did not change stands in both, in other places."""
    run = directory / "run"
    tensors = {name: torch.randn(CHUNK_BYTES // 4) for name in "abc"}
    ss.save(tensors, checkpoint_id=run / "1")
    ss.save({"first": torch.zeros(CHUNK_BYTES // 4), **tensors}, checkpoint_id=run / "2", codec="zstd")
    scribble(run / "1" / "rank-00000.data", CHUNK_BYTES + 5)
    report = ss.repair(run / "1")
    assert report, report.problems
    assert str(run / "2") in report.repaired[0]
    assert_clean(run)


def test_a_copy_that_is_stored_otherwise_is_encoded_again(directory: Path) -> None:
    run = directory / "run"
    tensors = {"a": torch.arange(CHUNK_BYTES // 4) * 0.5, "b": torch.arange(CHUNK_BYTES // 4) * 0.25}
    ss.save(tensors, checkpoint_id=run / "raw")
    ss.save(tensors, checkpoint_id=run / "packed", codec="zstd:7")
    before = bytes_of(run / "packed")
    damage(run / "packed" / "rank-00000.data", "zeros")
    report = ss.repair(run / "packed")
    assert report, report.problems
    assert all("encoded again" in line for line in report.repaired)
    assert bytes_of(run / "packed") == before


def test_what_could_not_be_repaired_is_said(directory: Path) -> None:
    run = directory / "run"
    path = make_chain(run, length=1)[0]
    scribble(path / "rank-00000.data", 100)
    with (path / "rank-00000.data").open("r+b") as file:  # this one can be
        file.seek(2 * CHUNK_BYTES + 9)
        byte = file.read(1)[0]
        file.seek(2 * CHUNK_BYTES + 9)
        file.write(bytes([byte ^ 1]))
    before = (path / "rank-00000.data").read_bytes()
    report = ss.repair(path)
    assert not report
    assert len(report.repaired) == 1
    assert any("no good copy" in problem for problem in report.problems)
    after = (path / "rank-00000.data").read_bytes()
    assert [at for at in range(len(after)) if after[at] != before[at]] == [2 * CHUNK_BYTES + 9]
    again = contents(path)
    assert not ss.repair(path)
    assert contents(path) == again, "nothing more to do, so nothing is written"
    assert_clean(run)


def test_a_sound_checkpoint_is_left_alone(directory: Path) -> None:
    path = make_chain(directory / "run")[-1]
    before = contents(path)
    report = ss.repair(path)
    assert report
    assert (report.repaired, report.checkpoints) == ((), ())
    assert contents(path) == before
    with pytest.raises(ss.CheckpointNotFoundError):
        ss.repair(directory / "absent")


def test_a_source_that_lies_is_not_believed(directory: Path) -> None:
    """Its index has the digest, its data file other bytes."""
    run, replica = directory / "run", directory / "replica"
    path = make_chain(run, length=1)[0]
    shutil.copytree(run, replica)
    scribble(path / "rank-00000.data", 100)
    scribble(replica / "step-1" / "rank-00000.data", 200)
    before = contents(path)
    report = ss.repair(path, sources=[replica])
    assert not report
    assert report.repaired == ()
    assert contents(path) == before


@pytest.mark.parametrize("name", ["EIO", "ENOSPC"])
def test_one_failing_call_leaves_what_was_or_what_is_right(directory: Path, name: str) -> None:
    run, replica = directory / "run", directory / "replica"
    path = make_chain(run)[-1]
    shutil.copytree(run, replica)
    right = {step: bytes_of(run / f"step-{step}") for step in (1, 2, 3)}
    scribble(path / shared_files(path)[0].relative_to(path), 100)
    broken = {step: bytes_of(run / f"step-{step}") for step in (1, 2, 3)}
    pristine = directory / "pristine"
    shutil.copytree(run, pristine, copy_function=os.link)
    counts = calls_of(lambda: ss.repair(path, sources=[replica]))
    assert counts.keys() >= {"link", "rename", "fsync", "mkdir"}
    failed = 0
    for call in ("link", "rename", "fsync", "mkdir", "pwrite", "copy_file_range"):
        for fault in faults(call, f"errno={name}"):
            shutil.rmtree(run)
            copy_run(pristine, run)
            error = outcome_of(lambda: ss.repair(path, sources=[replica]), getattr(errno, name))
            fault.stop()
            failed += error is not None
            assert_each_file_is_one_of(run, broken, right)
            assert small.open_files(run) == [], fault
    assert failed >= 6


def copy_run(source: Path, target: Path) -> None:
    """Hard links are between its own files, as in the original."""
    inodes: dict[int, Path] = {}
    for file in sorted(source.rglob("*")):
        new = target / file.relative_to(source)
        if file.is_dir():
            new.mkdir(parents=True)
        elif file.stat().st_ino in inodes:
            os.link(inodes[file.stat().st_ino], new)
        else:
            new.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(file, new)
            inodes[file.stat().st_ino] = new


def assert_each_file_is_one_of(run: Path, broken: dict[int, Any], right: dict[int, Any]) -> int:
    """How many files are right that were not."""
    repaired = 0
    for step, wanted in right.items():
        found = bytes_of(run / f"step-{step}")
        assert found.keys() == wanted.keys()
        for name, data in found.items():
            assert data in (wanted[name], broken[step][name]), (step, name)
            repaired += data == wanted[name] != broken[step][name]
    return repaired


def repair_and_die(rank: int, directory: str) -> list[int]:
    codes = []
    for nth in range(1, 500, STRIDE):
        run = Path(directory, f"n{nth}")
        copy_run(Path(directory, "run"), run)

        def doomed(_: int, run: Path = run, nth: int = nth) -> None:
            _native.fault_arm(f"*:{nth}:kill")
            ss.repair(run / "step-3", sources=[Path(directory, "replica")])

        pid, pipe = forked(doomed)
        os.close(pipe)
        codes.append(how_it_ended(pid))
        if codes[-1] != -signal.SIGKILL:
            break
    return codes


def test_killed_at_every_call_leaves_what_was_or_what_is_right(directory: Path) -> None:
    run, replica = directory / "run", directory / "replica"
    path = make_chain(run)[-1]
    shutil.copytree(run, replica)
    right = {step: bytes_of(run / f"step-{step}") for step in (1, 2, 3)}
    scribble(shared_files(path)[0], 100)
    scribble(path / "rank-00000.data", 100)
    broken = {step: bytes_of(run / f"step-{step}") for step in (1, 2, 3)}
    (codes,) = ranks.values(ranks.run_ranks(1, repair_and_die, str(directory), store="none", timeout=600))
    assert set(codes[:-1]) == {-signal.SIGKILL}
    assert codes[-1] == 0
    outcomes = [
        assert_each_file_is_one_of(directory / f"n{nth}", broken, right)
        for nth in range(1, STRIDE * len(codes), STRIDE)
    ]
    assert outcomes == sorted(outcomes), "what is repaired stays so"
    assert len(set(outcomes)) >= 3
    assert outcomes[-1] == max(outcomes)
    for nth in range(1, STRIDE * len(codes), AGAIN * STRIDE):
        for name in small.leftovers(directory / f"n{nth}"):
            os.utime(directory / f"n{nth}" / name, (0, 0))
        assert ss.repair(directory / f"n{nth}" / "step-3", sources=[replica])
        assert small.leftovers(directory / f"n{nth}") == []
        for step in (1, 2, 3):
            assert_step(directory / f"n{nth}" / f"step-{step}", step)
