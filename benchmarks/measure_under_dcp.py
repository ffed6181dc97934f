"""Rows under torch.distributed.checkpoint in one process, which tells rank processes what to do.

Run by run.py as `measure_under_dcp.py JOB.json`; the job names the file that takes the result. Only saves and loads are
timed; directories, cold caches and comparisons come between them.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import page_cache
from drop_in.crew import Crew
from drop_in.interleave import Entry, interleave
from drop_in.rows import BY_SNAPSTONE, BY_STOCK, ROWS, SAVERS, Contender, Row, state_size
from machine import file_system, touch_free_memory

from snapstone.reader import read_rung

STAGED_AND_CACHED = 2  # a contender may hold the state twice during a save: its own copy and the page cache
SUMMED = ("rchar", "read_bytes")  # over the ranks; of times the slowest rank's counts


class Measurement:
    def __init__(self, job: Mapping[str, Any]) -> None:
        self.rows = [row for row in ROWS if row.name in job["rows"]]
        self.size = state_size(quick=job["quick"])
        self.rounds: int = job["rounds"]
        self.drop_caches = not job["quick"]  # every other process of the machine would pay for it
        self.directory = Path(job["directory"])
        self.scrub: Mapping[str, str] = job["scrub"]
        self.direct = read_rung(str(self.directory)) != "buffered"
        self.nbytes = self.tensors = 0
        self.directories_made = 0
        self.results: list[dict[str, Any]] = []

    def run(self) -> list[dict[str, Any]]:
        """Rows that need the same ranks share them."""
        saves = [row for row in self.rows if row.kind in ("save", "async")]
        loads = [row for row in self.rows if row.kind == "load"]
        reads = [row for row in self.rows if row.kind == "read-once"]
        if saves:
            with Crew(1) as crew:
                self._run_saves(crew, saves)
        if loads:
            with Crew(SAVERS) as savers, Crew(2) as readers:
                self._run_loads({crew.world_size: crew for crew in (savers, readers)}, loads)
        if reads:
            with Crew(SAVERS) as crew:
                self._run_reads_once(crew, reads)
        return self.results

    # Rows of each kind ------------------------------------------------------------------------------------------------

    def _run_saves(self, crew: Crew, rows: list[Row]) -> None:
        self._build(crew, None)
        for row in rows:
            self._interleave(row, partial(self._checked_save, crew, row), partial(self._save, crew, row, check=False))

    def _checked_save(self, crew: Crew, row: Row, contender: Contender) -> None:
        try:
            self._save(crew, row, contender, check=True)
        except Exception:
            self._build(crew, None)  # what a failed check leaves is not the state
            raise

    def _save(self, crew: Crew, row: Row, contender: Contender, *, check: bool) -> dict[str, float]:
        directory = self._new_directory()
        touch_free_memory(STAGED_AND_CACHED * self.nbytes)
        try:
            if row.kind == "save":
                answers = crew.call("save", contender, directory)
            else:
                answers = crew.call("async_save", contender, row.executor, directory, check)
            if check:
                crew.call("clear")
                crew.call("load", contender, directory)
                self._compare(crew.call("differences"))
        finally:
            self._remove(directory)
        return _together(answers)

    def _run_loads(self, crews: Mapping[int, Crew], rows: list[Row]) -> None:
        """Each storage saves once, on four ranks; all loads read these two checkpoints."""
        self._build(crews[SAVERS], 0)
        stored = {one.storage: self._stored(crews[SAVERS], one) for one in (BY_STOCK, BY_SNAPSTONE)}
        for row in rows:
            crew = crews[row.ranks]
            self._build(crew, row.dimension)
            load = partial(self._load, crew, "load", lambda contender: stored[contender.storage])
            self._interleave(row, partial(load, check=True), partial(load, check=False))
        for directory in stored.values():
            self._remove(directory)

    def _run_reads_once(self, crew: Crew, rows: list[Row]) -> None:
        self._build(crew, None)
        directory = self._stored(crew, BY_SNAPSTONE)
        load = partial(self._load, crew, "read_once", lambda contender: directory)
        for row in rows:
            self._interleave(row, partial(load, check=True), partial(load, check=False))
        self._remove(directory)

    def _load(
        self, crew: Crew, method: str, directory_of: Callable[[Contender], Path], contender: Contender, *, check: bool
    ) -> dict[str, float]:
        if check:
            crew.call("clear")
        page_cache.drop(directory_of(contender), whole_machine=self.drop_caches)
        answers = crew.call(method, contender, directory_of(contender))
        if check:
            differences = crew.call("differences")
            self._compare(differences[:1] if contender.strategy == "alone" else differences)
        return _together(answers)

    # One row ----------------------------------------------------------------------------------------------------------

    def _interleave(
        self, row: Row, warm_up: Callable[[Contender], object], step: Callable[[Contender], Mapping[str, float]]
    ) -> None:
        rounds = min(self.rounds, row.rounds_max or self.rounds)
        entries = {one.name: Entry(one.label, one.storage, one.role, self._counter(row, one)) for one in row.contenders}
        interleave(row.title, row.contenders, entries, rounds, warm_up=warm_up, step=step, scrub=self.scrub)
        loads = row.kind in ("load", "read-once")
        self.results.append(
            {
                "row": row.name,
                "title": row.title,
                "ranks": row.ranks,
                "nbytes": self.nbytes,
                "tensors": self.tensors,
                "rounds": rounds,
                "file_system": file_system(self.directory),
                "cold_by": page_cache.dropped_by(whole_machine=self.drop_caches) if loads else None,
                "engines": {name: entry.to_json() for name, entry in entries.items()},
            }
        )

    def _counter(self, row: Row, contender: Contender) -> str | None:
        """Stock reads through the page cache, where two ranks that read one file cost the device one read: what counts
        is what they asked for. snapstone's direct reads all reach the device, and `rchar` neither sees io_uring nor
        tells a file from the socket to another rank.
        """
        if row.kind in ("save", "async"):
            return None
        if contender.storage == "stock":
            return "rchar"
        return "read_bytes" if self.direct else None

    def _compare(self, differences: list[list[str]]) -> None:
        for rank, names in enumerate(differences):
            if names:
                raise RuntimeError(
                    f"rank {rank}: {len(names)} of {self.tensors} tensors came back different, the first is {names[0]}"
                )

    def _build(self, crew: Crew, dimension: int | None) -> None:
        self.nbytes, self.tensors = crew.call("build", self.size, dimension)[0]

    # Directories ------------------------------------------------------------------------------------------------------

    def _stored(self, crew: Crew, contender: Contender) -> Path:
        """A checkpoint of what the crew holds."""
        directory = self._new_directory()
        crew.call("save", contender, directory)
        page_cache.fsync_files(directory)  # a dirty page cannot be dropped
        return directory

    def _new_directory(self) -> Path:
        self.directories_made += 1
        return self.directory / f"checkpoint-{self.directories_made:04d}"

    def _remove(self, directory: Path) -> None:
        shutil.rmtree(directory, ignore_errors=True)
        os.sync()  # so that no later save pays for this one's blocks


def _together(answers: list[dict[str, float]]) -> dict[str, float]:
    """One sample of what the ranks measured; one that took no part answers with nothing."""
    names = dict.fromkeys(name for answer in answers for name in answer)
    values = {name: [answer[name] for answer in answers if name in answer] for name in names}
    return {name: sum(found) if name in SUMMED else max(found) for name, found in values.items()}


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    Path(job["result"]).write_text(json.dumps(Measurement(job).run()))


if __name__ == "__main__":
    main()
