"""Directories that a crash of the machine does not take back."""

from __future__ import annotations

import os

from .. import _native

__all__ = ["make_directories"]


def make_directories(path: str | os.PathLike[str], *, exist_ok: bool = True) -> None:
    """`os.makedirs`; every entry that it makes is durable."""
    missing, above = [], os.path.abspath(path)
    while not os.path.isdir(above):
        missing.append(above)
        above = os.path.dirname(above)
    os.makedirs(path, exist_ok=exist_ok)
    for made in missing:
        _native.sync_directory(os.path.dirname(made), "made_directory")
