"""Sizes as arguments: `512MiB`, `4GiB`, `1.5TiB`, or bytes."""

from __future__ import annotations

import re

import click

__all__ = ["size_in_bytes"]

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_SIZE = re.compile(r"(\d+(?:\.\d+)?) ?([KMGT]i?B?|B?)", re.ASCII | re.IGNORECASE)


def size_in_bytes(text: str) -> int:
    """For `click.option(type=...)`. K, M, G and T are powers of 1024, however they are written."""
    found = _SIZE.fullmatch(text.strip())
    unit = found[2].upper()[:1].removesuffix("B") if found else ""
    nbytes = int(float(found[1]) * _UNITS[unit]) if found else 0
    if nbytes < 1:
        raise click.BadParameter(f"{text!r} is not a size: use 512MiB, 4GiB, or bytes")
    return nbytes
