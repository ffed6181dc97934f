"""Directories that others fill: absent or complete, never deleted in half, and every wrong byte is found."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

import snapstone as ss
from snapstone import _native
from snapstone.errors import CorruptCheckpointError
from snapstone.integrations import numbered, publication, safetensors_file
from snapstone.integrations.directory_save import DirectorySaves
from snapstone.integrations.publication import Publication, problems

HOLD = """
import fcntl, os, sys
fcntl.flock(os.open(sys.argv[1], os.O_RDONLY), fcntl.LOCK_EX)
print("locked", flush=True)
sys.stdin.read()
"""


def published(final: Path, text: str = "text") -> Path:
    one = Publication.begin(str(final), Publication.name_for(str(final)), leads=True)
    staging = Path(one.staging)
    (staging / "sub").mkdir()
    (staging / "sub" / "a.txt").write_text(text)
    (staging / "empty").touch()
    ss.save({"t": torch.arange(9.0)}, checkpoint_id=staging / "state")
    assert not final.exists() or final.joinpath("snapstone.json").exists()
    one.seal({"step": 3})
    one.publish()
    return final


def test_every_wrong_byte_of_a_published_directory_is_found(tmp_path: Path) -> None:
    final = published(tmp_path / "c")
    assert os.listdir(tmp_path) == ["c"]
    assert problems(str(final), "full") == []
    (final / "added later").touch()
    assert problems(str(final), "full") == []
    for name in ("sub/a.txt", "state/rank-00000.data", "snapstone.json"):
        path = final / name
        right = path.read_bytes()
        position = right.index(b'"nbytes"') if b'"nbytes"' in right else len(right) // 2 if name[0] == "s" else 0
        path.write_bytes(right[:position] + bytes([right[position] ^ 1]) + right[position + 1 :])
        assert problems(str(final), "full"), name
        path.write_bytes(right[:-1])
        assert problems(str(final), "quick"), name
        path.write_bytes(right)
    marker = json.loads((final / "snapstone.json").read_text())
    (final / "snapstone.json").write_text(json.dumps({**marker, "body": {**marker["body"], "step": 4}}))
    (wrong,) = problems(str(final), "quick")
    assert "its digest is another" in wrong
    (final / "snapstone.json").write_text(json.dumps(marker))
    (final / "empty").unlink()
    (wrong,) = problems(str(final), "quick")
    assert "empty" in wrong
    with pytest.raises(CorruptCheckpointError, match="empty"):
        publication.problems_of_load(str(final))


def test_what_crashes_leave_is_put_right(tmp_path: Path) -> None:
    final = published(tmp_path / "c", "old")
    alive = Publication.begin(str(final), Publication.name_for(str(final)), leads=True)
    dead = Publication.begin(str(final), Publication.name_for(str(final)), leads=True)
    dead._unlock()  # as the kernel does when a process dies
    hidden = tmp_path / ".snapstone-old-c-0123456789ab"
    os.rename(final, hidden)
    (tmp_path / ".snapstone-gone-b-0123456789ab").mkdir()
    (tmp_path / ".snapstone-like").mkdir()
    publication.recover(str(tmp_path))
    assert set(os.listdir(tmp_path)) == {"c", os.path.basename(alive.staging), ".snapstone-like"}
    assert (final / "sub" / "a.txt").read_text() == "old"
    shutil.copytree(final, hidden)
    publication.recover(str(tmp_path))
    assert not hidden.exists()
    alive.discard()
    published(final, "new")
    assert (final / "sub" / "a.txt").read_text() == "new"
    publication.recover(str(tmp_path / "missing"))


def test_what_was_replaced_never_comes_back_in_half(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    final = published(tmp_path / "c", "old")

    def half(path: str, ignore_errors: bool = False) -> None:
        Path(path, "sub", "a.txt").unlink(missing_ok=True)

    monkeypatch.setattr(shutil, "rmtree", half)
    published(final, "new")
    publication.recover(str(tmp_path))
    publication.remove(str(final))
    publication.recover(str(tmp_path))
    assert not final.exists()
    monkeypatch.undo()
    publication.recover(str(tmp_path))
    assert os.listdir(tmp_path) == []


@contextmanager
def looked_at_by_another_process(directory: str) -> Iterator[Callable[[], None]]:
    """As `recover` does; what this yields ends it."""
    Path(directory).mkdir(exist_ok=True)
    command = [sys.executable, "-S", "-c", HOLD, directory]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdin is not None
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"locked\n"
        yield holder.stdin.close


def test_a_directory_that_another_process_looks_at_is_locked_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    final = tmp_path / "c"
    name = Publication.name_for(str(final))
    with looked_at_by_another_process(str(tmp_path / name)) as end:
        threading.Timer(0.3, end).start()
        one = Publication.begin(str(final), name, leads=True)
    (Path(one.staging) / "first").touch()
    publication.recover(str(tmp_path))
    (Path(one.staging) / "second").touch()
    one.seal({})
    one.publish()
    assert set(os.listdir(final)) == {"first", "second", "snapstone.json"}
    monkeypatch.setattr(publication, "_LOCK_SECONDS", 0.05)
    name = Publication.name_for(str(final))
    with looked_at_by_another_process(str(tmp_path / name)), pytest.raises(BlockingIOError, match="locked"):
        Publication.begin(str(final), name, leads=True)


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK])
def test_only_a_file_system_without_locks_is_used_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def flock(descriptor: int, how: int) -> None:
        raise OSError(number, os.strerror(number))

    final = str(tmp_path / "c")
    with monkeypatch.context() as patched:
        patched.setattr(fcntl, "flock", flock)
        if number == errno.ENOLCK:
            with pytest.raises(OSError, match="No locks available"):
                Publication.begin(final, Publication.name_for(final), leads=True)
            return
        one = Publication.begin(final, Publication.name_for(final), leads=True)
        publication.recover(str(tmp_path))
        assert os.path.isdir(one.staging)
        published(tmp_path / "c")
        published(tmp_path / "c", "new")
        os.rename(final, tmp_path / ".snapstone-old-c-0123456789ab")
        publication.put_back(final)
        assert problems(final, "full") == []


def test_what_was_removed_and_made_anew_is_not_published(tmp_path: Path) -> None:
    final = published(tmp_path / "c", "old")
    one = Publication.begin(str(final), Publication.name_for(str(final)), leads=True)
    shutil.rmtree(one.staging)
    os.mkdir(one.staging)
    one.seal({})
    with pytest.raises(FileNotFoundError, match="made it anew"):
        one.publish()
    one.discard()
    assert os.listdir(tmp_path) == ["c"]
    assert problems(str(final), "full") == []


def test_what_is_dead_is_out_of_sight_and_locked_while_it_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    final = str(tmp_path / "c")
    dead = Publication.begin(final, Publication.name_for(final), leads=True)
    dead._unlock()
    rmtree, seen = shutil.rmtree, []

    def watched(path: str, ignore_errors: bool = False) -> None:
        assert not os.path.exists(dead.staging)
        with pytest.raises(BlockingIOError):
            fcntl.flock(os.open(path, os.O_RDONLY), fcntl.LOCK_SH | fcntl.LOCK_NB)
        seen.append(path)
        rmtree(path, ignore_errors)

    monkeypatch.setattr(shutil, "rmtree", watched)
    publication.recover(str(tmp_path))
    assert len(seen) == 1
    assert os.listdir(tmp_path) == []


def test_a_publish_that_fails_leaves_what_it_would_have_replaced(tmp_path: Path) -> None:
    shm = Path("/dev/shm")
    if not shm.is_dir() or shm.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("needs two file systems: no rename goes from one to another")
    final = published(tmp_path / "c", "old")
    elsewhere = shm / f"snapstone-{os.getpid()}"
    try:
        one = Publication.begin(str(final), Publication.name_for(str(final)), parent=str(elsewhere), leads=True)
        one.seal({})
        with pytest.raises(OSError, match="cross-device"):
            one.publish()
        one.discard()
        assert os.listdir(elsewhere) == []
    finally:
        shutil.rmtree(elsewhere, ignore_errors=True)
    assert os.listdir(tmp_path) == ["c"]
    assert problems(str(final), "full") == []


def replaced_in_a_fork(final: Path, before_the_second_rename: Callable[[], object]) -> int:
    """Its pid."""
    pid = os.fork()
    if pid == 0:
        rename = os.rename

        def watched(source: Any, target: Any) -> None:
            if str(target) == str(final):
                os.rename = rename
                before_the_second_rename()
            rename(source, target)

        try:
            os.rename = watched  # type: ignore[assignment]
            one = Publication.begin(str(final), Publication.name_for(str(final)), leads=True)
            (Path(one.staging) / "new").touch()
            one.seal({})
            one.publish()
            os._exit(0)
        finally:
            os._exit(1)
    return pid


def test_a_checkpoint_gets_its_name_back_when_its_replacement_was_killed(tmp_path: Path) -> None:
    final = published(tmp_path / "c", "old")
    for put_back in (lambda: publication.put_back(str(final)), lambda: publication.recover(str(tmp_path))):
        pid = replaced_in_a_fork(final, lambda: os.kill(os.getpid(), signal.SIGKILL))
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
        assert not final.exists()
        final.mkdir()  # as scripts do that come to a directory for their checkpoints
        put_back()
        assert problems(str(final), "full") == []
        assert (final / "sub" / "a.txt").read_text() == "old"
    publication.put_back(str(tmp_path / "missing" / "c"))
    assert os.listdir(tmp_path) == ["c"]


def test_of_two_that_were_replaced_the_younger_one_comes_back(tmp_path: Path) -> None:
    for number, text in ((2, "older"), (1, "younger")):
        os.rename(published(tmp_path / "c", text), tmp_path / f".snapstone-old-c-{number:012x}")
    publication.recover(str(tmp_path))
    assert os.listdir(tmp_path) == ["c"]
    assert (tmp_path / "c" / "sub" / "a.txt").read_text() == "younger"


def test_nothing_is_put_back_while_a_living_process_replaces_it(tmp_path: Path) -> None:
    final = published(tmp_path / "c", "old")
    there, go = os.pipe(), os.pipe()
    pid = replaced_in_a_fork(final, lambda: (os.write(there[1], b"."), os.read(go[0], 1)))
    assert os.read(there[0], 1) == b"."
    assert not final.exists()
    threading.Timer(0.3, lambda: os.write(go[1], b".")).start()
    publication.put_back(str(final))  # waits
    assert (final / "new").exists()
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert os.listdir(tmp_path) == ["c"]


def test_no_file_goes_before_it_is_durable_that_the_checkpoint_has_gone(tmp_path: Path) -> None:
    final = published(tmp_path / "c")
    files = sorted(path.name for path in final.rglob("*"))

    def nothing_went(directory: Path) -> bool:
        (hidden,) = directory.iterdir()
        return hidden.name.startswith(".snapstone-gone-c-") and sorted(one.name for one in hidden.rglob("*")) == files

    _native.fault_arm("fsync:1+:errno=EIO")
    try:
        with pytest.raises(OSError, match="Input/output error"):
            publication.remove(str(final))
        assert nothing_went(tmp_path)
        publication.recover(str(tmp_path))
        assert nothing_went(tmp_path)
    finally:
        _native.fault_disarm()
    publication.recover(str(tmp_path))
    assert os.listdir(tmp_path) == []


def test_only_what_was_published_is_replaced(tmp_path: Path) -> None:
    final = published(tmp_path / "c")
    publication.check_replaceable(str(final))
    publication.check_replaceable(str(tmp_path / "missing"))
    (tmp_path / "empty").mkdir()
    publication.check_replaceable(str(tmp_path / "empty"))
    (final / "sub" / "notes").touch()
    with pytest.raises(FileExistsError):
        publication.check_replaceable(str(final))
    (tmp_path / "empty" / "notes").touch()
    with pytest.raises(FileExistsError):
        publication.check_replaceable(str(tmp_path / "empty"))


def test_retention_counts_and_removes_complete_checkpoints_only(tmp_path: Path) -> None:
    run = str(tmp_path)
    for step in (2, 4, 6, 8):
        os.utime(published(tmp_path / f"checkpoint-{step}") / "snapstone.json", ns=(step, step))
    (tmp_path / "checkpoint-6" / "empty").unlink()  # damaged
    (tmp_path / "checkpoint-99").mkdir()  # in part
    names = [os.path.basename(one) for one in numbered.complete(run, "checkpoint-", "trainer_state.json")]
    assert names == ["checkpoint-2", "checkpoint-4", "checkpoint-8"]
    best = str(tmp_path / "checkpoint-2")
    assert numbered.rotate(run, "checkpoint-", "trainer_state.json", None, ()) == []
    removed = numbered.rotate(run, "checkpoint-", "trainer_state.json", 1, (best,))
    assert [os.path.basename(one) for one in removed] == ["checkpoint-4"]
    assert {one.name for one in tmp_path.iterdir()} == {f"checkpoint-{step}" for step in (2, 6, 8, 99)}
    newest = numbered.newest_valid(run, "checkpoint-", "trainer_state.json")
    assert newest == str(tmp_path / "checkpoint-8")


def test_what_retention_cannot_remove_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    long = tmp_path / f"checkpoint-{1:0240d}"  # no file system takes its hidden name
    os.rename(published(tmp_path / "checkpoint-1"), long)
    for step in (2, 3, 4):
        published(tmp_path / f"checkpoint-{step}")
    removed = numbered.rotate(str(tmp_path), "checkpoint-", "trainer_state.json", 2, ())
    assert [os.path.basename(one) for one in removed] == ["checkpoint-2"]
    assert "is not removed: [Errno 36]" in caplog.text
    assert {one.name for one in tmp_path.iterdir()} == {long.name, "checkpoint-3", "checkpoint-4"}


def test_retention_that_fails_fails_no_save(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    saves = DirectorySaves(asynchronous=True, timeout_seconds=60)
    for name in ("a", "b"):
        save = saves.begin(str(tmp_path / name), step=1, leads=True)
        saves.submit(save, {}, lambda: os.listdir(tmp_path / "a" / "snapstone.json"))
    saves.wait()
    assert caplog.text.count("older checkpoints stay: [Errno 20] Not a directory") == 2
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]


def test_what_a_check_refuses_is_not_begun(tmp_path: Path) -> None:
    def refuse() -> None:
        raise FileExistsError("not to be replaced")

    saves = DirectorySaves(asynchronous=True, timeout_seconds=60)
    with pytest.raises(FileExistsError, match="not to be replaced"):
        saves.begin(str(tmp_path / "a"), step=1, leads=True, check=refuse)
    assert os.listdir(tmp_path) == []
    saves.wait()


def test_a_directory_is_locked_before_another_rank_may_write_into_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from snapstone.integrations import directory_save

    together = directory_save.together

    def told(*arguments: Any) -> list[bytes]:
        names: list[bytes] = together(*arguments)
        if arguments[1] == "name":
            publication.recover(str(tmp_path))  # of another job
            assert os.listdir(tmp_path) == [names[0].decode()]
        return names

    monkeypatch.setattr(directory_save, "together", told)
    saves = DirectorySaves(asynchronous=False, timeout_seconds=60)
    saves.submit(saves.begin(str(tmp_path / "a"), step=1, leads=True), {}, lambda: None)
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
def test_a_safetensors_file_has_the_bytes_of_the_library(tmp_path: Path, metadata: dict[str, str] | None) -> None:
    dtypes = [*safetensors_file._NAMES]
    tensors = {f"{name}.{position}": torch.ones(position % 3 + 1, 5).to(dtype)
               for position, dtype in enumerate(dtypes) for name in "ba"}  # fmt: skip
    tensors |= {"scalar": torch.tensor(2.5), "none": torch.empty(0, 3), "ü": torch.arange(3)}
    assert safetensors_file.can_hold(tensors)
    safetensors_file.write(str(tmp_path / "ours"), tensors, metadata)
    safetensors.torch.save_file(tensors, tmp_path / "theirs", metadata)
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    tied = torch.ones(4)
    assert not safetensors_file.can_hold({"a": tied, "b": tied})
    assert not safetensors_file.can_hold({"a": torch.ones(4, 4).t()})
