"""A directory that others fill and that appears at once: how checkpoints of many files become atomic.

1. `Publication.begin` makes `.snapstone-new-<name>-<id>` beside the target, which a lock marks as alive. Who looks for
   dead ones holds that lock for a moment, so `begin` waits for it: without a lock the files would be taken for dead.
2. Whoever has files for it writes them there: a trainer, the engine with a checkpoint of its own inside.
3. `seal` syncs every file and directory and writes MARKER_NAME, with size and digest of each file, last.
4. `publish` renames the directory to its name. **This is the commit.** Where a directory of that name stands, it is
   renamed to `.snapstone-old-...` first, and back where the second rename fails; a crash between the two is put right
   by `put_back`, which loads call, too. A lock on the old directory keeps others from doing so in between.
5. The parent directory is synced.

`remove` goes the other way: one rename, a sync of the parent, then the files: a power cut never brings back a part.
What crashes leave behind, `recover` removes.
"""

from __future__ import annotations

import errno
import fcntl
import json
import mmap
import os
import re
import shutil
import time
import uuid
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, Literal

import numpy as np

from .. import CheckpointError, _native, manifest, verify
from ..errors import CorruptCheckpointError
from ..trace import UNPUBLISHED
from .directories import make_directories

__all__ = [
    "MARKER_NAME",
    "Publication",
    "check_replaceable",
    "is_published",
    "problems",
    "problems_of_load",
    "put_back",
    "recover",
    "remove",
]

MARKER_NAME = "snapstone.json"
_MARKER_BYTES_MAX = 64 << 20
_HIDDEN = re.compile(r"\.snapstone-(new|old|gone)-(.+)-[0-9a-f]{12}")
_WITHOUT_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP)
_LOCK_SECONDS = 10.0
_LOCK_PAUSE_SECONDS = 0.005


class Publication:
    """One such directory, from `begin` to `publish`."""

    def __init__(self, final: str, staging: str, lock: int | None) -> None:
        self.final = final
        self.staging = staging
        self._lock = lock

    @staticmethod
    def name_for(final: str) -> str:
        """A name that nobody else has; ranks that fill the directory together use the same."""
        return _hidden("new", os.path.basename(final))

    @classmethod
    def begin(cls, final: str, name: str, *, parent: str | None = None, leads: bool) -> Publication:
        """Makes the directory, in `parent` or beside `final`. `leads`: of the ranks that fill it, the one that
        publishes it.

        Raises:
            BlockingIOError: another process holds the lock of the directory, and does not let it go.
            FileNotFoundError: another process has taken the directory for one of a dead save.
        """
        parent = parent or os.path.dirname(final)
        make_directories(parent)
        staging = os.path.join(parent, name)
        os.makedirs(staging, exist_ok=True)
        return cls(final, staging, _locked(staging, fcntl.LOCK_SH) if leads else None)

    def seal(self, facts: dict[str, Any]) -> None:
        """Step 3: `facts` go into the marker beside the digests."""
        files, checkpoints, directories = {}, [], []
        for root, below, names in os.walk(self.staging):
            where = os.path.relpath(root, self.staging)
            if manifest.is_checkpoint(root):
                checkpoints.append(where)
                below.clear()
                continue
            directories.append(root)
            for name in names:
                files[os.path.normpath(os.path.join(where, name))] = _sync(os.path.join(root, name), "sealed_file")
        body = {**facts, "version": 1, "files": files, "checkpoints": sorted(checkpoints)}
        path = os.path.join(self.staging, MARKER_NAME)
        with open(path, "w", encoding="utf-8") as file:
            json.dump({"body": body, "xxh128": _digest_of(body)}, file, indent=1)
        _sync(path, "seal")
        for directory in reversed(directories):
            _native.sync_directory(directory, "sealed_entries")

    def publish(self) -> None:
        """Steps 4 and 5.

        Raises:
            FileNotFoundError: the directory is not the one that `begin` locked: files are missing.
        """
        parent, name = os.path.split(self.final)
        make_directories(parent)
        if self._lock is not None:
            _check_same(self._lock, self.staging)
        old = None
        if _is_free(self.final):
            os.rename(self.staging, self.final)
        else:
            old = os.path.join(parent, _hidden("old", name))
            self._exchange(old)
        _native.sync_directory(parent, "published")
        self._unlock()
        if old is not None:
            with suppress(OSError):  # it is published; `recover` tries again
                remove(old)

    def _exchange(self, old: str) -> None:
        with _lock_of(self.final, fcntl.LOCK_SH):  # `put_back` in another process waits for the end of this
            try:
                os.rename(self.final, old)
                os.rename(self.staging, self.final)
            except BaseException:
                with suppress(OSError):  # it was acknowledged; where even this fails, `put_back` tries again
                    os.rename(old, self.final)
                raise

    def discard(self) -> None:
        """After an error. Again, or after `publish`, is nothing."""
        if self._lock is not None:
            shutil.rmtree(self.staging, ignore_errors=True)
            self._unlock()

    def _unlock(self) -> None:
        lock, self._lock = self._lock, None
        if lock is not None:
            os.close(lock)


def is_published(path: str) -> bool:
    return os.path.isfile(os.path.join(path, MARKER_NAME))


def check_replaceable(path: str) -> None:
    """Raises FileExistsError for a directory with anything in it that `publish` would delete and that is not of a
    published one.
    """
    if not os.path.isdir(path) or not os.listdir(path):
        return
    with suppress(CorruptCheckpointError, OSError):
        body = _marker(path)
        known = {MARKER_NAME, *body["files"]}
        for root, below, names in os.walk(path):
            where = os.path.relpath(root, path)
            if where in body["checkpoints"]:
                below.clear()
            elif not known.issuperset(os.path.normpath(os.path.join(where, name)) for name in names):
                break
        else:
            return
    raise FileExistsError(
        errno.EEXIST, "the directory holds other things than a checkpoint of snapstone, so it is not replaced", path
    )


def problems_of_load(path: str) -> None:
    """Raises CorruptCheckpointError for a published directory with wrong bytes that no load would notice: the engine
    verifies its own when it reads them.
    """
    if is_published(path) and (wrong := problems(path, "full", of_engine="quick")):
        raise CorruptCheckpointError(wrong[0], path=path)


def problems(
    path: str, level: Literal["quick", "full"], *, of_engine: Literal["quick", "full"] | None = None
) -> list[str]:
    """What is wrong with a published directory. Files that were added later are nobody's business.

    Args:
        level: "quick" checks that every file is there with its size; "full" reads and compares them all.
        of_engine: the level for the engine's checkpoints in it (default: the same).
    """
    try:
        body = _marker(path)
    except (CorruptCheckpointError, OSError) as error:
        return [str(error)]
    found = []
    for name, (nbytes, digest) in body["files"].items():
        file = os.path.join(path, name)
        if not os.path.isfile(file) or os.path.getsize(file) != nbytes:
            found.append(f"{file} is missing, or has not the {nbytes} bytes that were written")
        elif level == "full" and _digest(file) != digest:
            found.append(f"{file} has bytes that were not written: its digest is not {digest}")
    for name in body["checkpoints"]:
        try:
            found += verify(os.path.join(path, name), level=of_engine or level).problems
        except (CheckpointError, OSError) as error:
            found.append(str(error))
    return found


def remove(path: str) -> None:
    """Deletes a directory that a crash must not leave in half."""
    _remove_hidden([_hide(os.path.abspath(path))])


def put_back(path: str) -> None:
    """Gives a published directory its name again where a crash came while it was replaced. Any process may call it."""
    parent, name = os.path.split(os.path.abspath(path))
    path = os.path.join(parent, name)
    if not _is_free(path):
        return
    found = []
    with suppress(FileNotFoundError):
        for entry in os.scandir(parent):
            match = _HIDDEN.fullmatch(entry.name)
            if match is not None and match.group(1, 2) == ("old", name):
                found.append((entry.stat().st_ctime_ns, entry.path))
    for _, old in sorted(found)[-1:]:
        # Blocking: it is being replaced now. Not found: it has been, or another process was faster.
        with suppress(BlockingIOError, FileNotFoundError), _lock_of(old, fcntl.LOCK_EX):
            if _is_free(path):
                os.rename(old, path)


def recover(parent: str) -> None:
    """Ends what a crash has left unfinished in `parent`: for the one process that publishes there."""
    names: list[str] = []
    with suppress(FileNotFoundError):
        names = sorted(os.listdir(parent))
    with ExitStack() as locks:
        gone = []
        for match in filter(None, map(_HIDDEN.fullmatch, names)):
            path, final = os.path.join(parent, match[0]), os.path.join(parent, match[2])
            if match[1] == "gone":
                gone.append(path)
            elif match[1] == "old":
                put_back(final)
                if is_published(final):
                    with suppress(OSError):  # never in half: it would come back if the one that replaced it went
                        gone.append(_hide(path))
            elif _locked_dead(path, locks):
                with suppress(OSError):
                    gone.append(_hide(path))
        with suppress(OSError):  # the next one tries again
            _remove_hidden(gone)


def _hide(path: str) -> str:
    parent, name = os.path.split(path)
    hidden = _HIDDEN.fullmatch(name)
    gone = os.path.join(parent, _hidden("gone", name if hidden is None else hidden[2]))
    os.rename(path, gone)
    return gone


def _remove_hidden(paths: Iterable[str]) -> None:
    """Of one parent. Before the first file goes, the rename is durable, whichever process it was that did it."""
    for number, path in enumerate(paths):
        if number == 0:
            _native.sync_directory(os.path.dirname(path), "hidden")
        shutil.rmtree(path, ignore_errors=True)


def _hidden(kind: str, name: str) -> str:
    return f"{UNPUBLISHED if kind == 'new' else f'.snapstone-{kind}-'}{name}-{uuid.uuid4().hex[:12]}"


def _is_free(path: str) -> bool:
    """Whether a rename may put a directory there: nothing, or an empty directory."""
    return not os.path.lexists(path) or (os.path.isdir(path) and not os.listdir(path))


def _locked(directory: str, how: int) -> int:
    """A descriptor of the directory with its lock. Whoever holds one that conflicts is waited for."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        end = time.monotonic() + _LOCK_SECONDS
        while not _has_lock(descriptor, how):
            if time.monotonic() > end:
                raise BlockingIOError(errno.EWOULDBLOCK, "another process keeps the directory locked", directory)
            time.sleep(_LOCK_PAUSE_SECONDS)
        _check_same(descriptor, directory)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


@contextmanager
def _lock_of(directory: str, how: int) -> Iterator[None]:
    descriptor = _locked(directory, how)
    try:
        yield
    finally:
        os.close(descriptor)


def _has_lock(descriptor: int, how: int) -> bool:
    try:
        fcntl.flock(descriptor, how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _WITHOUT_LOCKS:  # without locks nobody takes the directory for dead
            raise
    return True


def _locked_dead(directory: str, locks: ExitStack) -> bool:
    """Whether nobody alive fills the directory. Nobody begins to until `locks` end."""
    try:
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
        locks.callback(os.close, descriptor)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _check_same(descriptor, directory)
    except OSError:
        return False
    return True


def _check_same(descriptor: int, directory: str) -> None:
    """Raises FileNotFoundError where the name is not that of the directory that was opened."""
    if not os.path.samestat(os.fstat(descriptor), os.stat(directory)):
        raise FileNotFoundError(errno.ENOENT, "another process has removed the directory and made it anew", directory)


def _sync(path: str, step: str) -> tuple[int, str]:
    """Makes a file durable; its size and digest."""
    with open(path, "rb") as file:
        _native.sync_file(file.fileno(), path, step)
    return os.path.getsize(path), _digest(path)


def _digest(path: str) -> str:
    with open(path, "rb") as file:
        if os.fstat(file.fileno()).st_size == 0:
            return _native.digest_hex(b"")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            view = np.frombuffer(mapped, np.uint8)
            try:
                return _native.digest_memory(view.ctypes.data, view.nbytes)
            finally:
                del view


def _digest_of(body: dict[str, Any]) -> str:
    return _native.digest_hex(json.dumps(body, sort_keys=True, separators=(",", ":")).encode())


def _marker(path: str) -> dict[str, Any]:
    file = os.path.join(path, MARKER_NAME)
    data = _native.read_file(path, MARKER_NAME, _MARKER_BYTES_MAX)
    try:
        document = json.loads(data)
        body: dict[str, Any] = document["body"]
        if document["xxh128"] != _digest_of(body):
            raise ValueError("its digest is another")
        if body["version"] != 1:
            raise ValueError(f"version {body['version']}, this is for version 1")
        if not all(map(_is_inside, [*body["checkpoints"], *body["files"].keys()])):
            raise ValueError("a name that leads elsewhere")
        if not all(type(nbytes) is int and type(digest) is str for nbytes, digest in body["files"].values()):
            raise ValueError("a file without a size and a digest")
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
        raise CorruptCheckpointError(f"not the marker of a complete checkpoint: {error}", path=file) from None
    return body


def _is_inside(name: Any) -> bool:
    """Whether a marker names a place under its own directory, in letters that a file system takes."""
    if type(name) is not str or "\0" in name or os.path.isabs(name) or ".." in name.split("/"):
        return False
    os.fsencode(name)
    return True
