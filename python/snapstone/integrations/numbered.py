"""Directories that are named with a number, as trainers name checkpoints: which are complete, and which may go."""

from __future__ import annotations

import json
import logging
import os
import re
import zipfile
from collections.abc import Iterable
from contextlib import suppress
from typing import Literal

from .publication import is_published, problems, remove

__all__ = ["SENTINEL_NAME", "complete", "newest_valid", "numbered", "rotate", "what_is_wrong"]

_log = logging.getLogger("snapstone")
_WEIGHTS = re.compile(r"(model|pytorch_model|adapter_model|optimizer|scheduler).*\.(safetensors|bin|pt)")
SENTINEL_NAME = "checkpoint-is-incomplete.txt"  # of transformers' just-in-time checkpoints


def numbered(run: str, prefix: str) -> list[tuple[int, str]]:
    """(number, path) of the directories `<prefix><number>` in `run`, lowest first."""
    pattern = re.compile(re.escape(prefix) + r"(\d+)")
    found = []
    with suppress(FileNotFoundError):
        for name in os.listdir(run):
            match = pattern.fullmatch(name)
            if match and os.path.isdir(os.path.join(run, name)):
                found.append((int(match[1]), os.path.join(run, name)))
    return sorted(found)


def what_is_wrong(path: str, witness: str, level: Literal["quick", "full"]) -> list[str]:
    """Of a checkpoint of ours what does not match its marker. A stock one has no marker: there, whatever shows that its
    save did not end, or ended in part; `witness` is the file that it writes last.
    """
    if is_published(path):
        return problems(path, level)
    found = []
    if not os.path.isfile(os.path.join(path, witness)):
        found.append(f"{path} has no {witness}, which is written last")
    elif witness.endswith(".json"):
        try:
            with open(os.path.join(path, witness), encoding="utf-8") as file:
                json.load(file)
        except (ValueError, RecursionError):
            found.append(f"{path}/{witness} ends in the middle")
    if os.path.exists(os.path.join(path, SENTINEL_NAME)):
        found.append(f"{path} holds {SENTINEL_NAME}")
    for name in sorted(os.listdir(path)):
        file_path = os.path.join(path, name)
        if os.path.isfile(file_path) and _WEIGHTS.fullmatch(name) and not _is_whole(file_path):
            found.append(f"{file_path} ends in the middle")
    return found


def complete(run: str, prefix: str, witness: str) -> list[str]:
    """Complete checkpoints, lowest number first. Times of files say nothing: clocks jump, and copies have others."""
    found = []
    for _, path in numbered(run, prefix):
        with suppress(OSError):
            if not what_is_wrong(path, witness, "quick"):
                found.append(path)
    return found


def newest_valid(run: str, prefix: str, witness: str) -> str | None:
    """The one with the highest number of which every byte is what was written, as far as that is known."""
    for _, path in reversed(numbered(run, prefix)):
        wrong = what_is_wrong(path, witness, "full")
        if not wrong:
            return path
        _log.warning("%s is not used: %s", path, wrong[0])
    return None


def rotate(run: str, prefix: str, witness: str, keep: int | None, protected: Iterable[str | None]) -> list[str]:
    """Removes the oldest complete checkpoints until `keep` are left; returns those. Incomplete ones neither count nor
    go. `protected` stay and count, the one with the highest number above all. One that cannot be removed stays, with a
    warning, and no other goes in its place.
    """
    if keep is None or keep <= 0:
        return []
    found = complete(run, prefix, witness)
    kept = {os.path.realpath(path) for path in protected if path} | {os.path.realpath(path) for path in found[-1:]}
    excess = len(found) - max(keep, len(kept))
    removed: list[str] = []
    for path in [path for path in found if os.path.realpath(path) not in kept][: max(excess, 0)]:
        try:
            with suppress(FileNotFoundError):  # another job prunes the same run
                remove(path)
            removed.append(path)
        except OSError as error:
            _log.warning("%s is not removed: %s", path, error)
    return removed


def _is_whole(path: str) -> bool:
    """A file of torch.save has its directory at the end; one of safetensors says at its start how long it is."""
    if not path.endswith(".safetensors"):
        return zipfile.is_zipfile(path)
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        size = os.fstat(file.fileno()).st_size
        if not 2 <= length <= min(size, 100 << 20):
            return False
        try:
            header = json.loads(file.read(length))
            ends = [int(entry["data_offsets"][1]) for name, entry in header.items() if name != "__metadata__"]
        except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError):
            return False
    return size == 8 + length + max(ends, default=0)
