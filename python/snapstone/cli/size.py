"""Sizes as arguments: `512MiB`, `4GiB`, `1.5TiB`, or bytes."""

from __future__ import annotations

import re
from typing import Any

import click

__all__ = ["SIZE"]

_UNITS = {"": 1, "B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}
_SIZE = re.compile(r"(\d+(?:\.\d+)?) ?([KMGT]i?B?|B?)", re.ASCII | re.IGNORECASE)


class _Size(click.ParamType):
    """Bytes. K, M, G and T are powers of 1024, however they are written."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        found = _SIZE.fullmatch(value.strip())
        unit = found[2].upper()[:1].removesuffix("B") if found else ""
        nbytes = int(float(found[1]) * _UNITS[f"{unit}iB" if unit else ""]) if found else 0
        if nbytes < 1:
            self.fail(f"{value!r} is not a size: use 512MiB, 4GiB, or bytes", param, ctx)
        return nbytes


SIZE = _Size()
