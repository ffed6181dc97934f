"""One Chrome trace, which Perfetto opens, of the traces of all ranks and the time lines of results.

A file that SNAPSTONE_TRACE named, `NAME.rank-00000.json` for each of several ranks or `NAME.json` alone, is an array of
events: those of one NAME become one group of processes, one per rank, on one clock. The time line of each engine of
each result document becomes a group of its own. Every group begins at zero.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .clocks import Alignment, aligned
from .documents import Measurement, Measurements
from .engines import engines_of
from .fields import Fields
from .save_timeline import spans_of

__all__ = ["MergedTrace", "merged_trace"]

_RANK_FILE = re.compile(r"(?P<name>.+)\.rank-(?P<rank>\d+)\.json")

# Requests in flight overlap: they get rows of their own, beside those of their lane.
_IN_FLIGHT = frozenset({"write", "read"})


@dataclass(frozen=True)
class _Event:
    """Times are microseconds on the clock of its rank."""

    name: str
    thread: str
    begin: float
    duration: float
    arguments: dict[str, Any]

    @property
    def end(self) -> float:
        return self.begin + self.duration


@dataclass
class _Group:
    """Processes that share a clock once it is aligned: the events of each rank."""

    title: str
    ranks: dict[int, list[_Event]] = field(default_factory=dict)
    clocks: dict[int, Alignment] = field(default_factory=dict)


@dataclass(frozen=True)
class MergedTrace:
    """`document` is the file for Perfetto; `clocks` says for each trace and rank how its clock was moved; `skipped`
    which files could not be read and why.
    """

    document: dict[str, Any]
    event_count: int
    clocks: dict[str, dict[int, Alignment]]
    skipped: list[str]


def merged_trace(directory: str | os.PathLike[str]) -> MergedTrace:
    """Reads every trace and every result directly in `directory`. Raises OSError when it cannot be listed."""
    skipped: list[str] = []
    groups = _traces(Path(directory), skipped)
    for group in groups:
        votes = {rank: [e.end for e in events if e.name == "vote"] for rank, events in group.ranks.items()}
        group.clocks = aligned(votes)
    measurements = Measurements.read(directory)
    skipped += measurements.skipped
    clocks = {group.title: group.clocks for group in groups}
    groups += [group for one in measurements.of_kind("stall") for group in _timelines(one)]
    events = list(_chrome_events(groups))
    document = {
        "traceEvents": events,
        "displayTimeUnit": "ms",
        "otherData": {"clocks": {title: _described(ranks) for title, ranks in clocks.items()}, "skipped": skipped},
    }
    return MergedTrace(document, sum(event["ph"] == "X" for event in events), clocks, skipped)


def _described(clocks: dict[int, Alignment]) -> dict[str, dict[str, float]]:
    return {
        f"rank {rank}": {"offset_us": one.offset, "votes": one.votes, "spread_us": one.spread}
        for rank, one in sorted(clocks.items())
    }


def _traces(directory: Path, skipped: list[str]) -> list[_Group]:
    groups: dict[str, _Group] = {}
    for name in sorted(os.listdir(directory)):
        path = directory / name
        if not name.endswith(".json") or not path.is_file():
            continue
        matched = _RANK_FILE.fullmatch(name)
        try:
            found = _read(path, needed=matched is not None)
        except (OSError, ValueError, RecursionError) as error:
            skipped.append(f"{path}: {getattr(error, 'strerror', None) or error}")
            continue
        title = matched["name"] if matched else name.removesuffix(".json")
        for rank, event in found:
            group = groups.setdefault(title, _Group(title))
            group.ranks.setdefault(int(matched["rank"]) if matched else rank, []).append(event)
    return list(groups.values())


def _read(path: Path, needed: bool) -> list[tuple[int, _Event]]:
    """The events of a trace with their ranks. Another JSON file is none, which is wrong only where one is `needed`."""
    try:
        document = json.loads(path.read_bytes())
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        if not needed and not path.read_bytes()[:2].startswith(b"["):
            return []
        raise ValueError(f"not a trace: {error}") from None
    if not isinstance(document, list):
        if needed:
            raise ValueError("not a trace: no array of events")
        return []
    return [one for event in document if (one := _event(Fields(event))) is not None]


def _event(fields: Fields) -> tuple[int, _Event] | None:
    """Complete events alone: SNAPSTONE_TRACE writes no others."""
    begin, duration = fields.number("ts"), fields.number("dur")
    if fields.text("ph") != "X" or begin is None or duration is None or duration < 0:
        return None
    name, thread = fields.text("name") or "(no name)", fields.text("tid") or "thread"
    arguments: dict[str, Any] = {"operation": fields.text("cat")}
    given = fields.fields("args")
    for key in given.names():
        number = given.number(key)
        arguments[key] = given.text(key) if number is None else int(number) if number.is_integer() else number
    return int(fields.number("pid") or 0), _Event(name, thread, begin, duration, arguments)


def _timelines(measurement: Measurement) -> Iterator[_Group]:
    for engine in engines_of(measurement):
        group = _Group(f"{measurement.name.removesuffix('.json')}: {engine.title}")
        for span in spans_of(engine.fields):
            event = _Event(
                span.stage, span.lane, span.begin * 1e6, (span.end - span.begin) * 1e6, {"bytes": int(span.nbytes)}
            )
            group.ranks.setdefault(span.rank, []).append(event)
        if group.ranks:
            yield group


def _chrome_events(groups: Sequence[_Group]) -> Iterator[dict[str, Any]]:
    process = 0
    for group in groups:
        offsets = {rank: group.clocks[rank].offset if rank in group.clocks else 0.0 for rank in group.ranks}
        zero = min(event.begin + offsets[rank] for rank, events in group.ranks.items() for event in events)
        for rank, events in sorted(group.ranks.items()):
            process += 1  # 0 would be the idle process
            yield _named("process_name", process, 0, name=f"rank {rank} ({group.title})")
            yield _named("process_sort_index", process, 0, sort_index=process)
            for thread, (name, row) in enumerate(_rows(events), start=1):
                yield _named("thread_name", process, thread, name=name)
                yield _named("thread_sort_index", process, thread, sort_index=thread)
                for event in row:
                    yield {
                        "name": event.name,
                        "cat": event.arguments.get("operation") or "save",
                        "ph": "X",
                        "ts": round(event.begin + offsets[rank] - zero, 3),
                        "dur": round(event.duration, 3),
                        "pid": process,
                        "tid": thread,
                        "args": event.arguments,
                    }


def _named(what: str, process: int, thread: int, **arguments: Any) -> dict[str, Any]:
    return {"name": what, "ph": "M", "pid": process, "tid": thread, "args": arguments}


def _rows(events: Sequence[_Event]) -> Iterator[tuple[str, list[_Event]]]:
    """Rows by name. Slices of one row must nest or follow each other, so overlapping ones are spread over more rows."""
    lanes: dict[str, list[_Event]] = {}
    for event in events:
        lane = f"{event.thread} {event.name}" if event.name in _IN_FLIGHT else event.thread
        lanes.setdefault(lane, []).append(event)
    for lane in sorted(lanes, key=_lane_order):
        for number, row in enumerate(_nested(lanes[lane]), start=1):
            yield (lane if number == 1 else f"{lane} ({number})"), row


def _lane_order(lane: str) -> tuple[bool, list[str]]:
    """The operation first, then by name, numbers in their order."""
    return lane != "operation", [part.zfill(9) if part.isdigit() else part for part in re.split(r"(\d+)", lane)]


def _nested(events: Sequence[_Event]) -> list[list[_Event]]:
    rows: list[list[_Event]] = []
    open_ends: list[list[float]] = []  # of each row: ends of the slices that the next one may lie in, outermost first
    for event in sorted(events, key=lambda one: (one.begin, -one.duration)):
        for row, ends in zip(rows, open_ends, strict=True):
            while ends and ends[-1] <= event.begin:
                ends.pop()
            if not ends or event.end <= ends[-1]:
                row.append(event)
                ends.append(event.end)
                break
        else:
            rows.append([event])
            open_ends.append([event.end])
    return rows
