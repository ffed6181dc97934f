"""Targets that break every limit, and one that keeps them, for the tests of the runner."""

from __future__ import annotations

import os
import time

GIGABYTE = 1 << 30


def keep(data: bytes) -> None:
    sum(data)


def hang(data: bytes) -> None:
    while is_bad(data):
        pass


def hang_in_c(data: bytes) -> None:
    """One call, in which no handler of a signal written in Python runs."""
    if is_bad(data):
        pow(3, 1 << 6000, (1 << 200_000) + 1)


def sleep(data: bytes) -> None:
    if is_bad(data):
        time.sleep(3600)


def allocate(data: bytes) -> None:
    """A gigabyte that is never touched."""
    if is_bad(data):
        bytearray(GIGABYTE)


def fill(data: bytes) -> None:
    """A quarter of a gigabyte, every page written."""
    if is_bad(data):
        bytearray(b"x" * (GIGABYTE // 8)) * 2


def burn(data: bytes) -> None:
    """Comes back, but late."""
    end = time.process_time() + 0.4
    while is_bad(data) and time.process_time() < end:
        pass


def die(data: bytes) -> None:
    if is_bad(data):
        os.abort()


def fail(data: bytes) -> None:
    if is_bad(data):
        raise ValueError("no reader is documented to raise this")


def is_bad(data: bytes) -> bool:
    """Not the zeros that prepare a target."""
    return any(data)
