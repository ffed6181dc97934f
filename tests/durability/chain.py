"""A run of delta saves, each compared with the one before, and what tests ask of the checkpoints afterwards."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

import snapstone as ss
from durability import small
from snapstone.chunks import Chunk, Chunks
from snapstone.reader import Reader

CHUNK_BYTES = 65536
CHUNKS = 6
METADATA = {"metrics": {"loss": 0.5}}


def state_at(step: int) -> dict[str, Any]:
    """At each step another chunk of the large tensor changes; the packed chunk never does."""
    state = small.state(1) | {"step": step}
    state["large"] = torch.randn(CHUNKS * CHUNK_BYTES // 4, generator=torch.Generator().manual_seed(1))
    for earlier in range(2, step + 1):
        state["large"][(earlier % CHUNKS) * CHUNK_BYTES // 4] = float(earlier)
    return state


def make_chain(run: Path, length: int = 3, **options: Any) -> list[Path]:
    """step-1 in full, each later one compared with the one before."""
    paths = [run / f"step-{step}" for step in range(1, length + 1)]
    for step, path in enumerate(paths, 1):
        base = paths[step - 2] if step > 1 else None
        ss.save(state_at(step), checkpoint_id=path, base=base, metadata=METADATA, **options)
    return paths


def assert_step(path: Path, step: int) -> None:
    """The checkpoint is `state_at(step)`, bit for bit and in every byte of its files."""
    wanted = state_at(step)
    target = {name: torch.zeros_like(one) if isinstance(one, torch.Tensor) else None for name, one in wanted.items()}
    ss.load(target, checkpoint_id=path)
    assert small.bits(target) == small.bits(wanted), path
    report = ss.verify(path)
    assert report, report.problems


def contents(*paths: Path) -> dict[str, tuple[int, bytes]]:
    """Inode and bytes of every file."""
    return {
        str(file): (file.stat().st_ino, file.read_bytes())
        for path in paths
        for file in sorted(path.rglob("*"))
        if file.is_file()
    }


def shared_files(path: Path) -> list[Path]:
    return sorted((path / "base").iterdir())


def flip_bit(path: Path, at: int) -> None:
    with open(path, "r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 0x10]))


def assert_unchanged(path: Path, before: dict[str, tuple[int, bytes]]) -> None:
    """And nothing is left behind beside it."""
    assert contents(path) == before
    assert small.leftovers(path.parent) == []
    assert small.open_files(path.parent) == []


def names_in(path: Path) -> list[str]:
    return sorted(os.listdir(path))


def chunk_at(path: Path, *, xor: bool) -> tuple[int, Path]:
    """Offset and file of a large chunk that is referred to (xor), or of any."""
    chunks = Chunks(Reader(path))
    first = chunks.references(0)
    number = min(first.values()) if xor else 0
    chunk = Chunk(chunks, 0, number)
    return chunk.offset, Path(chunk.path)
