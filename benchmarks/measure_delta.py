"""Delta saves in one process, each case's contenders in turn: run by run.py as `measure_delta.py JOB.json`.

The state is saved once by whoever needs a checkpoint before. Then, in each case, a part of it changes, and everybody
saves it again and again from there. Only saves and loads are timed.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import shutil
import sys
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import page_cache
from delta.cases import CASES, DEPTH, Case, change, changed_names
from delta.contenders import CONTENDERS, Contender
from drop_in.interleave import Entry, interleave
from machine import file_system, memory_available_bytes, touch_free_memory, version_of
from scenarios import MEMORY_FOR_2GB_BYTES
from states import State, build, differences, empty_like, nbytes_of

import snapstone as ss

SIZE, SIZE_LITTLE_MEMORY, SIZE_QUICK = 1536, 1024, 64
ROUNDS_MAX = 3
SECONDS_MAX = 40.0  # of one case, after which no third round begins: the whole group takes at most three minutes
ROUNDS_MAX_OF_LOADS = 5


class Measurement:
    def __init__(self, job: Mapping[str, Any]) -> None:
        little = memory_available_bytes() < MEMORY_FOR_2GB_BYTES
        size = SIZE_QUICK if job["quick"] else SIZE_LITTLE_MEMORY if little else SIZE
        self.rounds: int = job["rounds"]
        self.drop_caches = not job["quick"]  # every other process of the machine would pay for it
        self.directory = Path(job["directory"])
        self.scrub: Mapping[str, str] = job["scrub"]
        self.state: State = build("2gb", size)
        self.target: State = empty_like(self.state)
        self.contenders = {name: make() for name, make in CONTENDERS.items()}
        self.missing = {name: one.unavailable() for name, one in self.contenders.items()}
        self.verified: set[str] = set()
        self.directories_made = 0
        self.results: list[dict[str, Any]] = []

    def run(self) -> list[dict[str, Any]]:
        saves, loads = CASES[:-1], CASES[-1]
        for name, contender in self.contenders.items():
            if self.missing[name] is None:
                self._guarded_begin(name, contender)
        for case in saves:
            names = changed_names(self.state, case.name)
            change(self.state, names)
            self._interleave(case, names, self._checked_save, self._save, ROUNDS_MAX)
            change(self.state, names)
        for contender in self.contenders.values():
            contender.close()
        self._run_loads(loads)
        return self.results

    def _guarded_begin(self, name: str, contender: Contender) -> None:
        try:
            contender.begin(self.state, self.directory / f"before-{name}")
        except Exception as error:
            self.missing[name] = f"{type(error).__name__}: {error}".splitlines()[0]

    # Saves ------------------------------------------------------------------------------------------------------------

    def _checked_save(self, contender: Contender) -> None:
        """To whoever writes everything it is the same in each case, and is done in the first."""
        if contender.name not in self.verified or contender.depends_on_change:
            self._save(contender, check=True)
        self.verified.add(contender.name)

    def _save(self, contender: Contender, check: bool = False) -> dict[str, float]:
        directory = self._new_directory()
        gc.collect()
        # Other engines hold the state twice during a save: a copy of their own, and the page cache.
        touch_free_memory((2 if contender.role == "context" else 1) * nbytes_of(self.state))
        try:
            sample = contender.save(self.state, directory)
            if check and contender.loads:
                self._compare(contender, directory)
        finally:
            self._remove(directory)
        return sample

    def _compare(self, contender: Contender, directory: Path) -> None:
        for tensor in self.target.values():
            tensor.zero_()
        contender.load(self.target, directory)
        wrong = differences(self.state, self.target)
        if wrong:
            raise RuntimeError(
                f"{len(wrong)} of {len(self.state)} tensors came back different, the first is {wrong[0]}"
            )

    # Loads ------------------------------------------------------------------------------------------------------------

    def _run_loads(self, case: Case) -> None:
        """The same state, saved in full and at the end of a chain; the checkpoints before it are gone."""
        stored = {name: self.directory / f"stored-{name}" for name in case.contenders}
        before = self._new_directory()
        ss.save(self.state, checkpoint_id=before)
        for turn in range(DEPTH):
            change(self.state, changed_names(self.state, "some", turn))
            directory = stored["delta"] if turn == DEPTH - 1 else self._new_directory()
            ss.save(self.state, checkpoint_id=directory, base=before)
            self._remove(before)
            before = directory
        ss.save(self.state, checkpoint_id=stored["full"])

        def load(contender: Contender) -> dict[str, float]:
            page_cache.drop(stored[contender.name], whole_machine=self.drop_caches)
            begin = time.perf_counter()
            contender.load(self.target, stored[contender.name])
            return {"load_seconds": time.perf_counter() - begin}

        self._interleave(case, [], lambda one: self._compare(one, stored[one.name]), load, ROUNDS_MAX_OF_LOADS)

    # One case ---------------------------------------------------------------------------------------------------------

    def _interleave(self, case: Case, names: list[str], warm_up: Any, step: Any, rounds_max: int) -> None:
        rounds = min(self.rounds, rounds_max)
        chosen = [self.contenders[name] for name in case.contenders]
        entries = {one.name: Entry(one.label, one.package, one.role, None) for one in chosen}
        for name, entry in entries.items():
            if self.missing[name] is not None:
                entry.skipped, entry.unavailable = self.missing[name], "not installed" in str(self.missing[name])
        active = [one for one in chosen if self.missing[one.name] is None]
        interleave(
            case.title, active, entries, rounds, warm_up=warm_up, step=step, scrub=self.scrub, seconds_max=SECONDS_MAX
        )
        loads = case.name == "load"
        self.results.append(
            {
                "row": case.name,
                "title": case.title,
                "nbytes": nbytes_of(self.state),
                "tensors": len(self.state),
                "changed_tensors": len(names),
                "changed_bytes": sum(self.state[name].nbytes for name in names),
                "rounds": max(len(samples) for one in entries.values() for samples in [[], *one.samples.values()]),
                "file_system": file_system(self.directory),
                "cold_by": page_cache.dropped_by(whole_machine=self.drop_caches) if loads else None,
                "engines": {
                    one.name: entries[one.name].to_json() | {"version": version_of(one.package)} for one in chosen
                },
            }
        )

    # Directories ------------------------------------------------------------------------------------------------------

    def _new_directory(self) -> Path:
        self.directories_made += 1
        return self.directory / f"checkpoint-{self.directories_made:04d}"

    def _remove(self, directory: Path) -> None:
        shutil.rmtree(directory, ignore_errors=True)
        os.sync()  # so that no later save pays for this one's blocks


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    Path(job["result"]).write_text(json.dumps(Measurement(job).run()))


if __name__ == "__main__":
    main()
