"""What the command's exit codes mean, and which error of a command ends in which."""

from __future__ import annotations

from enum import IntEnum

from .. import CheckpointError, CheckpointNotFoundError

__all__ = ["ExitCode", "code_of", "message_of"]


class ExitCode(IntEnum):
    OK = 0
    FINDING = 1  # corrupt, different, incomplete, or nothing found
    USAGE = 2
    NOT_FOUND = 3
    IO_ERROR = 4
    INTERNAL = 70  # EX_SOFTWARE of sysexits.h: a bug of snapstone
    INTERRUPTED = 130  # 128 + SIGINT
    BROKEN_PIPE = 141  # 128 + SIGPIPE: nobody reads stdout any more


def code_of(error: BaseException) -> ExitCode:
    if isinstance(error, KeyboardInterrupt):
        return ExitCode.INTERRUPTED
    if isinstance(error, CheckpointNotFoundError | FileNotFoundError):
        return ExitCode.NOT_FOUND
    if isinstance(error, CheckpointError):
        return ExitCode.FINDING
    if isinstance(error, OSError | ImportError):
        return ExitCode.IO_ERROR
    if isinstance(error, ValueError):
        return ExitCode.USAGE
    return ExitCode.INTERNAL


def message_of(error: BaseException) -> str:
    """One line that names the path where the error knows it; the caller escapes it."""
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    if isinstance(error, CheckpointNotFoundError):
        return f"{error.path}: no such checkpoint"
    if isinstance(error, OSError) and not isinstance(error, CheckpointError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    if code_of(error) is ExitCode.INTERNAL:
        return f"internal error: {type(error).__name__}: {error} (SNAPSTONE_DEBUG=1 shows where)"
    return str(error) or type(error).__name__
