"""What reads files that somebody else may have written, one target each: bytes in, and out comes nothing.

A target makes a document of the bytes (see `mutate`), gives it to the reader as a file would, and takes the errors that
the reader is documented to raise. Anything else that comes out is a finding.
"""

from __future__ import annotations

import atexit
import json
import os
import pickle
import shutil
import tempfile
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

import snapstone as ss
from durability import forge, small
from fuzz import mutate
from fuzz.mutate import Input
from report.measured import stall_document
from snapstone import _native, diagnosis, index, index_file, manifest, state, status_page, values
from snapstone.bench import results
from snapstone.dcp import rendezvous, stock
from snapstone.integrations import numbered, packing, publication
from snapstone.report.documents import Measurements
from snapstone.report.merged_trace import merged_trace
from snapstone.report.page import page
from snapstone.target import Target as SaveTarget

CHECKPOINT_ERRORS = (ss.CheckpointError,)


@cache
def place() -> Path:
    """A directory of this process, in memory where there is some."""
    prefix = f"snapstone-fuzz-{os.getpid()}-"  # by which `run` finds it when this process has been killed
    made = tempfile.mkdtemp(prefix=prefix, dir="/dev/shm" if os.path.isdir("/dev/shm") else None)
    atexit.register(shutil.rmtree, made, ignore_errors=True)
    return Path(made)


@cache
def saved() -> Path:
    """A checkpoint with chunks of every kind: packed, large, compressed."""
    path = place() / "source"
    metadata = {"metrics": {"loss": 1.5}, "t": (1, 2)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SNAPSTONE_CHUNK_BYTES", "65536")
        ss.save(small.state(1), checkpoint_id=path, step=1, metadata=metadata, codec="zstd")
    return path


def put(name: str, data: bytes) -> Path:
    path = place() / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(data)
    return path


@cache
def sound_index() -> tuple[bytes, dict[str, Any], int]:
    data = (saved() / "rank-00000.index").read_bytes()
    sound = forge.Forge(saved())
    return data, sound.header, (saved() / "rank-00000.data").stat().st_size


def read_manifest(data: bytes) -> None:
    text = mutate.text(Input(data), forge.Forge(saved()).manifest)
    directory = place() / "manifest"
    directory.mkdir(exist_ok=True)
    forge.write_manifest(directory, text)
    try:
        found = manifest.read(str(directory))
    except CHECKPOINT_ERRORS:
        return
    names = [entry.name for writer in found.writers for entry in (writer.index, *writer.data)]
    assert all(_native.is_file_name(name) for name in names), names
    assert len(found.writers) == found.world_size


def read_index(data: bytes) -> None:
    source = Input(data)
    whole, header, data_bytes = sound_index()
    if source.below(4) == 0:
        changed = mutate.raw(source, whole, (b'"shape":[4611686018427387904,4]', b'"chunks":[0,9]', b"\xff" * 8))
    else:
        text = mutate.text(source, header)
        head = b"SNAPSIDX" + len(text).to_bytes(8, "little") + text
        changed = head + bytes(-len(head) % 64) + forge.Forge(saved()).table.tobytes()
    try:
        found = index.parse(changed, path="rank-00000.index", dtype_bytes=index_file._DTYPE_BYTES)
        sizes = [data_bytes] * len(found.files)
        _native.check_chunk_table(found.table, sizes, found.chunk_bytes, "rank-00000.index", found.references)
        for stored in found.tensors:
            assert stored.item.nbytes <= len(found.table) // 40 * found.chunk_bytes or stored.derived_from
            if stored.path is not None:
                state.decode_path(stored.path)
    except CHECKPOINT_ERRORS:
        return


def put_checkpoint(data: bytes) -> Path | None:
    """With every digest of a file right; None if the bytes make a document that cannot be written."""
    source = Input(data)
    made = forge.Forge(saved())
    which = source.below(3)
    if which == 0:
        made.manifest = mutate.document(source, made.manifest)
        if type(made.manifest) is not dict or not _has_writer(made.manifest):
            return None
        made.writer = made.manifest["writers"][0]
    elif which == 1:
        made.header = mutate.document(source, made.header)
    else:
        table = bytearray(made.table.tobytes())
        for _ in range(1 + source.below(3)):
            at = source.below(len(table))
            table[at : at + 8] = source.take(8)[: len(table) - at].ljust(min(8, len(table) - at), b"\0")
        made.table = made.table.__class__(len(made.table), made.table.dtype, bytes(table))
    path = place() / "checkpoint"
    try:
        made.write(path)
    except (TypeError, UnicodeEncodeError):  # what the forge itself cannot write
        return None
    return path


def open_checkpoint(data: bytes) -> None:
    """All of the way from MANIFEST.json to tensors."""
    if (path := put_checkpoint(data)) is None:
        return
    try:
        with ss.Checkpoint.open(path) as checkpoint:
            checkpoint.load_tensors()
            checkpoint.state_dict()
            _ = (checkpoint.metadata, checkpoint.metrics, repr(checkpoint))
    except CHECKPOINT_ERRORS:
        pass
    ss.verify(path, diagnosis=False)


def diagnose(data: bytes) -> None:
    """`verify` promises an end to its search for a flipped bit that is too late for a fuzzer."""
    if (path := put_checkpoint(data)) is None:
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(diagnosis, "SEARCH_SECONDS", 0.01)
        patch.setattr(diagnosis, "_DECODING_SECONDS", 0.01)
        str(ss.verify(path))


def _has_writer(document: dict[str, Any]) -> bool:
    writers = document.get("writers")
    return type(writers) is list and bool(writers) and type(writers[0]) is dict


VALUES = {
    "tuple": {"$tuple": [1, {"$bytes": "AAEC"}, {"$float": "7ff8000000000001"}]},
    "dict": {"$dict": [[1, 2], [{"$tuple": [1]}, "x"]]},
    "set": {"$set": [1, 2]},
    "complex": {"$complex": [1.5, -2.0]},
    "int": {"$int": "0xffffffffffffffffffff"},
    "range": {"$range": [0, 10, 2]},
    "size": {"$size": [1, 2]},
    "numpy": {"$numpy": {"dtype": "float32", "data": "AAAAAA=="}},
    "ndarray": {"$ndarray": {"dtype": "int16", "shape": [2, 2], "data": "AAAAAAAAAAA="}},
    "tensor": {"$tensor": {"dtype": "float32", "shape": [2], "data": "AAAAAAAAAAA="}},
    "dtype": {"$dtype": "float32"},
    "device": {"$device": "cpu"},
    "date": {"$datetime": "2026-01-02T03:04:05"},
    "path": {"$path": "/x"},
    "pickle": {"$pickle": "gASVAgAAAAAAAABLAS4="},
    "plain": [1, 2.5, None, True, "text", {"a": []}],
}


def read_values(data: bytes) -> None:
    text = mutate.text(Input(data), VALUES)
    try:
        encoded = index.load_json(text)
    except ValueError:
        return
    with suppress(*CHECKPOINT_ERRORS):
        values.decode(encoded, name="value")
    if type(encoded) is dict:
        for path in encoded.values():
            try:
                state.decode_path(path)
            except CHECKPOINT_ERRORS:
                continue


@cache
def sound_metadata() -> tuple[bytes, ...]:
    path = place() / "stock"
    tensors = {
        "a": torch.zeros(3, 4),
        "b": torch.zeros(2, dtype=torch.bfloat16),
        "nested": {"c": torch.ones(1)},
        "n": 1,
    }
    dcp.save(tensors, storage_writer=dcp.FileSystemWriter(path), no_dist=True)
    data = (path / ".metadata").read_bytes()
    return data, pickle.dumps(pickle.loads(data), protocol=2), pickle.dumps(pickle.loads(data), protocol=0)


def read_stock_metadata(data: bytes) -> None:
    source = Input(data)
    changed = mutate.raw(source, source.choose(sound_metadata()), mutate.OPCODES)
    directory = put("dcp/.metadata", changed).parent
    try:
        stock.StockReader(str(directory)).read_metadata()
    except CHECKPOINT_ERRORS:
        return


@cache
def sound_page() -> dict[str, Any]:
    save = status_page.SaveStatus(
        *("a", 3, "0" * 32, 5, 8, "failed", "write", 1.0, 1.0, 2.0, 10, 9, 8, 1.5, None),
        stages={"plan": status_page.StageCost(0.5, 0, 2)},
        error="OSError: no",
    )
    run = status_page.RunStatus("/run", 1, 1, (save,))
    made = status_page.Page(status_page.Process.mine(), 1.0, status_page.Ring(4096, 4, 1), (run,))
    document: dict[str, Any] = json.loads(json.dumps(status_page._document(made)))
    return document


def read_status_page(data: bytes) -> None:
    path = put(f"pages/page-{'a' * 32}.json", mutate.text(Input(data), sound_page()))
    for _, found in status_page.find(str(path.parent)):
        assert found.process.pid >= 0
        assert all(one.run.startswith("/") for one in found.runs)
        json.dumps(status_page._document(found), allow_nan=False).encode()
        str([[one.run, [(save.name, save.error) for save in one.saves]] for one in found.runs]).encode()


@cache
def sound_results() -> dict[str, Any]:
    document: dict[str, Any] = json.loads(json.dumps(stall_document(2)))
    return document


def put_results(data: bytes) -> Path:
    return put("results/stall-x.json", mutate.text(Input(data), sound_results()))


def read_results(data: bytes) -> None:
    with suppress(results.ResultsError):
        results.read(put_results(data))


def draw_results(data: bytes) -> None:
    """The report leaves out what cannot be read. It takes longer than what a reader may: it draws."""
    page(Measurements.read(put_results(data).parent)).encode()


EVENTS = [
    {
        "ph": "X",
        "name": "write",
        "cat": "save",
        "ts": 1.0,
        "dur": 2.0,
        "tid": "lane 0",
        "pid": 0,
        "args": {"nbytes": 4},
    },
    {
        "ph": "X",
        "name": "vote",
        "cat": "save",
        "ts": 3.0,
        "dur": 2.0,
        "tid": "main",
        "pid": 1,
        "args": {"vote": "plan"},
    },
]


def read_trace(data: bytes) -> None:
    directory = put("traces/t.rank-00000.json", mutate.text(Input(data), EVENTS)).parent
    put("traces/t.rank-00001.json", json.dumps(EVENTS).encode())
    json.dumps(merged_trace(directory).document)


@cache
def sound_packing() -> packing.Packed:
    checkpoint = {"t": torch.zeros(2), "x": (1, {2: "y"}), "saved": complex(1, 2), "d": {"lr": 0.1, "f": torch.ones(1)}}
    return packing.pack(checkpoint)


def read_packed(data: bytes) -> None:
    sound = sound_packing()
    changed = mutate.text(Input(data), json.loads(sound.text))
    try:
        packing.unpack(changed.decode("utf-8", "replace"), sound.tensors)
    except CHECKPOINT_ERRORS:
        return


MARKER_BODY = {"version": 1, "files": {"a.bin": [3, "0" * 32]}, "checkpoints": ["weights"]}


def read_marker(data: bytes) -> None:
    source = Input(data)
    text = mutate.text(source, {"body": MARKER_BODY, "xxh128": ""})
    try:
        document = json.loads(text)
        document["xxh128"] = publication._digest_of(document["body"])
        text = json.dumps(document).encode()
    except (ValueError, TypeError, KeyError, RecursionError):
        pass
    directory = put(f"published/{publication.MARKER_NAME}", text).parent
    put("published/a.bin", b"abc")
    publication.problems(str(directory), "full")


def read_note(data: bytes) -> None:
    base = {"save_id": "0" * 32, "step": 1, "name": "a", "depth": 1}
    text = mutate.text(Input(data), {"save_id": "0" * 32, "world_size": 2, "base_path": "/a", "base": base})
    put("run/.saving-next", text)
    note = rendezvous._read(SaveTarget.of(place() / "run" / "next", None, None))
    assert note is None or (len(note.save_id) == 32 and int(note.save_id, 16) >= 0)


def read_safetensors_head(data: bytes) -> None:
    source = Input(data)
    header = mutate.text(source, {"__metadata__": {}, "a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}})
    length = source.choose((len(header), len(header) + 1, 0, 1 << 62, (1 << 64) - 1))
    path = put("weights/model.safetensors", length.to_bytes(8, "little") + header + bytes(4))
    numbered._is_whole(str(path))


TARGETS: dict[str, Callable[[bytes], None]] = {
    "manifest": read_manifest,
    "index": read_index,
    "checkpoint": open_checkpoint,
    "diagnosis": diagnose,
    "values": read_values,
    "stock_metadata": read_stock_metadata,
    "status_page": read_status_page,
    "results": read_results,
    "report": draw_results,
    "trace": read_trace,
    "packed": read_packed,
    "marker": read_marker,
    "note": read_note,
    "safetensors_head": read_safetensors_head,
}
