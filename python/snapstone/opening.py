"""A checkpoint opened by a group of ranks: each reads some of the indexes, and tells the others what stands in them."""

from __future__ import annotations

import json
import struct
from collections.abc import Container
from itertools import accumulate, pairwise
from typing import Any

import numpy as np

from . import garbage, manifest
from .catalog import KEY_BYTES, Catalog, Columns
from .collective import Channel, Deadline, Group
from .errors import CorruptCheckpointError, RankFailedError
from .fabric import Fabric
from .index import Index
from .index_file import open_index
from .manifest import Manifest
from .reader import Reader
from .trace import Trace
from .voting import together

__all__ = ["VOTES", "decode_indexes", "encode_indexes", "open_together"]

VOTES = ("open", "indexes", "gathered")
SHARED_FROM = 8  # writers; fewer indexes are faster read than exchanged
_LENGTHS = struct.Struct("<QQQ")  # header, numbers, table


def open_together(
    path: str, group: Group, channel: Channel, fabric: Fabric, deadline: Deadline, trace: Trace
) -> Reader:
    """A reader of the same checkpoint on every rank. Every rank of the group calls.

    Raises what `Reader` raises on the rank where it happens, RankFailedError on the others.
    """

    opened: list[Any] = []

    def open_manifest() -> bytes:
        opened.append(manifest.read(path))
        return str(opened[0].save_id).encode()

    if len(set(together(channel, "open", deadline, trace, open_manifest))) > 1:
        raise CorruptCheckpointError("ranks read different checkpoints under one name", path=path)
    document: Manifest = opened[0]
    if group.world_size == 1 or len(document.writers) < SHARED_FROM:
        with garbage.paused():
            return Reader(path, document)
    mine: list[Index] = []

    def read_some() -> bytes:
        with garbage.paused():
            mine.extend(
                open_index(path, document, writer) for writer in document.writers[group.rank :: group.world_size]
            )
            return b"".join(Columns.of(one).key for one in mine)

    votes = together(channel, "indexes", deadline, trace, read_some)
    keys = [{vote[at : at + KEY_BYTES] for at in range(0, len(vote), KEY_BYTES)} for vote in votes]
    told_before: set[bytes] = set().union(*keys[: group.rank])
    indexes: list[Any] = [None] * len(document.writers)
    columns: list[Any] = [None] * len(document.writers)
    gathered: list[bytes] = []

    def gather() -> bytes:
        """Empty, or why not: a collective cannot tell which rank broke it, but that one will be missing in the vote."""
        try:
            gathered.extend(fabric.all_gather(encode_indexes(mine, told_before), deadline))
        except RankFailedError as failure:
            return str(failure).encode()
        return b""

    for rank, reason in enumerate(together(channel, "gathered", deadline, trace, gather)):
        if reason:
            raise RankFailedError(f"rank {group.ranks[rank]}: {reason.decode()}", path=path)
    with garbage.paused():
        blocks: dict[bytes, str] = {}
        for rank, data in enumerate(gathered):
            indexes[rank :: group.world_size], columns[rank :: group.world_size] = decode_indexes(data, blocks)
        return Reader(path, document, indexes, Catalog(path, columns))


def encode_indexes(indexes: list[Index], told_before: Container[bytes]) -> bytes:
    """What `decode_indexes` of another rank takes, which has the blocks of the keys in `told_before` already."""
    parts = []
    told = set()
    for parsed in indexes:
        columns = Columns.of(parsed)
        block = None if columns.key in told_before or columns.key in told else columns.block
        told.add(columns.key)
        facts = (parsed.save_id, parsed.rank, parsed.world_size, parsed.files, parsed.chunk_bytes, parsed.references)
        header = json.dumps([columns.key.hex(), block, facts, parsed.objects], separators=(",", ":")).encode()
        numbers = columns.numbers.tobytes()
        parts += [_LENGTHS.pack(len(header), len(numbers), len(parsed.table)), header, numbers, parsed.table]
    return b"".join(parts)


def decode_indexes(data: bytes, blocks: dict[bytes, str]) -> tuple[list[Index], list[Columns]]:
    """`blocks` are those of the ranks before; new ones are added."""
    indexes, columns = [], []
    at = 0
    while at < len(data):
        lengths = _LENGTHS.unpack_from(data, at)
        borders = pairwise(accumulate(lengths, initial=at + _LENGTHS.size))
        header, numbers, table = (data[begin:end] for begin, end in borders)
        at += _LENGTHS.size + sum(lengths)
        key, block, facts, objects = json.loads(header)
        save_id, rank, world_size, files, chunk_bytes, references = facts
        block = blocks.setdefault(bytes.fromhex(key), block)
        columns.append(Columns(bytes.fromhex(key), block, np.frombuffer(numbers, np.int64)))
        indexes.append(Index(save_id, rank, world_size, tuple(files), chunk_bytes, (), objects, table, references))
    return indexes, columns
