"""What tests do is counted for the records of the long forms: tools/long_form.py."""

from __future__ import annotations

import os

__all__ = ["count"]


def count(what: str, number: int = 1) -> None:
    """From any process of a test."""
    if number and (path := os.environ.get("SNAPSTONE_TEST_COUNTS")):
        with open(path, "a", encoding="ascii") as file:
            file.write(f"{what}\t{int(number)}\n")
