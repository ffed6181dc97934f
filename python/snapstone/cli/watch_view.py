"""What `snapstone watch` shows of an observation: facts, the ranks of saves in flight, and what is wrong."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from .output import emit, emit_facts, emit_table, human_age, printable, shortened, utc

if TYPE_CHECKING:
    from rich.console import RenderableType

    from ..status_page import SaveStatus
    from ..watch import Observation, SaveInFlight

__all__ = ["document", "print_frame", "renderable"]

_RANKS_SHOWN = 16
_PROBLEMS_SHOWN = 8
_HEADERS = ("rank", "written", "of", "state")
_STAGE_HEADERS = ("rank", "stage", "for", "staged", "per second", "written", "per second", "of")
_Size = Callable[[int], str]


def document(seen: Observation, run: str) -> dict[str, Any]:
    """The observation as JSON. `docs/cli.md` explains the keys."""
    last = seen.last
    return {
        "path": run,
        "at": utc(seen.at),
        "checkpoints": len(seen.sound),
        "last_durable": None
        if last is None
        else {
            "name": last.name,
            "path": last.path,
            "step": last.step,
            "age_seconds": _rounded(seen.age_seconds),
            "committed_at": utc(last.committed_at),
            "nbytes": last.nbytes,
            "stored_bytes": last.stored_bytes,
            "world_size": last.world_size,
        },
        "cadence_seconds": _rounded(seen.cadence_seconds),
        "cadence_steps": seen.cadence_steps,
        "next_in_seconds": _rounded(seen.next_in_seconds),
        "saves": [_save(seen, save) for save in seen.saves],
        "processes": [
            {
                "host": one.host,
                "pid": one.pid,
                "state": one.state,
                "ring_bytes": one.ring.nbytes,
                "ring_used_bytes": one.ring.used_bytes,
                "committed": one.committed,
                "failed": one.failed,
            }
            for one in seen.processes.all
        ],
        "ranks": [_rank(seen, save) for save in seen.processes.saving],
        "errors": [
            {
                "rank": one.rank,
                "name": one.name,
                "step": one.step,
                "stage": one.stage,
                "at": utc(one.at),
                "error": one.error,
            }
            for one in seen.processes.troubles
        ],
        "leftovers": [
            {"name": one.name, "kind": one.kind, "state": one.state, "age_seconds": _rounded(max(0.0, one.age_seconds))}
            for one in seen.leftovers
        ],
        "free_bytes": seen.free_bytes,
        "total_bytes": seen.total_bytes,
        "room_for": seen.room_for,
        "exhausted_in_seconds": _rounded(seen.exhausted_in_seconds),
        "problems": seen.problems,
    }


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 3)


def _save(seen: Observation, save: SaveInFlight) -> dict[str, Any]:
    return {
        "name": save.name,
        "state": save.state,
        "stage": save.stage,
        "age_seconds": _rounded(save.age_seconds(seen.at)),
        "written_bytes": save.written_bytes,
        "size_bytes": save.size_bytes,
        "bytes_per_second": None if save.bytes_per_second is None else round(save.bytes_per_second),
        "remaining_seconds": _rounded(save.remaining_seconds),
        "ranks": [one._asdict() for one in save.ranks],
    }


def _rank(seen: Observation, save: SaveStatus) -> dict[str, Any]:
    return {
        "rank": save.rank,
        "world_size": save.world_size,
        "name": save.name,
        "step": save.step,
        "stage": save.stage,
        "stage_seconds": _rounded(max(0.0, seen.at - save.stage_begun_at)),
        "age_seconds": _rounded(max(0.0, seen.at - save.begun_at)),
        "size_bytes": save.size_bytes,
        "staged_bytes": save.staged_bytes,
        "staged_bytes_per_second": _whole(save.staged_bytes_per_second),
        "written_bytes": save.written_bytes,
        "written_bytes_per_second": _whole(save.written_bytes_per_second),
        "stages": {
            name: {"seconds": _rounded(cost.seconds), "bytes": cost.nbytes, "count": cost.count}
            for name, cost in save.stages.items()
        },
    }


def _whole(rate: float | None) -> int | None:
    return None if rate is None else round(rate)


def print_frame(seen: Observation, run: str, size: _Size) -> None:
    """As plain text on stdout."""
    emit_facts(_facts(seen, run, size))
    for save in seen.saves:
        if save.ranks:
            emit_table(_HEADERS, list(_rank_rows(save, size)), right=("rank", "written", "of"))
    if seen.processes.saving:
        emit_table(_STAGE_HEADERS, list(_stage_rows(seen, size)), right=("rank", *_STAGE_HEADERS[2:]))
    for problem in _problems(seen):
        emit(printable(problem))


def renderable(seen: Observation, run: str, size: _Size) -> RenderableType:
    """For `rich.live.Live`. Every text has been escaped: none of it is markup."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    facts = Table.grid(padding=(0, 2))
    for what, value in _facts(seen, run, size):
        facts.add_row(Text(printable(what), style="bold"), Text(printable(value), style=_style(what, value)))
    parts: list[RenderableType] = [facts]
    for save in seen.saves:
        ranks = Table(*_HEADERS, box=None, pad_edge=False)
        for row in _rank_rows(save, size):
            ranks.add_row(*map(Text, row))
        if save.ranks:
            parts += [Text(), ranks]
    if seen.processes.saving:
        stages = Table(*_STAGE_HEADERS, box=None, pad_edge=False)
        for row in _stage_rows(seen, size):
            stages.add_row(*map(Text, row))
        parts += [Text(), stages]
    parts += [Text(printable(problem), style="bold red") for problem in _problems(seen)]
    return Group(*parts)


def _style(what: str, value: str) -> str:
    if what in ("damaged", "error") or "overdue" in value:
        return "bold red"
    return "cyan" if what.startswith("saving") else ""


def _facts(seen: Observation, run: str, size: _Size) -> Iterator[tuple[str, str]]:
    yield "run", run
    last, age = seen.last, seen.age_seconds
    if last is None or age is None:
        yield "last durable", "none"
    else:
        step = "" if last.step is None else f"step {last.step}, "
        sizes = [size(last.nbytes or 0), size(last.stored_bytes or 0)]
        stored = "" if sizes[0] == sizes[1] else f" ({sizes[1]} written)"
        yield "last durable", f"{last.name}: {step}{human_age(age)} ago, {sizes[0]}{stored}"
    yield "checkpoints", str(len(seen.sound))
    if (cadence := seen.cadence_seconds) is not None:
        steps = "" if seen.cadence_steps is None else f", {seen.cadence_steps:g} steps"
        yield "cadence", f"every {_duration(cadence)}{steps}"
        yield "next", _next(seen.next_in_seconds or 0.0, cadence)
    for save in seen.saves:
        yield "saving", _in_flight(seen, save, size)
    yield from _process_facts(seen, size)
    for one in seen.leftovers:
        what = "unfinished save" if one.kind == "staging" else "replaced or discarded checkpoint"
        yield "leftover", f"{one.name}: {what}, {one.state}, {human_age(one.age_seconds)} old"
    yield "free space", f"{size(seen.free_bytes)} of {size(seen.total_bytes)}{_room(seen)}"
    if damaged := len(seen.checkpoints) - len(seen.sound):
        yield "damaged", str(damaged)


def _process_facts(seen: Observation, size: _Size) -> Iterator[tuple[str, str]]:
    processes = seen.processes
    if processes.living:
        ranks = f" of {processes.world_size} ranks" if processes.world_size > len(processes.living) else ""
        used = f"{size(processes.ring_used_bytes)} of {size(processes.ring_bytes)} in use"
        yield "processes", f"{len(processes.living)}{ranks} on this machine; staging memory: {used}"
    for one in processes.troubles[:_PROBLEMS_SHOWN]:
        step = "" if one.step is None else f" (step {one.step})"
        ago = human_age(max(0.0, seen.at - one.at))
        yield "error", shortened(f"rank {one.rank}, {one.name}{step}, in {one.stage}, {ago} ago: {one.error}", 400)
    if hidden := processes.troubles[_PROBLEMS_SHOWN:]:
        yield "error", f"of {len(hidden)} more ranks"


def _next(left: float, cadence: float) -> str:
    if left >= 0:
        return f"in about {_duration(left)}"
    return f"overdue by {_duration(-left)}" if -left > cadence else f"due {_duration(-left)} ago"


def _duration(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 10 else human_age(seconds)


def _room(seen: Observation) -> str:
    if (count := seen.room_for) is None:
        return ""
    gone = "" if seen.exhausted_in_seconds is None else f", full in {human_age(seen.exhausted_in_seconds)}"
    return f"; room for {count} more{gone}"


def _in_flight(seen: Observation, save: SaveInFlight, size: _Size) -> str:
    if not save.readable:
        return f"{save.name}: {save.state}; its files belong to another user"
    age = save.age_seconds(seen.at)
    grows = save.stage == "writing" and save.written_bytes == save.size_bytes  # nobody has said how large it will be
    parts = [save.stage, size(save.written_bytes) + (" so far" if grows else f" of {size(save.size_bytes)}")]
    parts += [] if age is None else [f"for {_duration(age)}"]
    parts += [] if not save.bytes_per_second else [f"{size(round(save.bytes_per_second))}/s"]
    parts += [] if save.remaining_seconds is None else [f"{_duration(save.remaining_seconds)} left"]
    return ", ".join(parts) + ("" if save.state == "live" else f" ({save.state})")


def _rank_rows(save: SaveInFlight, size: _Size) -> Iterator[list[str]]:
    """Ranks that are behind first: they are what a save waits for."""
    ranks = sorted(save.ranks, key=lambda one: (one.done, one.written_bytes - one.size_bytes, one.rank))
    for one in ranks[:_RANKS_SHOWN]:
        yield [str(one.rank), size(one.written_bytes), size(one.size_bytes), "written" if one.done else "writing"]
    if hidden := ranks[_RANKS_SHOWN:]:
        yield [f"{len(hidden)} more", size(sum(one.written_bytes for one in hidden)), "", ""]


def _stage_rows(seen: Observation, size: _Size) -> Iterator[list[str]]:
    """What the processes say. Ranks that have written least first."""
    saves = sorted(seen.processes.saving, key=lambda save: (save.written_bytes - save.size_bytes, save.rank))
    for save in saves[:_RANKS_SHOWN]:
        rates = [
            "" if rate is None else size(round(rate))
            for rate in (save.staged_bytes_per_second, save.written_bytes_per_second)
        ]
        yield [
            str(save.rank),
            printable(save.stage),
            _duration(max(0.0, seen.at - save.stage_begun_at)),
            size(save.staged_bytes),
            rates[0],
            size(save.written_bytes),
            rates[1],
            size(save.size_bytes),
        ]
    if hidden := saves[_RANKS_SHOWN:]:
        yield [f"{len(hidden)} more", *[""] * (len(_STAGE_HEADERS) - 1)]


def _problems(seen: Observation) -> Iterator[str]:
    for problem in seen.problems[:_PROBLEMS_SHOWN]:
        yield shortened(problem, 400)
    if len(seen.problems) > _PROBLEMS_SHOWN:
        yield f"and {len(seen.problems) - _PROBLEMS_SHOWN} more problems; snapstone ls names them"
