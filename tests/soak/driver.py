"""Lives of the job, one after the other, each of which ends by SIGKILL: of one rank or of all, at a random time or at a
random system call of a save. The oracle judges what is on the disk after each; the first finding ends the soak.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from distributed.ranks import Ranks, Result
from snapstone import RankFailedError
from soak.lives import Life, life_of
from soak.trainer import TIMEOUT_S, live

__all__ = ["soak"]

TESTS = Path(__file__).resolve().parents[1]

LATE_S = max(2.0, TIMEOUT_S / 3)
COLLECTIVE_S = 40.0  # DCP's collectives end when the process group says so
START_S = 200.0  # a process takes seconds to import torch, and on a busy machine minutes
ENVIRONMENT = {"SNAPSTONE_CHUNK_BYTES": "65536", "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}


class Soak:
    def __init__(self, directory: Path, seed: int) -> None:
        self.seed = seed
        self.run = directory / "run"
        self.run.mkdir(parents=True)
        # Socket names have 107 bytes at most.
        self._sockets = tempfile.TemporaryDirectory(prefix="soak-")
        self.address = os.path.join(self._sockets.name, "oracle")
        environment = {**os.environ, **ENVIRONMENT}
        environment["PYTHONPATH"] = os.pathsep.join([str(TESTS), environment.get("PYTHONPATH", "")])
        self._oracle = subprocess.Popen(
            [sys.executable, "-m", "soak.oracle", str(self.run), self.address], env=environment
        )
        self.counts: Counter[str] = Counter()
        self.held: list[dict[str, int]] = []
        self.left_max = 0
        self.found: list[str] = []
        self._asking = self._connect()

    def close(self) -> None:
        self._asking.close()
        if self._oracle.poll() is None:
            self._oracle.terminate()
        self._oracle.wait()
        self._sockets.cleanup()

    def live(self, life: Life) -> None:
        """One life, and what the oracle says of it."""
        results = self._ended(life)
        self.counts[f"ended {life.ends}"] += 1
        self.counts[f"of {life.world_size} rank(s)"] += 1
        killed = [result.rank for result in results if result.exitcode == -signal.SIGKILL]
        self.counts["kills"] += len(killed)
        for result in results:
            if problem := self._problem_of(result, killed):
                self.found.append(problem)
        judged = self.judge()
        self.counts.update(judged["counts"])
        self.found += judged["found"]
        self.held.append({"fds": judged["fds"], "rss": judged["rss"]})
        self.left_max = max(self.left_max, judged["left"])

    def _ended(self, life: Life) -> list[Result]:
        arguments = (str(self.run), self.address, life)
        with Ranks(life.world_size, live, *arguments, store="file", env=ENVIRONMENT) as ranks:
            if life.ends in ("at a time", "all at once"):
                ranks.wait_for(0, "resumed", START_S)
                time.sleep(life.after_s)
                for rank in range(life.world_size):
                    if life.ends == "all at once" or rank == life.victim:
                        ranks.signal(rank, signal.SIGKILL)
            return ranks.results(START_S + COLLECTIVE_S + TIMEOUT_S)

    def _problem_of(self, result: Result, killed: list[int]) -> str:
        """Why this end is none that a rank may come to."""
        if result.rank in killed:
            return ""
        told = (
            f"rank {result.rank} {result.outcome}, killed were {killed}: {result.value} {result.trace}{result.output}"
        )
        if result.outcome != "returned":
            # Before its first save a rank waits for the others, in a load and in torch's collectives, which raise.
            waited = isinstance(result.error, RankFailedError) or "torch/distributed" in result.trace
            return "" if killed and result.outcome == "raised" and waited else told
        ended = result.value
        if ended["error"] is None:
            return ""
        self.counts["survivors that were told"] += 1
        if not killed:
            return told
        if ended["kind"].startswith("dcp"):
            return "" if ended["seconds"] < COLLECTIVE_S else told
        named = ended["error"] == "RankFailedError" and list(ended["failed_ranks"]) == killed
        return "" if named and ended["seconds"] < TIMEOUT_S + LATE_S else told

    def judge(self) -> dict[str, Any]:
        """What the oracle finds on the disk now."""
        self._asking.send(b"judge")
        packet = self._asking.recv(1 << 20)
        if not packet:
            raise RuntimeError(f"the oracle is gone: {self._oracle.wait()}")
        answer: dict[str, Any] = json.loads(packet)
        return answer

    def _connect(self) -> socket.socket:
        end = time.monotonic() + START_S
        while True:
            connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            try:
                connection.connect(self.address)
            except OSError:
                connection.close()
                if time.monotonic() > end or self._oracle.poll() is not None:
                    raise
                time.sleep(0.05)
            else:
                return connection


def soak(directory: Path, seed: int, seconds: float, first: int = 0, lives_min: int = 1) -> dict[str, Any]:
    """Runs for `seconds` and at least `lives_min` lives, or until something is found; what `run.py` records."""
    begin = time.monotonic()
    one = Soak(directory, seed)
    number = first
    try:
        while not one.found and (time.monotonic() < begin + seconds or number < first + lives_min):
            life = life_of(seed, number)
            one.live(life)
            if one.found or number % 50 == 0:
                print(f"{time.monotonic() - begin:7.1f} s  {life}  {dict(one.counts)}", flush=True)
            number += 1
    finally:
        one.close()
    spread = {
        what: {"first": one.held[0][what], "last": one.held[-1][what], "max": max(held[what] for held in one.held)}
        for what in ("fds", "rss")
    }
    return {
        "seconds": round(time.monotonic() - begin, 1),
        "seed": seed,
        "first_life": first,
        "counts": dict(sorted(one.counts.items())),
        "leftovers_max": one.left_max,
        "oracle": spread,
        "found": one.found,
    }
