"""`snapstone info`."""

from __future__ import annotations

import json
import os
import stat
import time
from collections.abc import Callable
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
    from ..lineage import Ancestor, Change
    from ..manifest import FileEntry

__all__ = ["info"]

Size = Callable[[int], str]

_ROWS_MAX = 20  # files and objects shown to people; --json has all
_VALUE_CHARACTERS_MAX = 100


@click.command(short_help="Show what a checkpoint holds.")
@directory_argument("ckpt")
@click.option("--tensors", is_flag=True, help="Every tensor: name, dtype, shape, shards, size, what of it changed.")
@json_option
@bytes_option
@click.pass_context
def info(ctx: click.Context, ckpt: str, tensors: bool, as_json: bool, exact: bool) -> None:
    """Shows what a checkpoint holds: facts of its manifest, metadata, files, Python values, tensors. Of a delta save
    also its base, what differed from that, and which earlier saves' files it shares.

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
    from .. import lineage
    from ..run_directory import committed_at

    manifest = checkpoint.manifest
    names = checkpoint.keys()
    change = lineage.change(checkpoint.reader.indexes) if manifest.base else None
    document: dict[str, Any] = {
        "path": checkpoint.path,
        "step": checkpoint.step,
        "save_id": checkpoint.save_id,
        "format_version": ".".join(map(str, checkpoint.format_version)),
        "world_size": checkpoint.world_size,
        "nbytes": checkpoint.nbytes,
        "stored_bytes": checkpoint.own_nbytes,
        "shared_bytes": checkpoint.shared_nbytes,
        "base": manifest.base.to_json() if manifest.base else None,
        "changed": _changed(change),
        "chain": [_ancestor(one) for one in lineage.ancestors(manifest, checkpoint.reader.indexes)],
        "committed_at": utc(committed_at(checkpoint.path)),
        "metadata": {key: json_value(value) for key, value in manifest.metadata.items()},
        "environment": {key: json_value(value) for key, value in manifest.environment.items()},
        "files": _files(checkpoint),
        "objects": {name: json_value(value) for name, (_, value) in checkpoint.reader.objects(0).items()},
        "tensor_count": len(names),
    }
    if tensors:
        document["tensors"] = [_tensor(checkpoint, name, change) for name in names]
    return document


def _changed(change: Change | None) -> dict[str, Any] | None:
    if change is None:
        return None
    return {"tensors": change.tensors, "nbytes": change.changed_bytes, "share": round(change.share, 6)}


def _ancestor(one: Ancestor) -> dict[str, Any]:
    return {
        "save_id": one.save_id,
        "files": one.files,
        "nbytes": one.nbytes,
        "used_bytes": one.used_bytes,
        "live_fraction": round(one.live_fraction, 6),
    }


def _files(checkpoint: Checkpoint) -> list[dict[str, Any]]:
    manifest = checkpoint.manifest
    entries: list[tuple[str, int | None, FileEntry]] = []
    for writer in manifest.writers:
        entries += [("index", writer.rank, writer.index), *(("data", writer.rank, entry) for entry in writer.data)]
    entries += [("shared", None, entry) for entry in manifest.shared]
    return [
        {
            "name": entry.name,
            "kind": kind,
            "rank": rank,
            "nbytes": entry.nbytes,
            "xxh128": entry.xxh128,
            "state": _file_state(os.path.join(checkpoint.path, entry.name), entry.nbytes),
        }
        for kind, rank, entry in entries
    ]


def _file_state(path: str, nbytes: int) -> str:
    try:
        facts = os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return "missing"
    if not stat.S_ISREG(facts.st_mode):
        return "not a file"
    return "ok" if facts.st_size == nbytes else "wrong size"


def _tensor(checkpoint: Checkpoint, name: str, change: Change | None) -> dict[str, Any]:
    item = checkpoint.describe(name)
    nbytes = checkpoint.get_slice(name).nbytes
    return {
        "name": name,
        "dtype": item.dtype,
        "shape": item.shape,
        "shards": len(checkpoint.reader.shards[name]),
        "nbytes": nbytes,
        "changed_bytes": None if change is None else change.by_tensor.get(name, 0),
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
            *_origin(document, size),
        ]
    )
    for what in ("metadata", "environment"):
        if document[what]:
            emit(f"\n{what}")
            emit_facts([(f"  {key}", _compact(value)) for key, value in document[what].items()])
    if document["chain"]:
        emit("")
        _show_chain(document["chain"], size)
    emit("")
    files = [
        [file["name"], "-" if file["rank"] is None else str(file["rank"]), size(file["nbytes"]), file["state"]]
        for file in document["files"]
    ]
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
        _show_tensors(document, size)


def _origin(document: dict[str, Any], size: Size) -> list[tuple[str, str]]:
    """Where the bytes come from."""
    own = size(document["stored_bytes"])
    base, changed = document["base"], document["changed"]
    if base is None and not document["chain"]:
        return [("on disk", own)]
    facts = [("on disk", f"{own} own, {size(document['shared_bytes'])} shared with earlier saves")]
    if base is not None:
        step = "" if base["step"] is None else f"step {base['step']}, "
        facts.append(("base", f"{base['name']} ({step}save id {base['save_id']})"))
        facts.append(("depth", f"{base['depth']} since the last full save"))
    if changed is not None:
        tensors = f"{changed['tensors']} of {document['tensor_count']} tensors"
        facts.append(("changed", f"{tensors}, {size(changed['nbytes'])} ({changed['share']:.1%})"))
    return facts


def _show_chain(chain: list[dict[str, Any]], size: Size) -> None:
    rows = [
        [
            one["save_id"] or "-",
            str(one["files"]),
            size(one["nbytes"]),
            size(one["used_bytes"]),
            f"{one['live_fraction']:.0%}",
        ]
        for one in chain
    ]
    headers = ["shared with save", "files", "size", "used", "live"]
    emit_table(headers, rows, right=headers[1:])


def _show_tensors(document: dict[str, Any], size: Size) -> None:
    headers = ["tensor", "dtype", "shape", "shards", "size"]
    rows = [
        [one["name"], one["dtype"], str(list(one["shape"])), str(one["shards"]), size(one["nbytes"])]
        for one in document["tensors"]
    ]
    if document["changed"] is not None:
        headers.append("changed")
        for row, one in zip(rows, document["tensors"], strict=True):
            row.append(size(one["changed_bytes"]))
    emit_table(headers, rows, right=("shards", "size", "changed"))


def _committed(document: dict[str, Any]) -> str:
    from ..run_directory import committed_at

    written = committed_at(document["path"])
    return "-" if written is None else f"{utc(written)} ({human_age(time.time() - written)} ago)"


def _more(count: int) -> None:
    if count > _ROWS_MAX:
        emit(f"... and {count - _ROWS_MAX} more (--json shows all)")


def _compact(value: Any) -> str:
    return shortened(json.dumps(value, ensure_ascii=False), _VALUE_CHARACTERS_MAX)
