"""One scenario in one process: every engine in turn, interleaved, the order rotated every round.

Run by run.py as `measure.py JOB.json`, so that memory figures of one state size know nothing of another. The job names
the file that takes the result. What a round does with one engine: save into a new directory, drop its pages from the
cache, load, remove the directory, sync. Only saves and loads are timed.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import resource
import shutil
import sys
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import fence
import page_cache
from engines import ENGINES, Contestant, Setting
from machine import file_system, touch_free_memory, version_of
from scenarios import Scenario, rounds_of
from states import State, build, differences, empty_like, flip_bits, nbytes_of
from usage import Usage

STAGED_AND_CACHED = 2  # an engine may hold the state twice during a save: its own copy and the page cache
SAMPLES = ("save_seconds", "save_cpu_seconds", "stall_seconds", "load_seconds", "load_cpu_seconds")


@dataclass(slots=True)
class Entry:
    """One engine's row of the result."""

    label: str
    version: str | None
    memory_budget: int | None
    skipped: str | None = None
    verified: bool = False
    rounds: int = 0
    warm_up_seconds: float = 0.0
    save_peak_extra_bytes: int | None = None  # of the first save and load: later ones find memory that the engine keeps
    load_peak_extra_bytes: int | None = None
    samples: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in SAMPLES})

    def to_json(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__slots__}


class Measurement:
    def __init__(self, scenario: Scenario, setting: Setting, directory: Path, scrub: dict[str, str]) -> None:
        self.scenario = scenario
        self.directory = directory
        self.scrub = scrub  # paths that a reason may quote -> what is recorded instead
        self.state: State = build(scenario.state, scenario.size)
        self.target: State = empty_like(self.state)
        self.contestants = {name: ENGINES[name](setting) for name in scenario.engines}
        self.entries = {
            name: Entry(one.label, version_of(one.package) if one.package else None, one.memory_budget)
            for name, one in self.contestants.items()
        }
        self.retained: dict[str, int] = {}
        self.directories_made = 0

    def run(self) -> None:
        for name in list(self.contestants):
            self._guarded(name, self._warm_up)
        self._plan_rounds()
        for number in range(self.scenario.rounds):
            self._say(f"round {number + 1} of {self.scenario.rounds}")
            names = list(self.contestants)
            turn = number % max(len(names), 1)
            for name in names[turn:] + names[:turn]:
                if number < self.entries[name].rounds:
                    self._guarded(name, self._round)
        for contestant in self.contestants.values():
            contestant.close()

    def _say(self, text: str) -> None:
        print(f"{self.scenario.title}: {text}", file=sys.stderr, flush=True)

    def _guarded(self, name: str, step: Any) -> None:
        """An engine that fails is out; the others go on."""
        entry = self.entries[name]
        try:
            reason = self.contestants[name].unavailable()
            if reason is None:
                step(name, self.contestants[name], entry)
        except Exception as error:
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
        if reason is not None:
            for path, word in self.scrub.items():
                reason = reason.replace(path, word)
            entry.skipped = reason
            self._say(f"{name} left out: {reason}")
            try:
                self.contestants.pop(name).close()
            except Exception as error:
                self._say(f"{name} did not close: {type(error).__name__}")
            self._remove(self._current_directory())

    def _new_directory(self) -> Path:
        self.directories_made += 1
        gc.collect()
        return self._current_directory()

    def _current_directory(self) -> Path:
        return self.directory / f"checkpoint-{self.directories_made:04d}"

    def _make_cold(self, directory: Path) -> None:
        page_cache.drop(directory, whole_machine=self.scenario.drop_caches and self.scenario.place == "disk")

    def _remove(self, directory: Path) -> None:
        shutil.rmtree(directory, ignore_errors=True)
        if self.scenario.place == "disk":
            os.sync()  # so that no later save pays for this one's blocks

    def _warm_up(self, name: str, contestant: Contestant, entry: Entry) -> None:
        """Save and load once: checks every bit, the state changing behind an asynchronous save, and books memory."""
        self._say(f"warm-up of {name}")
        directory = self._new_directory()
        flipped: list[bool] = []

        def change() -> None:
            flip_bits(self.state)
            flipped.append(True)

        begin = time.perf_counter()
        try:
            with Usage() as usage:
                contestant.save(self.state, directory, None if contestant.is_probe else change)
        finally:
            if flipped:
                flip_bits(self.state)
        entry.warm_up_seconds = time.perf_counter() - begin
        kept = self.retained.get(contestant.family, 0)
        entry.save_peak_extra_bytes = usage.peak_extra_bytes + kept
        self.retained[contestant.family] = kept + usage.retained_bytes
        self._verify(contestant, entry, directory)
        begin = time.perf_counter()
        self._remove(directory)
        entry.warm_up_seconds += time.perf_counter() - begin

    def _verify(self, contestant: Contestant, entry: Entry, directory: Path) -> None:
        self._make_cold(directory)
        if not contestant.is_probe:
            for tensor in self.target.values():
                tensor.zero_()
        with Usage() as usage:
            seconds = contestant.load(self.target, directory)
        entry.load_peak_extra_bytes = usage.peak_extra_bytes
        if contestant.loads:
            entry.warm_up_seconds += seconds
        if contestant.is_probe:
            return
        wrong = differences(self.state, self.target)
        if wrong:
            raise RuntimeError(
                f"{len(wrong)} of {len(self.state)} tensors came back different, the first is {wrong[0]}"
            )
        entry.verified = True

    def _plan_rounds(self) -> None:
        seconds_of = {name: self.entries[name].warm_up_seconds for name in self.contestants}
        for name, count in rounds_of(seconds_of, self.scenario).items():
            self.entries[name].rounds = count
            if count < self.scenario.rounds:
                self._say(f"{name} gets {count} rounds: {self.scenario.rounds} would take too long")

    def _round(self, name: str, contestant: Contestant, entry: Entry) -> None:
        directory = self._new_directory()
        touch_free_memory(STAGED_AND_CACHED * nbytes_of(self.state))
        with Usage() as usage:
            saved = contestant.save(self.state, directory)
        entry.samples["save_seconds"].append(saved.durable_seconds)
        entry.samples["save_cpu_seconds"].append(usage.cpu_seconds)
        if saved.stall_seconds is not None:
            entry.samples["stall_seconds"].append(saved.stall_seconds)
        if contestant.loads:
            self._make_cold(directory)
            with Usage() as usage:
                seconds = contestant.load(self.target, directory)
            entry.samples["load_seconds"].append(seconds)
            entry.samples["load_cpu_seconds"].append(usage.cpu_seconds)
        self._remove(directory)

    def result(self) -> dict[str, Any]:
        return {
            "state": self.scenario.state,
            "place": self.scenario.place,
            "file_system": file_system(self.directory),
            "nbytes": nbytes_of(self.state),
            "tensors": len(self.state),
            "rounds": self.scenario.rounds,
            "cold_by": self._cold_by(),
            "engines": {name: entry.to_json() for name, entry in self.entries.items()},
        }

    def _cold_by(self) -> str | None:
        if self.scenario.place == "tmpfs":
            return None
        return page_cache.dropped_by(whole_machine=self.scenario.drop_caches)


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    scenario = Scenario(**{**job["scenario"], "engines": tuple(job["scenario"]["engines"])})
    setting = Setting(scenario.host_memory_budget, job["disk_limit"], job["disk_limit_missing"])
    directory = Path(job["directory"])
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    # torch_checkpointing shares each tensor's storage through a file descriptor.
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard) if soft < hard else (soft, hard))

    measurement = Measurement(scenario, setting, directory, job["scrub"])
    measurement.run()
    result = measurement.result()
    if scenario.fence_parameters and "snapstone-async" in measurement.contestants:
        try:
            result["fence"] = fence.measure(directory, scenario.fence_parameters, scenario.rounds)
        except Exception as error:
            result["fence"] = {"skipped": type(error).__name__}
            print(f"{scenario.title}: fenced saves failed: {error!r}", file=sys.stderr)
    Path(job["result"]).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
