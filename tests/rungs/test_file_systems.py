"""The same files on every file system, and a clear answer from those that cannot hold them.

Mounted for real; what this machine cannot mount is skipped.

Invariants:
  1. The files are the ones that any other file system gets, byte for byte; deltas, overwrites and clean-up work.
  2. A file system that takes no files gives OSError with errno and path, and its checkpoints load.
  3. Nothing louder than a warning is said, and nothing is left beside the checkpoints.
"""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import pytest

import snapstone as ss
from durability import small
from rungs.mounts import mounted
from rungs.running import run_work
from rungs.same_files import RUNGS, comparable
from snapstone import _native

KINDS = ["tmpfs", "ramfs", "overlayfs", "ext4", "ext4 without a journal", "ext4 of 1 KiB blocks"]
KINDS += ["ext4 with its journal of data", "xfs", "btrfs", "btrfs compressed", "vfat", "exfat"]
IN_MEMORY = ("tmpfs", "ramfs")


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_files_on_every_file_system(tmp_path: Path, reference: Path, kind: str) -> None:
    with mounted(kind, tmp_path) as mount:
        done = run_work(None, mount.path, mount.path)
        assert len(done.rungs) == 1
        if kind in IN_MEMORY:
            assert done.rungs == {"buffered"}
        assert len(done.passed_over) == RUNGS.index(next(iter(done.rungs))), "one reason for each better rung"
        assert comparable(mount.path) == comparable(reference)


@pytest.mark.parametrize("kind", ["overlayfs", "xfs", "btrfs compressed"])
def test_every_rung_that_works_there_writes_the_same_files(tmp_path: Path, reference: Path, kind: str) -> None:
    with mounted(kind, tmp_path) as mount:
        tried = [rung for rung in RUNGS if not _native.try_rung(str(mount.path), rung)]
        assert "buffered" in tried
        for rung in tried:
            directory = mount.path / rung
            directory.mkdir()
            assert run_work(rung, directory, reference).rungs == {rung}
            assert comparable(directory) == comparable(reference), rung


@pytest.mark.parametrize("kind", KINDS)
def test_deltas_overwrites_and_leftovers_on_every_file_system(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setenv("SNAPSTONE_CHUNK_BYTES", "65536")
    with mounted(kind, tmp_path) as mount:
        run = mount.path
        small.save_previous(run)
        for delta in ("link", "carry"):
            small.save_delta(run, delta)
            small.assert_holds(run / "next", small.DELTAS[delta])
            os.rename(run / "next", run / delta)
        small.save_delta(run, "replace")
        small.assert_holds(run / "previous", small.DELTAS["replace"])
        dead = run / f".staging-{'0' * 32}"
        dead.mkdir(mode=0o700)
        (dead / "OWNER").write_text(_native.boot_id() + "\n")
        with pytest.raises(FileExistsError):
            ss.save(small.state(2), checkpoint_id=run / "link")
        ss.save(small.state(2), checkpoint_id=run / "full")
        assert small.leftovers(run) == []
        small.assert_holds(run / "link", small.DELTAS["link"])
        shutil.rmtree(run / "origin")
        small.assert_holds(run / "carry", small.DELTAS["carry"])


@pytest.mark.parametrize("kind", ["tmpfs", "ext4", "xfs", "btrfs"])
def test_a_file_system_that_becomes_read_only(tmp_path: Path, kind: str) -> None:
    with mounted(kind, tmp_path) as mount:
        ss.save(small.state(1), checkpoint_id=mount.path / "one")
        mount.make_read_only()
        before = sorted(os.listdir(mount.path))
        for name, overwrite in (("two", False), ("one", True)):
            with pytest.raises(OSError, match="Read-only") as caught:
                ss.save(small.state(2), checkpoint_id=mount.path / name, overwrite=overwrite)
            assert caught.value.errno == errno.EROFS
            assert str(caught.value.filename).startswith(str(mount.path))
        assert sorted(os.listdir(mount.path)) == before
        small.assert_holds(mount.path / "one", 1)
        mount.make_writable()
        ss.save(small.state(2), checkpoint_id=mount.path / "two")
        small.assert_holds(mount.path / "two", 2)
