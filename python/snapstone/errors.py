"""Exception types: what went wrong, and where.

Every error of a save or load is a `CheckpointError`. It carries the place as attributes (`path`, `tensor`, `chunk`,
`rank`, `expected`, `actual`; None where unknown), shows them in `str()`, and pickles with all of them, because errors
travel between ranks. Wrong arguments are `ValueError` or `TypeError`, and failures of the operating system `OSError`.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable
from typing import Any

__all__ = [
    "CheckpointError",
    "CheckpointNotFoundError",
    "CorruptCheckpointError",
    "CudaError",
    "IncompatibleCheckpointError",
    "IncompleteCheckpointError",
    "RankFailedError",
]


class CheckpointError(RuntimeError):
    """The base of every error about a checkpoint."""

    # What str() shows, in this order. All live in the instance dict, which is what pickle carries besides `args`.
    _shown: tuple[str, ...] = ("path", "tensor", "chunk", "rank", "expected", "actual")

    def __init__(
        self,
        message: str = "",
        *,
        path: str | os.PathLike[str] | None = None,
        tensor: str | None = None,
        chunk: int | None = None,
        rank: int | None = None,
        expected: Any = None,
        actual: Any = None,
    ) -> None:
        super().__init__(message)
        self.path = None if path is None else os.fspath(path)
        self.tensor = tensor
        self.chunk = chunk
        self.rank = rank
        self.expected = expected
        self.actual = actual

    def __str__(self) -> str:
        message = str(self.args[0]) if self.args else ""
        known = ((name, getattr(self, name, None)) for name in self._shown)
        shown = ", ".join(f"{name}={value!r}" for name, value in known if value is not None and value != ())
        if not shown:
            return message
        return f"{message} ({shown})" if message else f"({shown})"


class CorruptCheckpointError(CheckpointError):
    """A byte of the checkpoint is not what was saved, or its structure is not valid."""


class IncompleteCheckpointError(CheckpointError):
    """The directory holds no committed checkpoint, or a file of a committed one is missing."""


class CheckpointNotFoundError(CheckpointError, FileNotFoundError):
    """There is no checkpoint at `path`. Also a `FileNotFoundError`, with `errno` ENOENT and `filename` set."""

    def __init__(
        self, message: str = "no such checkpoint", *, path: str | os.PathLike[str] | None = None, **where: Any
    ) -> None:
        super().__init__(message, path=path, **where)
        self.errno = errno.ENOENT
        self.strerror = os.strerror(errno.ENOENT)

    @property
    def filename(self) -> str | None:
        """`path` under the name that handlers of `OSError` read; the field of OSError itself does not pickle."""
        return self.path


class IncompatibleCheckpointError(CheckpointError):
    """The checkpoint is sound but cannot be used here: a newer format, other keys, shapes or dtypes, or pickle."""


class CudaError(CheckpointError):
    """A call of the CUDA driver failed; `call`, `code` (its CUresult) and `device` (an ordinal) say which and where.

    Out of memory, an unregistered ring and missing kernels are no errors: the engine does without.
    """

    _shown = ("call", "code", "device", *CheckpointError._shown)

    def __init__(
        self,
        message: str = "",
        *,
        code: int | None = None,
        call: str | None = None,
        device: int | None = None,
        **where: Any,
    ) -> None:
        super().__init__(message, **where)
        self.code = code
        self.call = call
        self.device = device


class RankFailedError(CheckpointError):
    """Another rank raised, died or missed the deadline; `failed_ranks` says which."""

    _shown = ("failed_ranks", *CheckpointError._shown)

    def __init__(self, message: str = "", *, failed_ranks: Iterable[int] = (), **where: Any) -> None:
        super().__init__(message, **where)
        self.failed_ranks: tuple[int, ...] = tuple(failed_ranks)
