"""Delta saves of small states: "next" is saved in a run with "previous" for its base; what may be done to that."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import snapstone as ss
from durability import small
from snapstone import manifest, writer

NEXT = small.DELTAS["link"]


def forget() -> None:
    """What this process knows of earlier saves: the next one reads the index of its base."""
    writer._memory._entries.clear()


def save(run: Path, what: int | str = NEXT, *, asynchronous: bool = False, **options: Any) -> ss.Checkpoint:
    options = {"checkpoint_id": run / "next", "base": run / "previous", **options}
    if asynchronous:
        return ss.async_save(small.make(what), **options).result(30)
    return ss.save(small.make(what), **options)


def names(run: Path) -> list[str]:
    return sorted(os.listdir(run))


def document(path: Path) -> manifest.Manifest:
    return manifest.read(str(path))


def assert_full(run: Path, named: Path, what: int | str = NEXT, **options: Any) -> str:
    """The save is a full one with one warning, which names the base; its text."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        saved = save(run, what, **options)
    (warning,) = caught
    text = str(warning.message)
    assert issubclass(warning.category, RuntimeWarning)
    assert text.startswith(f"rank 0 saves in full, without the base {named}: "), text
    assert saved.stats["base_unused"].partition(": ")[2] in text
    path = Path(options.get("checkpoint_id", run / "next"))
    assert (document(path).base, document(path).shared) == (None, ())
    assert not (path / "base").exists()
    small.assert_holds(path, what)
    assert small.leftovers(run) == []
    return text


def cut(file: Path, nbytes: int = 1) -> None:
    """In this checkpoint only: other links keep what they had."""
    replace(file, file.read_bytes()[:-nbytes])


def replace(file: Path, data: bytes) -> None:
    file.unlink()
    file.write_bytes(data)


def flip(file: Path, offset: int) -> None:
    data = bytearray(file.read_bytes())
    data[offset] ^= 1
    replace(file, bytes(data))


def data_of_base(base: Path) -> Path:
    return base / "rank-00000.data"
