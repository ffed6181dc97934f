"""What stands where a checkpoint is to go is replaced only when asked for, and only by a whole checkpoint.

Invariants:
  1. Whatever is at the target stays as it is, byte for byte and inode for inode, unless it is a checkpoint and
     `overwrite=True`; then it is either still there whole, or the new one is.
  2. What is not a checkpoint is never replaced, moved or removed, nor is what a link points to.
  3. Every refusal is a FileExistsError or a ValueError that names the target, and leaves nothing behind.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

import snapstone as ss
from durability import small
from snapstone import _native

SEED = 1177


@pytest.fixture(autouse=True)
def seeded() -> None:
    print(f"seed {SEED}")


def tree(path: Path) -> dict[str, tuple[int, int, bytes]]:
    """Everything under `path`: inode, mode, contents or link; links are not followed."""
    found = {}
    for name in sorted([path, *path.rglob("*")] if path.is_dir() and not path.is_symlink() else [path]):
        facts = name.lstat()
        contents = b""
        if name.is_symlink():
            contents = os.fsencode(os.readlink(name))
        elif name.is_file():
            contents = name.read_bytes()
        found[str(name)] = (facts.st_ino, facts.st_mode, contents)
    return found


def test_an_existing_checkpoint_is_not_replaced_without_overwrite(directory: Path) -> None:
    path = directory / "c"
    ss.save(small.state(1), checkpoint_id=path)
    before = tree(path)
    for save in (ss.save, lambda *a, **k: ss.async_save(*a, **k).result()):
        with pytest.raises(FileExistsError, match="overwrite=True") as caught:
            save(small.state(2), checkpoint_id=path)
        assert (caught.value.errno, caught.value.filename) == (errno.EEXIST, str(path))
    assert tree(path) == before
    assert os.listdir(directory) == ["c"]


@pytest.mark.parametrize("asynchronous", [False, True])
def test_overwrite_replaces_a_checkpoint_and_leaves_nothing_behind(directory: Path, asynchronous: bool) -> None:
    path = directory / "c"
    for seed in (1, 2, 3):
        if asynchronous:
            ss.async_save(small.state(seed), checkpoint_id=path, overwrite=True).result()
        else:
            ss.save(small.state(seed), checkpoint_id=path, overwrite=True)
        small.assert_holds(path, seed)
        assert os.listdir(directory) == ["c"]


BEFORE_THE_COMMIT = [
    "renameat2:1:errno=EIO",
    "renameat2:1:errno=EINVAL",  # a file system that cannot exchange two names
    "renameat2:1:errno=ENOSPC",
    "unlink:1:errno=EIO",
    *(f"fsync:{n}:errno=EIO" for n in range(1, 7)),
    "mkdir:1:errno=EACCES",
    "close:1:errno=EIO",
    "stat:1:errno=EIO",
    "pwrite:2:errno=EDQUOT",
]


@pytest.mark.parametrize("fault", BEFORE_THE_COMMIT)
def test_a_failure_before_the_commit_keeps_the_old_one(directory: Path, fault: str) -> None:
    path = directory / "c"
    ss.save(small.state(1), checkpoint_id=path)
    before = tree(path)
    _native.fault_arm(fault)
    with pytest.raises(OSError):  # noqa: PT011 - which errno is the fault's affair
        ss.save(small.state(2), checkpoint_id=path, overwrite=True)
    assert _native.fault_seen(fault.partition(":")[0]) > 0
    _native.fault_disarm()
    assert tree(path) == before
    small.assert_holds(path, 1)
    assert os.listdir(directory) == ["c"]
    ss.save(small.state(3), checkpoint_id=path, overwrite=True)
    small.assert_holds(path, 3)


def other_things() -> dict[str, Callable[[Path], None]]:
    def full(path: Path) -> None:
        path.mkdir()
        (path / "weights.bin").write_bytes(b"precious")

    def pretender(path: Path) -> None:
        full(path)
        (path / "MANIFEST.json").mkdir()

    def linked(path: Path) -> None:
        full(path.with_name("elsewhere"))
        path.symlink_to("elsewhere")

    def linked_checkpoint(path: Path) -> None:
        ss.save(small.state(9), checkpoint_id=path.with_name("elsewhere"))
        path.symlink_to("elsewhere")

    return {
        "file": lambda path: path.write_bytes(b"precious") and None,
        "empty directory": Path.mkdir,
        "directory": full,
        "directory with a directory called MANIFEST.json": pretender,
        "fifo": lambda path: os.mkfifo(path),
        "link to nothing": lambda path: path.symlink_to("nothing"),
        "link to itself": lambda path: path.symlink_to(path.name),
        "link to a directory": linked,
        "link to a checkpoint": linked_checkpoint,
    }


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("kind", list(other_things()))
def test_what_is_not_a_checkpoint_is_never_replaced(directory: Path, kind: str, overwrite: bool) -> None:
    path = directory / "c"
    other_things()[kind](path)
    before = tree(directory)
    with pytest.raises(FileExistsError) as caught:
        ss.save(small.state(1), checkpoint_id=path, overwrite=overwrite)
    assert caught.value.filename == str(path)
    assert {name: facts for name, facts in tree(directory).items() if name != str(directory)} == {
        name: facts for name, facts in before.items() if name != str(directory)
    }


NAMES = [".", "..", ".hidden", ".staging-" + "0" * 32, "a b", "ü", "x" * 129, "a\n", "a:b", "*", "a\0b", "\udcff"]


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_names_that_a_checkpoint_cannot_have(directory: Path, name: str) -> None:
    (directory / "run").mkdir()
    before = tree(directory)
    with pytest.raises((ValueError, FileExistsError), match=r"checkpoint_id|target exists"):
        ss.save(small.state(1), checkpoint_id=f"{directory}/run/{name}")
    assert tree(directory) == before


@pytest.mark.parametrize("name", ["epoch=3-step=1000.ckpt", "a+b,c@d", "=", "x" * 128])
def test_names_of_trainers_are_names_of_checkpoints(directory: Path, name: str) -> None:
    ss.save(small.state(1), checkpoint_id=directory / name)
    ss.save(small.state(2), checkpoint_id=directory / name, overwrite=True, base=directory / name)
    assert ss.verify(directory / name)


def test_paths_are_taken_as_they_are_meant(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = directory / "real"
    real.mkdir()
    (directory / "run").symlink_to("real")
    ss.save(small.state(1), checkpoint_id=directory / "run" / "linked-parent")
    ss.save(small.state(2), checkpoint_id=f"{real}/deep/er/slash/")
    monkeypatch.chdir(real)
    ss.save(small.state(3), checkpoint_id="relative")
    small.assert_holds(real / "linked-parent", 1)
    small.assert_holds(real / "deep" / "er" / "slash", 2)
    small.assert_holds(real / "relative", 3)


def test_a_parent_that_is_no_directory_is_an_os_error(directory: Path) -> None:
    (directory / "file").write_text("text")
    (directory / "loop").symlink_to("loop")
    for parent in ("file", "file/deeper", "loop"):
        with pytest.raises(OSError):  # noqa: PT011 - ENOTDIR, EEXIST or ELOOP, by what makedirs meets first
            ss.save(small.state(1), checkpoint_id=directory / parent / "c")
    assert sorted(os.listdir(directory)) == ["file", "loop"]


def save_slowly_and_meanwhile(path: Path, meanwhile: Callable[[], None], overwrite: bool) -> ss.SaveHandle:
    """Runs `meanwhile` after the target was looked at and before it is renamed."""
    _native.fault_arm("unlink:1:delay=300")  # step 5 of the protocol, just before the rename
    handle = ss.async_save(small.state(2), checkpoint_id=path, overwrite=overwrite)
    assert not path.exists() or overwrite
    meanwhile()
    return handle


def test_a_target_that_appears_during_the_save_is_not_replaced(directory: Path) -> None:
    path = directory / "c"
    for overwrite in (False, True):
        handle = save_slowly_and_meanwhile(path, lambda: path.mkdir(), overwrite)
        with pytest.raises(FileExistsError):
            handle.result(30)
        assert os.listdir(directory) == ["c"]
        assert os.listdir(path) == []
        path.rmdir()


def test_a_target_that_vanishes_during_an_overwrite_is_written_anew(directory: Path) -> None:
    path = directory / "c"
    ss.save(small.state(1), checkpoint_id=path)
    save_slowly_and_meanwhile(path, lambda: path.rename(directory / "moved"), True).result(30)
    small.assert_holds(path, 2)
    small.assert_holds(directory / "moved", 1)


def test_of_many_saves_to_one_name_exactly_one_wins(directory: Path) -> None:
    for attempt in range(5):
        path = directory / f"c{attempt}"
        outcomes: list[BaseException | int] = []

        def save(seed: int, path: Path = path, outcomes: list[BaseException | int] = outcomes) -> None:
            try:
                ss.save(small.state(seed), checkpoint_id=path)
                outcomes.append(seed)
            except FileExistsError as error:
                outcomes.append(error)

        threads = [threading.Thread(target=save, args=(seed,)) for seed in range(1, 5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(outcomes) == 4
        (winner,) = [outcome for outcome in outcomes if isinstance(outcome, int)]
        small.assert_holds(path, winner)
        assert small.leftovers(directory) == []


def test_a_reader_of_a_replaced_checkpoint_never_mixes_the_two(directory: Path) -> None:
    path = directory / "c"
    ss.save(small.state(1), checkpoint_id=path)
    with ss.Checkpoint.open(path) as old:
        ss.save(small.state(2), checkpoint_id=path, overwrite=True)
        with pytest.raises(ss.CheckpointError):
            old.load_tensors()
    small.assert_holds(path, 2)


def test_a_save_removes_what_dead_saves_have_left(tmp_path: Path) -> None:
    for name in (f".trash-{'0' * 32}", f".staging-{'1' * 32}"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "rank-00000.data").write_bytes(b"bytes")
        os.utime(tmp_path / name, (0, 0))
    ss.save(small.state(1), checkpoint_id=tmp_path / "c")
    assert os.listdir(tmp_path) == ["c"]
