"""The limit of a directory, and how close each rung of the engine comes to it.

Every contestant writes and reads a file of the same size, one after the other, in rounds, so that what the disk does
meanwhile meets all of them. There is one file at a time, in a directory of its own that is removed again.
"""

from __future__ import annotations

import errno
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

from .disk_probes import BLOCK_BYTES, RUNGS, DiskProbe, Fio, OwnProbe, ProbeError, Rung, remove
from .environment import environment, memory_available_bytes
from .results import Document, Probe, new_document

__all__ = ["NBYTES_DEFAULT", "SAMPLES_DEFAULT", "begin", "measure"]

NBYTES_DEFAULT = 1 << 30
SAMPLES_DEFAULT = 5
# Of the warm-up, which counts for nothing: staging memory, metadata of the directory, pages of the program.
_WARM_UP_BYTES = 64 << 20
_SPARE_BYTES = 256 << 20  # beside the file on the disk, and beside source and target in memory: staging, page cache

Report = Callable[[str], None]


def begin(directory: str | os.PathLike[str], command: Sequence[str]) -> Document:
    """A document of kind "disk" that has measured nothing. Raises OSError where there is no such directory."""
    document = new_document("disk", command, environment(directory))
    document["probes"] = []
    return document


def measure(
    document: Document,
    directory: str | os.PathLike[str],
    *,
    nbytes: int = NBYTES_DEFAULT,
    samples: int = SAMPLES_DEFAULT,
    report: Report = lambda text: None,
) -> None:
    """Fills `document` as it goes: what stands there when this is interrupted has been measured.

    fio measures the limit where it is installed and io_uring and O_DIRECT work, a probe of our own otherwise. Nothing
    of the files is left, whatever ends this. `nbytes` is rounded up to whole MiB; `report` is told what comes next.

    Raises:
        OSError: the directory takes no files, has too little room (ENOSPC), or there is too little memory (ENOMEM).
    """
    path = os.path.abspath(os.fspath(directory))
    nbytes = -(-nbytes // BLOCK_BYTES) * BLOCK_BYTES
    _check_room(path, nbytes)
    began = time.monotonic()
    parent = tempfile.mkdtemp(prefix=".snapstone-bench-", dir=path)
    try:
        running = _contestants(document, parent, nbytes, report)
        for number in range(samples):
            for contestant in list(running):
                report(f"round {number + 1} of {samples}: {contestant.name}")
                if not contestant.run(parent):
                    running.remove(contestant)
                    document["problems"].append(contestant.problem)
                document["seconds"] = time.monotonic() - began
        document["complete"] = not document["problems"]
    finally:
        remove(parent)


def _check_room(directory: str, nbytes: int) -> None:
    space = os.statvfs(directory)
    free_bytes, needed_bytes = space.f_bavail * space.f_frsize, nbytes + _SPARE_BYTES
    if free_bytes < needed_bytes:
        raise OSError(
            errno.ENOSPC, f"{needed_bytes} bytes are needed and {free_bytes} are free; give a smaller --size", directory
        )
    available_bytes, needed_bytes = memory_available_bytes(), 2 * nbytes + _SPARE_BYTES
    if available_bytes < needed_bytes:
        raise OSError(
            errno.ENOMEM,
            f"{needed_bytes} bytes of memory are needed and {available_bytes} are available; give a smaller --size",
            directory,
        )


class _Contestant:
    """A probe, and the rows of the document that its samples go to."""

    def __init__(self, probe: DiskProbe, rows: tuple[Probe, Probe]) -> None:
        self.probe = probe
        self.name = f"{probe.tool} {probe.rung}"
        self.rows = rows
        self.problem = ""

    def run(self, parent: str) -> bool:
        """One sample of each operation; False, and `problem`, when it failed."""
        written, read = self.rows
        place = tempfile.mkdtemp(dir=parent)
        operation = "write"
        try:
            written["bytes_per_second"].append(self.probe.nbytes / self.probe.write(place))
            operation = "read"
            read["bytes_per_second"].append(self.probe.nbytes / self.probe.read(place))
        except (OSError, ProbeError) as error:
            self.problem = f"{self.name}, {operation}: {error}"
            for row in self.rows if operation == "write" else (read,):
                row["reason"] = str(error)
            return False
        finally:
            remove(place)
        return True


def _contestants(document: Document, parent: str, nbytes: int, report: Report) -> list[_Contestant]:
    """Those that work here, warm; the others are in the document with the reason."""
    import torch

    from .. import prepare

    prepare("cpu", min(nbytes, _SPARE_BYTES // 2))
    source = torch.empty(nbytes // 8, dtype=torch.int64).random_()
    target = torch.zeros_like(source)
    limit = _works(document, Fio(nbytes), parent)
    # Of a tool that is not the one that is used, nothing is said.
    if not limit:
        limit = _works(document, OwnProbe("threads-direct", nbytes), parent) or _works(
            document, OwnProbe("buffered", nbytes), parent
        )
    rungs = [one for rung in RUNGS for one in _works(document, Rung(rung, nbytes, source, target), parent)]
    report("warming up")
    _warm_up([*limit, *rungs], parent, source, target)
    return [*limit, *rungs]


def _works(document: Document, probe: DiskProbe, parent: str) -> list[_Contestant]:
    """The contestant, or nothing."""
    refusal = probe.refusal(parent)
    rows: tuple[Probe, Probe] = (_row(probe, "write", refusal), _row(probe, "read", refusal))
    document["probes"].extend(rows)
    return [] if refusal else [_Contestant(probe, rows)]


def _row(probe: DiskProbe, operation: Any, refusal: str | None) -> Probe:
    return {
        "tool": probe.tool,
        "rung": probe.rung,
        "operation": operation,
        "bytes_per_second": [],
        "nbytes": probe.nbytes,
        "reason": refusal,
    }


def _warm_up(contestants: Sequence[_Contestant], parent: str, source: Any, target: Any) -> None:
    """What fails here fails again, where it is recorded."""
    items = min(source.numel(), _WARM_UP_BYTES // 8)
    for contestant in contestants:
        probe = contestant.probe
        if isinstance(probe, Rung):
            probe = Rung(probe.rung, items * 8, source[:items], target[:items])
        elif isinstance(probe, Fio):
            probe = Fio(items * 8)
        else:
            probe = OwnProbe(probe.rung, items * 8)
        place = tempfile.mkdtemp(dir=parent)
        try:
            probe.write(place)
            probe.read(place)
        except (OSError, ProbeError):
            pass
        finally:
            remove(place)
