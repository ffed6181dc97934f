"""One step of an operation on every rank: all succeed, or all fail."""

from __future__ import annotations

from collections.abc import Callable

from .collective import Channel, Deadline
from .trace import Trace

__all__ = ["together"]


def together(
    channel: Channel, label: str, deadline: Deadline, trace: Trace, step: Callable[[], bytes | None]
) -> list[bytes]:
    """Runs `step` and votes on it: what it returned on each rank, in rank order. A rank where it raised raises that,
    the others RankFailedError.
    """
    error: BaseException | None = None
    payload: bytes | None = None
    try:
        payload = step()
    except BaseException as failure:
        error = failure
    with trace.span("vote"):
        return channel.vote(label, error, payload or b"", deadline)
