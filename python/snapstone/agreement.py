"""What the ranks of a save agree on before bytes move: who writes which shard."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from . import plan
from .collective import Channel, Deadline
from .errors import RankFailedError
from .plan import TensorItem

__all__ = ["assign"]


def assign(channel: Channel, deadline: Deadline, items: Sequence[TensorItem], ties: list[int]) -> tuple[list[int], int]:
    """Which of its items this rank writes, and the bytes of all ranks' tensors together."""
    error: BaseException | None = None
    gathered: list[bytes] | None = None
    answer = b""
    try:
        gathered = channel.gather("items", _json([items, ties]), deadline, "assign")
    except RankFailedError as failure:
        error = failure  # only rank 0 knows who is missing: the vote tells
    if gathered is not None:
        try:
            answer = _json(_assign_all([json.loads(one) for one in gathered]))
        except BaseException as failure:
            error = failure
    document = json.loads(channel.vote("assign", error, answer, deadline)[0])
    return document["chosen"][channel.group.rank], document["nbytes"]


def _assign_all(documents: Sequence[Any]) -> dict[str, Any]:
    ranks = [[_item(row) for row in rows] for rows, _ in documents]
    chosen = plan.assign_writers(ranks, [ties for _, ties in documents])
    written = [ranks[rank][position] for rank, positions in enumerate(chosen) for position in positions]
    plan.check_tiling(written)
    return {"chosen": chosen, "nbytes": sum(item.nbytes for item in written)}


def _item(row: list[Any]) -> TensorItem:
    name, dtype, shape, offsets, sizes, nbytes = row
    return TensorItem(name, dtype, tuple(shape), tuple(offsets), tuple(sizes), nbytes)


def _json(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()
