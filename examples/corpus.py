"""Real text without a download: the sources of the Python standard library, as bytes."""

from __future__ import annotations

import os
import random
import sysconfig
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

SKIPPED = {"__pycache__", "dist-packages", "site-packages", "test", "tests", "idlelib"}


def read_corpus(limit_bytes: int) -> bytes:
    """The first `limit_bytes` of the library's .py files, directory by directory in the order of their names."""
    root = sysconfig.get_path("stdlib")
    text = bytearray()
    for directory, below, files in os.walk(root):
        below[:] = sorted(set(below) - SKIPPED)
        for file in sorted(files):
            if file.endswith(".py") and len(text) < limit_bytes:
                text += (Path(directory) / file).read_bytes()
        if len(text) >= limit_bytes:
            return bytes(text[:limit_bytes])
    raise FileNotFoundError(f"{root}: {len(text)} bytes of Python sources, {limit_bytes} wanted")


class Batches:
    """One rank's walk through its part of the corpus.

    The walk advances by a random amount (Python's generator) and every row of a batch starts at a random distance from
    it (NumPy's generator), so a resumed run sees the same bytes only if `position` and both generators came back.
    """

    def __init__(self, text: bytes, *, rows: int, context: int, rank: int, world_size: int) -> None:
        share = len(text) // world_size
        self.text = np.frombuffer(text, dtype=np.uint8)[rank * share : (rank + 1) * share]
        self.rows = rows
        self.context = context
        self.position = 0

    def next(self) -> tuple[Tensor, Tensor]:
        """Inputs and targets, int64, each of shape (rows, context); targets are the inputs one byte later."""
        starts = self.position + np.random.randint(0, len(self.text), size=self.rows)
        offsets = (starts[:, None] + np.arange(self.context + 1)) % len(self.text)
        window = torch.from_numpy(self.text[offsets].astype(np.int64))
        self.position = (self.position + random.randrange(self.rows * self.context)) % len(self.text)
        return window[:, :-1].contiguous(), window[:, 1:].contiguous()
