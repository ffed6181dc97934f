"""The documents that measurements leave: one JSON file each, `DIRECTORY/<kind>-<label>.json`.

A file is written under a temporary name and renamed, so a reader never sees half of one. All times are seconds and all
sizes bytes. `docs/bench.md` says what each number means; lists of a cadence have one entry per A/B pair.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, Literal, NotRequired, TypedDict, cast

__all__ = [
    "FORMAT",
    "KINDS",
    "LEDGER_ROWS",
    "VERSION",
    "Cadence",
    "Counters",
    "Document",
    "EngineResult",
    "Environment",
    "Ledger",
    "Link",
    "Load",
    "ModelRow",
    "Option",
    "Probe",
    "Protocol",
    "ResultsError",
    "SaveTimes",
    "Span",
    "Spread",
    "Step",
    "Truth",
    "Workload",
    "new_document",
    "path_of",
    "read",
    "read_all",
    "write",
]

FORMAT: Final = "snapstone-bench"
VERSION: Final = 1

Kind = Literal["disk", "link", "stall", "load", "model"]
Status = Literal["measured", "absent", "failed", "partial"]
KINDS: Final[tuple[Kind, ...]] = ("disk", "link", "stall", "load", "model")
LEDGER_ROWS: Final = ("call", "wait_previous", "fence", "finalize", "inflation", "unexplained")


class ResultsError(ValueError):
    """A file that is not a result, is damaged, or is of another version. The message names it."""


class Hardware(TypedDict):
    cpu: str
    cores: int
    memory_bytes: int
    accelerator: str | None
    device: str  # of the state: "cpu", "cuda"


class Storage(TypedDict):
    file_system: str
    device: str  # the kind of disk, "" where there is none to name
    directory: str


class Software(TypedDict):
    python: str
    torch: str
    snapstone: str
    kernel: str


class World(TypedDict):
    ranks: int
    nodes: int
    backend: str | None


class Environment(TypedDict):
    hardware: Hardware
    storage: Storage
    software: Software
    world: World


class Spread(TypedDict):
    median: float
    low: float
    high: float


class Workload(TypedDict):
    model: str
    parallelism: str  # "ddp", "fsdp 8", "tp 2"
    state_only: bool
    tensors: int
    nbytes: int  # of one checkpoint: every tensor once
    nbytes_of_rank: list[int]
    step_seconds: Spread | None


class Protocol(TypedDict):
    pairs: int
    saves_per_block: int
    steps_per_block: int
    seed: int


class Option(TypedDict):
    name: str
    value: str
    why: str


class Truth(TypedDict):
    checks: int
    failures: list[str]
    kills: int


class Ledger(TypedDict):
    """Seconds per save, one entry per pair. For each pair the six parts add up to its stall."""

    call: list[float]
    wait_previous: list[float]
    fence: list[float]
    finalize: list[float]
    inflation: list[float]
    unexplained: list[float]


class Cadence(TypedDict):
    name: Literal["relaxed", "tight"]
    interval_steps: int
    stall_seconds: list[float]  # one per pair
    ledger: Ledger
    durable_seconds: list[float]  # one per save
    skipped: int


class SaveTimes(TypedDict):
    call: float  # that training waited: call, fence
    durable: float


class Counters(TypedDict):
    bytes_written: int | None
    bytes_read: int | None
    cpu_seconds: float | None
    peak_rss_bytes: int | None
    pinned_bytes: int | None
    page_cache_bytes: int | None  # growth
    disk_write_rate: list[float]  # bytes per second
    network_rate: list[float]
    interval_seconds: float


class Span(TypedDict):
    rank: int
    lane: str
    stage: str
    begin: float  # seconds from the begin of the save
    end: float
    nbytes: int


class Step(TypedDict):
    seconds: float  # of the slowest rank
    saving: bool
    in_flight: bool


class EngineResult(TypedDict):
    name: str
    title: str
    version: str | None
    status: Status
    reason: str | None
    options: list[Option]
    syncs: bool
    truth: Truth
    cadences: list[Cadence]
    first_save: SaveTimes | None
    changed_plan_save: SaveTimes | None
    counters: Counters | None
    timeline: list[Span]
    steps: list[Step]


class Probe(TypedDict):
    tool: Literal["fio", "probe", "snapstone"]  # snapstone: a save or load through the rung
    rung: str
    operation: Literal["write", "read"]
    bytes_per_second: list[float]
    nbytes: int
    reason: str | None


class Link(TypedDict):
    """`nbytes`, and the rates, are of the bytes that arrive at one rank."""

    transport: str  # "memory" that the ranks of a node share, "gloo", "nccl", "cuda": between a device and its host
    operation: str  # "copy", "broadcast", "all_gather", "d2h", "h2d"
    bytes_per_second: list[float]
    nbytes: int
    reason: str | None


class Load(TypedDict):
    engine: str
    strategy: str
    seconds: list[float]
    nbytes: int
    bytes_read: int | None
    cold_by: str
    status: Status
    reason: str | None


class ModelRow(TypedDict):
    engine: str
    gpus: int
    hosts: int
    stall_seconds: float
    durable_seconds: float
    mtbf_seconds: float
    cadence_seconds_young_daly: float
    cadence_seconds_exact: float
    goodput: float
    lost_seconds_per_failure: float
    simulated_goodput: Spread | None


class Document(TypedDict):
    """Of any kind; what only one kind has is NotRequired here and always there in that kind."""

    format: str
    version: int
    kind: Kind
    date: str  # ISO 8601, UTC
    command: list[str]
    seconds: float
    complete: bool
    problems: list[str]
    environment: Environment
    workload: NotRequired[Workload]
    protocol: NotRequired[Protocol]
    engines: NotRequired[list[EngineResult]]
    probes: NotRequired[list[Probe]]
    links: NotRequired[list[Link]]
    checkpoint: NotRequired[dict[str, Any]]
    loads: NotRequired[list[Load]]
    inputs: NotRequired[dict[str, Any]]
    rows: NotRequired[list[ModelRow]]


_PARTS: Final[Mapping[str, tuple[str, ...]]] = {
    "disk": ("probes",),
    "link": ("links",),
    "stall": ("workload", "protocol", "engines"),
    "load": ("checkpoint", "loads"),
    "model": ("inputs", "rows"),
}


def new_document(kind: Kind, command: Sequence[str], environment: Environment) -> Document:
    """A document that has measured nothing yet: incomplete, without the parts of its kind."""
    return {
        "format": FORMAT,
        "version": VERSION,
        "kind": kind,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": list(command),
        "seconds": 0.0,
        "complete": False,
        "problems": [],
        "environment": environment,
    }


def path_of(directory: str | os.PathLike[str], kind: Kind, label: str) -> Path:
    """Where a measurement goes. `label` is cut down to letters, digits, ".", "_" and "-"."""
    return Path(directory) / f"{kind}-{re.sub(r'[^A-Za-z0-9._-]+', '-', label).strip('-') or 'run'}.json"


def write(document: Document, directory: str | os.PathLike[str], label: str) -> Path:
    """Writes `document`, in place of an earlier one of this kind and label.

    Raises:
        OSError: the file system refused. ValueError: a number is not finite, or a part of the kind is missing.
    """
    missing = [part for part in _PARTS[document["kind"]] if part not in document]
    if missing:
        raise ValueError(f"a {document['kind']} document has no {', '.join(missing)}")
    path = path_of(directory, document["kind"], label)
    text = json.dumps(document, indent=1, allow_nan=False) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(
        "w", dir=path.parent, prefix=".bench-", suffix=".tmp", encoding="utf-8", delete=False
    ) as file:
        try:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
            os.chmod(file.name, 0o644)
            os.replace(file.name, path)
        except BaseException:
            with suppress(FileNotFoundError):  # Ctrl-C right after the rename
                os.unlink(file.name)
            raise
    return path


def read(path: str | os.PathLike[str]) -> Document:
    """One document.

    Raises:
        ResultsError: it is none, is damaged, or is of another version. OSError: it cannot be read.
    """
    try:
        found: Any = json.loads(Path(path).read_bytes())
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ResultsError(f"{os.fspath(path)}: not a result of snapstone bench: {error}") from None
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise ResultsError(f"{os.fspath(path)}: not a result of snapstone bench")
    if found.get("version") != VERSION:
        raise ResultsError(
            f"{os.fspath(path)}: version {found.get('version')!r} of the result format, this one reads {VERSION}; "
            "use the snapstone that wrote it, or measure again"
        )
    if found.get("kind") not in KINDS:
        raise ResultsError(f"{os.fspath(path)}: kind {found.get('kind')!r} is none of {', '.join(KINDS)}")
    wanted = ("date", "command", "seconds", "complete", "problems", "environment", *_PARTS[found["kind"]])
    missing = [part for part in wanted if part not in found]
    if missing:
        raise ResultsError(f"{os.fspath(path)}: damaged, it has no {', '.join(missing)}")
    return cast("Document", found)


def read_all(directory: str | os.PathLike[str]) -> tuple[list[tuple[Path, Document]], list[str]]:
    """Every result in `directory` by name, and why others that are called like results were left out.

    Raises:
        OSError: the directory cannot be read.
    """
    documents: list[tuple[Path, Document]] = []
    problems: list[str] = []
    for name in sorted(os.listdir(directory)):
        if not name.endswith(".json") or name.partition("-")[0] not in KINDS:
            continue
        path = Path(directory) / name
        try:
            documents.append((path, read(path)))
        except ResultsError as error:
            problems.append(str(error))
        except OSError as error:
            problems.append(f"{path}: {error.strerror}")
    return documents, problems
