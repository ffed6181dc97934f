"""A checkpoint directory as the dictionary that Lightning expects of a file.

    one process saves for all   the text of `packing` under "lightning"; every tensor under the name of its place
    each rank saves its shards  "state_dict" and "optimizer_N" as leaves of their own, keyed by names of parameters; the
                                rest as a text under "lightning_sharded", which may differ from rank to rank

Read back as a dictionary the second is what Lightning would have had in a single file: tensors are whole, parameters
of optimizers are numbered.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch

import snapstone as ss

from ...errors import IncompatibleCheckpointError
from ...run_directory import is_checkpoint
from ..packing import pack, unpack

__all__ = ["STATE_DICT", "export", "is_directory", "optimizer_key", "packed_state", "read", "rest_of", "unpacked_rest"]

STATE_DICT = "state_dict"
_PACKED = "lightning"
_SHARDED = "lightning_sharded"
_TENSORS = "lightning_tensors"
_OPTIMIZER = "optimizer_"
_EMBED_BYTES = 1 << 20

Path = str | os.PathLike[str]


def is_directory(path: Path) -> bool:
    """Whether the engine wrote what is at `path`."""
    return os.path.isdir(path) and is_checkpoint(os.fspath(path))


def optimizer_key(index: int) -> str:
    return f"{_OPTIMIZER}{index}"


def packed_state(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """What one process saves for all."""
    packed = pack(checkpoint, taken=(_PACKED,))
    return {**packed.tensors, _PACKED: packed.text}


def rest_of(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """What a rank saves besides its shards. Tensors above 1 MiB are stored once, as one of the ranks has them."""
    packed = pack(checkpoint, embed_bytes=_EMBED_BYTES)
    return {_SHARDED: packed.text, _TENSORS: packed.tensors}


def unpacked_rest(opened: ss.Checkpoint, *, weights_only: bool, rank: int) -> dict[str, Any]:
    """The inverse of `rest_of`, as `rank` saved it. For a checkpoint that one process saved: all but the tensors.

    Raises:
        IncompatibleCheckpointError: a checkpoint of something else; a value that needs weights_only=False.
    """
    head = f"{_TENSORS}."
    tensors = opened.load_tensors([name for name in opened.keys() if name.startswith(head)])  # noqa: SIM118 # no dict
    named = {name.removeprefix(head): tensor for name, tensor in tensors.items()}
    return unpack(_text(opened, _SHARDED, rank), named, weights_only=weights_only)


def _text(opened: ss.Checkpoint, key: str, rank: int = 0) -> str:
    text = opened.objects(rank).get(key)
    if not isinstance(text, str):
        raise IncompatibleCheckpointError(f"{opened.path}: not a checkpoint of Lightning", path=opened.path)
    return text


def read(path: Path, *, weights_only: bool = True, device: str | torch.device = "cpu") -> dict[str, Any]:
    """The dictionary that a file of Lightning would hold, whole, in this process alone.

    Args:
        weights_only: refuse values that need pickle, as `torch.load` does.

    Raises:
        CheckpointError: as from `snapstone.load`. IncompatibleCheckpointError: not a checkpoint of Lightning.
    """
    opened = ss.Checkpoint.open(path, device=device)
    if _SHARDED not in opened.objects():
        return unpack(_text(opened, _PACKED), opened.load_tensors(), weights_only=weights_only)
    state = opened.state_dict()
    checkpoint = {**unpacked_rest(opened, weights_only=weights_only, rank=0), STATE_DICT: state.get(STATE_DICT, {})}
    optimizers = [state[key] for key in map(optimizer_key, range(len(state))) if key in state]
    if optimizers:
        checkpoint["optimizer_states"] = [_numbered(one) for one in optimizers]
    return checkpoint


def _numbered(optimizer: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters of a state dictionary by number instead of by name, as optimizers have them."""
    groups = optimizer["param_groups"]
    names = [name for group in groups for name in group["params"]]
    numbers = {name: number for number, name in enumerate(names)}
    return {
        "state": {numbers[name]: entry for name, entry in optimizer.get("state", {}).items()},
        "param_groups": [{**group, "params": [numbers[name] for name in group["params"]]} for group in groups],
    }


def export(path: Path, file: Path, *, weights_only: bool = True) -> None:
    """Writes the checkpoint at `path` as a single file that stock Lightning loads, with every strategy."""
    torch.save(read(path, weights_only=weights_only), file)
