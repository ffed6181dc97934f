"""The digest that every chunk pays, once when it is saved and once when it is loaded."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest

from snapstone import _native

KIB, MIB = 1 << 10, 1 << 20


@pytest.mark.parametrize("nbytes", [64 * KIB, MIB, 64 * MIB], ids=["64KiB", "1MiB", "64MiB"])
def bench_digest(benchmark: Any, of_bytes: Callable[[int], None], nbytes: int) -> None:
    data = os.urandom(nbytes)
    of_bytes(nbytes)
    assert len(benchmark(_native.digest_hex, data)) == 32
