"""`snapstone info`."""

from __future__ import annotations

import json
import os
import stat
import time
from typing import TYPE_CHECKING, Any

import click

from .argument import directory_argument
from .exit_codes import ExitCode
from .output import (
    bytes_option,
    emit,
    emit_facts,
    emit_json,
    emit_table,
    human_age,
    json_option,
    json_value,
    shortened,
    size_format,
    utc,
)

if TYPE_CHECKING:
    from .. import Checkpoint

__all__ = ["info"]

_ROWS_MAX = 20  # files and objects shown to people; --json has all
_VALUE_CHARACTERS_MAX = 100


@click.command(short_help="Show what a checkpoint holds.")
@directory_argument("ckpt")
@click.option("--tensors", is_flag=True, help="Every tensor: name, dtype, shape, number of shards, size.")
@json_option
@bytes_option
@click.pass_context
def info(ctx: click.Context, ckpt: str, tensors: bool, as_json: bool, exact: bool) -> None:
    """Shows what a checkpoint holds: facts of its manifest, metadata, files, Python values, tensors.

    Manifest and indexes are checked; payload is not read. Python values are shown as stored, in the typed JSON of the
    format, as rank 0 sees them.

    \b
    Examples:
      snapstone info runs/gpt/step-00001000
      snapstone info runs/gpt/step-00001000 --tensors | grep attn
      snapstone info runs/gpt/step-00001000 --json | jq .metadata

    Exits with 1 when the checkpoint is damaged or a file of it is missing.
    """
    from .. import Checkpoint

    checkpoint = Checkpoint.open(ckpt)
    document = _document(checkpoint, tensors)
    if as_json:
        emit_json("info", document)
    else:
        _show(document, exact)
    ctx.exit(ExitCode.OK if all(file["state"] == "ok" for file in document["files"]) else ExitCode.FINDING)


def _document(checkpoint: Checkpoint, tensors: bool) -> dict[str, Any]:
    from .run_directory import committed_at

    manifest = checkpoint.manifest
    names = checkpoint.keys()
    document: dict[str, Any] = {
        "path": checkpoint.path,
        "step": checkpoint.step,
        "save_id": checkpoint.save_id,
        "format_version": ".".join(map(str, checkpoint.format_version)),
        "world_size": checkpoint.world_size,
        "nbytes": checkpoint.nbytes,
        "stored_bytes": checkpoint.own_nbytes,
        "committed_at": utc(committed_at(checkpoint.path)),
        "metadata": {key: json_value(value) for key, value in manifest.metadata.items()},
        "environment": {key: json_value(value) for key, value in manifest.environment.items()},
        "files": _files(checkpoint),
        "objects": {name: json_value(value) for name, (_, value) in checkpoint.reader.objects(0).items()},
        "tensor_count": len(names),
    }
    if tensors:
        document["tensors"] = [_tensor(checkpoint, name) for name in names]
    return document


def _files(checkpoint: Checkpoint) -> list[dict[str, Any]]:
    return [
        {
            "name": entry.name,
            "kind": kind,
            "rank": writer.rank,
            "nbytes": entry.nbytes,
            "xxh128": entry.xxh128,
            "state": _file_state(os.path.join(checkpoint.path, entry.name), entry.nbytes),
        }
        for writer in checkpoint.manifest.writers
        for kind, entries in (("index", (writer.index,)), ("data", writer.data))
        for entry in entries
    ]


def _file_state(path: str, nbytes: int) -> str:
    try:
        facts = os.lstat(path)
    except FileNotFoundError:
        return "missing"
    if not stat.S_ISREG(facts.st_mode):
        return "not a file"
    return "ok" if facts.st_size == nbytes else "wrong size"


def _tensor(checkpoint: Checkpoint, name: str) -> dict[str, Any]:
    item = checkpoint.describe(name)
    return {
        "name": name,
        "dtype": item.dtype,
        "shape": item.shape,
        "shards": len(checkpoint.reader.shards[name]),
        "nbytes": checkpoint.get_slice(name).nbytes,
    }


def _show(document: dict[str, Any], exact: bool) -> None:
    size = size_format(exact)
    emit_facts(
        [
            ("path", document["path"]),
            ("step", "-" if document["step"] is None else str(document["step"])),
            ("committed", _committed(document)),
            ("save id", document["save_id"]),
            ("format", document["format_version"]),
            ("world size", str(document["world_size"])),
            ("tensors", f"{document['tensor_count']}, {size(document['nbytes'])}"),
            ("objects", str(len(document["objects"]))),
            ("on disk", size(document["stored_bytes"])),
        ]
    )
    for what in ("metadata", "environment"):
        if document[what]:
            emit(f"\n{what}")
            emit_facts([(f"  {key}", _compact(value)) for key, value in document[what].items()])
    emit("")
    files = [[file["name"], str(file["rank"]), size(file["nbytes"]), file["state"]] for file in document["files"]]
    # A damaged file must not hide behind the limit.
    files.sort(key=lambda row: row[-1] == "ok")
    emit_table(["file", "rank", "size", "state"], files[:_ROWS_MAX], right=("rank", "size"))
    _more(len(files))
    if document["objects"]:
        emit("")
        rows = [[name, _compact(value)] for name, value in document["objects"].items()]
        emit_table(["object", "value"], rows[:_ROWS_MAX])
        _more(len(rows))
    if document.get("tensors"):
        emit("")
        rows = [
            [one["name"], one["dtype"], str(list(one["shape"])), str(one["shards"]), size(one["nbytes"])]
            for one in document["tensors"]
        ]
        emit_table(["tensor", "dtype", "shape", "shards", "size"], rows, right=("shards", "size"))


def _committed(document: dict[str, Any]) -> str:
    from .run_directory import committed_at

    written = committed_at(document["path"])
    return "-" if written is None else f"{utc(written)} ({human_age(time.time() - written)} ago)"


def _more(count: int) -> None:
    if count > _ROWS_MAX:
        emit(f"... and {count - _ROWS_MAX} more (--json shows all)")


def _compact(value: Any) -> str:
    return shortened(json.dumps(value, ensure_ascii=False), _VALUE_CHARACTERS_MAX)
