"""Bases that this version's writer did not make, with all their digests right.

Invariants: a save that is compared with one is right, a delta or a full one with a warning; it is never an error.
"""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

import snapstone as ss
from durability import small
from durability.based import NEXT, assert_full, document, replace, save
from durability.delta import make_delta, rewrite_manifest
from durability.forge import put
from snapstone import _native
from snapstone.index import CHUNK_DTYPE
from snapstone.reader import Reader


def test_chunks_that_are_differences_are_taken_over_with_what_they_refer_to_or_not_at_all(directory: Path) -> None:
    first = small.layers("11111")
    second = {name: value + 1 if name == "layer1" else value for name, value in first.items()}
    for number, state in enumerate((first, second)):
        ss.save(state, checkpoint_id=directory / f"full-{number}", codec="zstd")
    base = make_delta(directory / "full-0", directory / "full-1", directory / "forged", xor=True)
    codecs = np.frombuffer(Reader(base).indexes[0].table, CHUNK_DTYPE)["codec"]
    assert (codecs >= 5).any()
    ss.save(second | {"scalar": torch.tensor(9.0)}, checkpoint_id=directory / "next", base=base)
    shutil.rmtree(base)
    assert ss.verify(directory / "next").problems == ()
    assert small.load(directory / "next", "11111") == small.bits(second | {"scalar": torch.tensor(9.0)})


def rewrite_index(path: Path, change: Callable[[dict[str, Any], Any], Any]) -> None:
    """Changes a header and returns a table; the manifest is made to fit."""
    index = path / "rank-00000.index"
    data = index.read_bytes()
    size = struct.unpack_from("<Q", data, 8)[0]
    header = json.loads(data[16 : 16 + size])
    table = change(header, np.frombuffer(data[-(-(16 + size) // 64) * 64 :], CHUNK_DTYPE).copy())
    text = json.dumps(header, separators=(",", ":")).encode()
    head = struct.pack("<8sQ", b"SNAPSIDX", len(text)) + text
    index.unlink()

    def fit(facts: dict[str, Any]) -> None:
        (writer,) = facts["writers"]
        put(path, writer["index"], head + bytes(-len(head) % 64) + table.tobytes())
        for number, entry in enumerate(writer["data"]):
            entry["xxh128"] = _native.digest_hex(table[table["file"] == number].tobytes())

    rewrite_manifest(path, fit)


def rename_data(path: Path, old: str, new: str) -> None:
    """Another name for a data file, in the index and in the manifest."""

    def in_manifest(facts: dict[str, Any]) -> None:
        for entry in [*facts["writers"][0]["data"], *facts.get("shared", [])]:
            if entry["name"] == old:
                entry["name"] = new

    def in_index(header: dict[str, Any], table: Any) -> Any:
        header["files"] = [new if name == old else name for name in header["files"]]
        return table

    (path / old).rename(path / new)
    rewrite_manifest(path, in_manifest)
    rewrite_index(path, in_index)


def test_a_base_with_file_names_of_its_own_is_used_or_makes_the_save_a_full_one(run: Path) -> None:
    rename_data(run / "previous", "rank-00000.data", "weights.bin")
    small.assert_holds(run / "previous", small.PREVIOUS)
    assert_full(run, run / "previous")


def test_a_base_whose_own_file_would_have_the_name_of_one_that_it_shares(run: Path) -> None:
    """Linked under one name, one file would stand for the other."""
    base = run / "previous"
    (shared,) = document(base).shared
    rename_data(base, shared.name, f"base/{document(base).save_id}.rank-00000.data")
    small.assert_holds(base, small.PREVIOUS)
    assert_full(run, base)


def test_a_base_that_says_other_things_under_its_old_save_id_is_read_again(run: Path) -> None:
    """What the process remembers of a save is of the index that it wrote, not of any that has the save's name."""
    base = run / "previous"
    save(run, "12323", checkpoint_id=base, overwrite=True, base=None)
    data = (base / "rank-00000.data").read_bytes()

    def swap(header: dict[str, Any], table: Any) -> Any:
        table["offset"][[1, 2]] = table["offset"][[2, 1]]
        return table

    rewrite_index(base, swap)
    replace(
        base / "rank-00000.data",
        data[:65536] + data[2 * 65536 : 3 * 65536] + data[65536 : 2 * 65536] + data[3 * 65536 :],
    )
    small.assert_holds(base, "12323")
    assert save(run, "12324").stats["unchanged_chunks"] == 4
    small.assert_holds(run / "next", "12324")


def test_a_base_with_more_deltas_behind_it_than_a_number_holds(run: Path) -> None:
    rewrite_manifest(run / "previous", lambda facts: facts["base"].update(depth=(1 << 63) - 1))
    save(run)
    small.assert_holds(run / "next", NEXT)
