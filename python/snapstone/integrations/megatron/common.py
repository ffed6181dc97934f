"""`common.pt`: what is not sharded, where every Megatron-core from 0.16 on looks for it first.

Up to 0.18 Megatron-core writes the file before the strategy is called; 0.19 passes its content to the strategy, which
writes the file here, so that one generation reads what the other saved and no name has to be replaced for that. The
file is beside the engine's checkpoint, not in it, so the manifest holds its digest.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from typing import Any

import torch
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME

from ... import _native
from ...errors import CorruptCheckpointError
from .layout import engine_path, retire_stock
from .sharded import common_object

__all__ = ["check_common", "keep_common", "metadata_of"]

_KEY = "megatron_common_sha256"


def keep_common(sharded_state_dict: Mapping[str, Any], checkpoint_dir: str | os.PathLike[str]) -> str | None:
    """Makes the file durable, and writes it where Megatron-core did not; its digest. For rank 0. A stock checkpoint
    in the directory ends here."""
    path = os.path.join(os.fspath(checkpoint_dir), COMMON_STATE_FNAME)
    retire_stock(checkpoint_dir)
    common = common_object(sharded_state_dict)
    if common is not None:
        with open(path + ".tmp", "wb") as file:
            torch.save(common.data, file)
            file.flush()
            _native.sync_file(file.fileno(), path, "common_file")
        os.replace(path + ".tmp", path)
    if not os.path.isfile(path):
        return None  # a strategy called by itself
    with open(path, "rb") as file:
        _native.sync_file(file.fileno(), path, "common_file")
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    _native.sync_directory(os.path.dirname(path), "common_entry")
    return digest


def metadata_of(digest: str | None, version: str) -> dict[str, Any]:
    """For the manifest."""
    return {"megatron_core": version} | ({_KEY: digest} if digest else {})


def check_common(metadata: Mapping[str, Any], checkpoint_dir: str | os.PathLike[str]) -> None:
    """Raises CorruptCheckpointError unless `common.pt` is the one that was saved with these tensors."""
    expected = metadata.get(_KEY)
    if expected is None:
        return
    path = os.path.join(os.fspath(checkpoint_dir), COMMON_STATE_FNAME)
    try:
        with open(path, "rb") as file:
            actual = hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError:
        raise CorruptCheckpointError("common.pt, which was saved with the tensors, is missing", path=path) from None
    if actual != expected:
        raise CorruptCheckpointError(
            f"not the common.pt that was saved with the tensors in {engine_path(checkpoint_dir)}: damaged, or left by "
            "a later save into this directory that did not end",
            path=path,
            expected=expected,
            actual=actual,
        )
