"""torch_checkpointing 0.1: a storage that writes through the engine, durable and verified.

    make_async_checkpoint_saver(..., storage_config=StorageConfig())
    make_checkpoint_loader(..., storage_config=StorageConfig())

Each file that torch_checkpointing writes becomes a checkpoint of the engine, a directory of that name. Files of its own
storage are read as before.
"""

from __future__ import annotations

import io
import os
import shutil
import uuid
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import snapstone as ss

from .. import _native
from ..errors import CheckpointNotFoundError, CorruptCheckpointError, IncompatibleCheckpointError
from ..run_directory import is_checkpoint
from .directories import make_directories
from .versions import require

VERSION = require("torch-checkpointing", "0.1.1", "0.2")

from torch_checkpointing.storage import base_storage  # noqa: E402
from torch_checkpointing.storage.filesystem import (  # noqa: E402
    LocalFileSystemStorage,
    LocalFileSystemStorageConfig,
)

__all__ = ["Storage", "StorageConfig", "export"]

_SEGMENT_BYTES = 64 << 20  # of a file; tensors of its checkpoint
_OPTIONS = ("codec", "host_memory_budget", "timeout")
_FILE = "torch_checkpointing"


@dataclass
class StorageConfig(base_storage.StorageConfig):
    """For `storage_config=` of savers, loaders and `CheckpointManagerConfig`. Pickles, so that saver processes get it.

    Args:
        save_options: arguments of `snapstone.save`: codec, host_memory_budget, timeout.

    Raises:
        TypeError: another option.
    """

    save_options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if unknown := sorted(self.save_options.keys() - set(_OPTIONS)):
            raise TypeError(f"save_options: {', '.join(unknown)}: not among {', '.join(_OPTIONS)}")

    def create_storage(self) -> Storage:
        return Storage(self)


class Storage(LocalFileSystemStorage):
    """Files that are complete and durable once they are written, and verified when they are read.

    Reading raises CorruptCheckpointError for a wrong byte, named by file and chunk, IncompleteCheckpointError for what
    is missing of a file, and CheckpointNotFoundError, a FileNotFoundError, for one that is not there.
    """

    def __init__(self, config: StorageConfig) -> None:
        super().__init__(LocalFileSystemStorageConfig())
        self._save_options = dict(config.save_options)

    def stream_write(self, path: Path) -> io.IOBase:
        """The file appears, whole, when the stream is closed, and not at all when its `with` block raises."""
        return _WriteStream(os.fspath(path), self._save_options)

    def write(self, path: Path, data: Any) -> None:
        with self.stream_write(path) as stream:
            stream.write(data)

    def stream_read(self, path: Path, read_args: base_storage.ReadArgs | None = None) -> io.RawIOBase:
        if not is_checkpoint(os.fspath(path)):
            if not os.path.lexists(path):
                raise CheckpointNotFoundError("no such file", path=path)
            stock: io.RawIOBase = super().stream_read(path, read_args)
            return stock
        stream = _ReadStream(path)
        if read_args is None or read_args.pre_read_full_file:
            with stream:
                return io.BytesIO(stream.read())  # type: ignore[return-value] # as the base class does
        return stream

    def getsize(self, path: Path) -> int:
        return _ReadStream(path).size if is_checkpoint(os.fspath(path)) else os.path.getsize(path)

    def isdir(self, path: Path) -> bool:
        return os.path.isdir(path) and not is_checkpoint(os.fspath(path))

    def ls(self, path: Path) -> list[str]:
        """Without what killed saves left behind."""
        return [name for name in os.listdir(path) if not name.startswith((".staging-", ".trash-"))]

    def mkdir(self, path: Path, recursive: bool = True) -> None:
        if recursive:
            make_directories(path)
            return
        os.mkdir(path)
        _native.sync_directory(_parent(path), "stored_directory")

    def delete(self, path: Path) -> None:
        if is_checkpoint(os.fspath(path)):
            _discard(os.fspath(path))
        else:
            super().delete(path)

    def rmdir(self, path: Path) -> None:
        """Takes the directory away with one rename before it is emptied, so that half of one is never seen."""
        if not os.path.isdir(path):
            raise NotADirectoryError(f"{path} is not a directory")
        _discard(os.fspath(path))

    def rename(
        self, src_path: Path, dst_path: Path, is_directory: bool = False, background_cleanup: bool = False
    ) -> None:
        """As `torch_checkpointing.storage.Storage` says, and durable when it returns."""
        source, target = os.fspath(src_path), os.fspath(dst_path)
        if is_checkpoint(source):
            self._rename_engine_file(source, target)
        elif os.path.isdir(source) and is_checkpoint(target):
            raise FileExistsError(f"{target} is a file, and {source} a directory")
        elif is_checkpoint(target):
            self.write(dst_path, Path(src_path).read_bytes())
            os.unlink(source)
        else:
            super().rename(src_path, dst_path, is_directory, background_cleanup)
        for folder in {_parent(source), _parent(target)}:
            _native.sync_directory(folder, "stored_rename")

    def _rename_engine_file(self, source: str, target: str) -> None:
        if self.isdir(Path(target)):
            raise FileExistsError(f"{target} is a directory, and {source} a file")
        if is_checkpoint(target):  # in one step, by a commit of its own
            with _ReadStream(source) as stream:
                self.write(Path(target), stream.read())
            _discard(source)
            return
        if os.path.lexists(target):
            os.unlink(target)
        os.rename(source, target)


class _WriteStream(io.RawIOBase):
    """Holds what is written, and saves it when it is closed."""

    def __init__(self, path: str, options: Mapping[str, Any]) -> None:
        super().__init__()
        self._path = path
        self._options = options
        self._segments: list[bytearray] = []
        self._nbytes = 0
        if not os.path.isdir(_parent(path)):
            raise FileNotFoundError(f"no directory {_parent(path)} for {path}")
        if os.path.isdir(path) and not is_checkpoint(path):
            raise IsADirectoryError(f"{path} is a directory")

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        if self.closed:
            raise ValueError("write to a closed file")
        view = memoryview(data).cast("B")
        at = 0
        while at < len(view):
            if not self._segments or len(self._segments[-1]) == _SEGMENT_BYTES:
                self._segments.append(bytearray())
            segment = self._segments[-1]
            taken = min(_SEGMENT_BYTES - len(segment), len(view) - at)
            segment += view[at : at + taken]
            at += taken
        self._nbytes += len(view)
        return len(view)

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        if error is not None:
            self._segments.clear()
            super().close()
            return
        self.close()

    def __del__(self) -> None:  # a stream that nobody closed is not a file; io.IOBase would close it
        self._segments = []

    def close(self) -> None:
        if self.closed:
            return
        super().close()
        segments = {
            f"{index:08d}": torch.frombuffer(one, dtype=torch.uint8) for index, one in enumerate(self._segments)
        }
        self._segments = []
        document = {"nbytes": self._nbytes, "segment_bytes": _SEGMENT_BYTES}
        aside = _stock_file_aside(self._path)
        try:
            ss.save(
                {"bytes": segments},
                checkpoint_id=self._path,
                no_dist=True,
                overwrite=True,
                metadata={_FILE: document},
                on_unchanged="ignore",
                **self._options,
            )
        except BaseException:
            if aside is not None:
                os.replace(aside, self._path)
            raise
        if aside is not None:
            os.unlink(aside)


class _ReadStream(io.RawIOBase):
    """Reads the chunks that it is asked for, and verifies each."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__()
        self._opened = ss.Checkpoint.open(path)
        document = self._opened.metadata.get(_FILE)
        if not isinstance(document, dict):
            raise IncompatibleCheckpointError("not a file of torch_checkpointing", path=path)
        size, segment_bytes = document.get("nbytes"), document.get("segment_bytes")
        if type(size) is not int or type(segment_bytes) is not int or segment_bytes < 1 or size != self._opened.nbytes:
            raise CorruptCheckpointError("its size is not that of its bytes", path=path)
        self.size = size
        self._segment_bytes = segment_bytes
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self.size}[whence]
        if start + offset < 0:
            raise ValueError(f"seek to {start + offset}")
        self._at = start + offset
        return self._at

    def readinto(self, buffer: Any) -> int:
        """Fills the buffer as far as the file reaches."""
        # Released whatever happens: the caller closes the mapping under it, which it cannot while a traceback holds it.
        with memoryview(buffer) as whole, whole.cast("B") as view:
            wanted = max(0, min(len(view), self.size - self._at))
            done = 0
            while done < wanted:
                index, start = divmod(self._at + done, self._segment_bytes)
                stop = min(self._segment_bytes, start + wanted - done)
                piece = self._opened.get_slice(f"bytes.{index:08d}")[start:stop]
                view[done : done + len(piece)] = piece.numpy().data
                done += len(piece)
        self._at += done
        return done

    def readall(self) -> bytes:
        data = bytearray(max(0, self.size - self._at))
        self.readinto(data)
        return bytes(data)


def export(directory: str | os.PathLike[str], into: str | os.PathLike[str]) -> None:
    """Copies a checkpoint into a new directory, as plain files that stock storage reads. Every byte is verified.

    Raises:
        CheckpointError: as when reading. FileExistsError: `into` exists.
    """
    storage = StorageConfig().create_storage()
    os.makedirs(into)
    for name in storage.ls(Path(directory)):
        source, target = Path(directory, name), Path(into, name)
        if storage.isdir(source):
            export(source, target)
        else:
            unread = base_storage.ReadArgs(pre_read_full_file=False)
            with storage.stream_read(source, unread) as stream, open(target, "xb") as file:
                shutil.copyfileobj(stream, file, _SEGMENT_BYTES)


def _parent(path: str | os.PathLike[str]) -> str:
    return os.path.dirname(os.path.abspath(os.fspath(path)))


def _stock_file_aside(path: str) -> str | None:
    """Where the plain file is now that was in the way of a save."""
    if not os.path.isfile(path):
        return None
    aside = os.path.join(_parent(path), f".before-{os.path.basename(path)}")
    os.replace(path, aside)
    return aside


def _discard(path: str) -> None:
    trash = os.path.join(_parent(path), f".trash-{uuid.uuid4().hex}")
    os.rename(path, trash)
    _native.sync_directory(_parent(path), "stored_removal")
    with suppress(FileNotFoundError):  # saves remove what they find under such names
        shutil.rmtree(trash)
