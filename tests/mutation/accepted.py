"""Checks that no test misses, each with the reason why it stays: (file:function or file, begin of the line, reason)."""

from __future__ import annotations

__all__ = ["ACCEPTED"]

ACCEPTED: tuple[tuple[str, str, str], ...] = ()
