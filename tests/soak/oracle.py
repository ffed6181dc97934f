"""Holds what was acknowledged, in a process that nobody kills, and judges after each life what is on the disk.

Run by soak.py as `python -m soak.oracle RUN SOCKET`. The job's ranks connect and tell; who sends "judge" gets a packet
back, once every other connection has been read to its end. A finding is a sentence; a soak without findings has passed.

    1. Every acknowledged checkpoint that retention keeps is there, verifies, and has the digests that its ranks
       computed of their tensors before they saved.
    2. What is visible without having been acknowledged is as good. What a rank said had failed is not visible,
       except through DCP, whose own collectives come after the commit, and fail when a rank dies in them.
    3. A job resumes from the newest of them, with its bits; a step reached again has the bits that it had before.
    4. What a dead save left is gone once a later one was acknowledged, except for what has no owner, for ten minutes.
       DCP's notes have none, and go with a later save through DCP.
    5. From save to save no descriptors and no memory are added, in the job and in here, where checkpoints are loaded.
"""

from __future__ import annotations

import json
import math
import os
import selectors
import socket
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import snapstone as ss
from soak.trainer import ROWS, digest, held

PACKET_BYTES = 1 << 20
UNOWNED_S = 600.0 + 30.0
GROWTH_BYTES = 32 << 20
GROWTH_FDS = 4
SAVES_MIN = 60  # below that, a life says nothing of growth


class Oracle:
    def __init__(self, run: Path) -> None:
        self.run = run
        self.digests: dict[int, dict[str, str]] = {}  # by step, the same in every life
        self.acknowledged: dict[str, int] = {}  # step by name
        self.begun: dict[str, set[int]] = {}  # steps since then that may have come in its place
        self.failed: list[tuple[str, int]] = []  # of this life
        self.going: set[str] = set()
        self.left: set[str] = set()  # staging and trash, after the life before
        self.saved_at = -math.inf  # when this life last had a save acknowledged
        self.dcp_saved_at = -math.inf
        self.found: list[str] = []
        self.counts: Counter[str] = Counter()
        self.held: dict[int, list[dict[str, int]]] = {}  # of this life, by rank
        self.own: list[dict[str, int]] = []
        self.left_max = 0
        self.newest_before = -1

    # What the ranks tell ----------------------------------------------------------------------------------------------

    def hear(self, told: list[dict[str, Any]]) -> None:
        """All packets of a life, in the order in which they were sent, by whichever rank."""
        for one in sorted(told, key=lambda packet: packet["at"]):
            self.counts[one["what"]] += 1
            getattr(self, "_" + one["what"])(one)

    def _resumed(self, told: dict[str, Any]) -> None:
        if told["newest"] != self.newest_before:
            self.found.append(f"resumed from {told['newest']}, the newest that is whole is {self.newest_before}")
        if told["newest"] >= 0:
            if told["step"] != told["newest"]:
                self.found.append(f"step-{told['newest']} said to be step {told['step']}")
            self._same(told["step"], told["digests"], "a resumed rank")

    def _about(self, told: dict[str, Any]) -> None:
        self._same(told["step"], told["digests"], "a rank that trained")
        self.begun.setdefault(told["name"], set()).add(told["step"])

    def _acknowledged(self, told: dict[str, Any]) -> None:
        name, step = told["name"], told["step"]
        self.counts[f"acknowledged {told['kind']}"] += told["rank"] == 0
        self.acknowledged[name] = step
        self.begun[name] = {one for one in self.begun.get(name, set()) if one > step}
        self.saved_at = told["at"]
        if told["kind"].startswith("dcp"):
            self.dcp_saved_at = told["at"]
        self.held.setdefault(told["rank"], []).append({"fds": told["fds"], "rss": told["rss"]})

    def _failed(self, told: dict[str, Any]) -> None:
        if not told["kind"].startswith("dcp"):
            self.failed.append((told["name"], told["step"]))

    def _prunes(self, told: dict[str, Any]) -> None:
        self.going.update(told["names"])

    def _pruned(self, told: dict[str, Any]) -> None:
        for name in told["names"]:
            self.going.discard(name)
            self.acknowledged.pop(name, None)
            self.begun.pop(name, None)
            if (self.run / name).exists():
                self.found.append(f"{name} was pruned, and is there")

    def _compacted(self, told: dict[str, Any]) -> None:
        pass

    def _same(self, step: int, digests: dict[str, str], who: str) -> None:
        known = self.digests.setdefault(step, {})
        wrong = [name for name, one in digests.items() if known.setdefault(name, one) != one]
        if wrong:
            self.found.append(f"{who} holds other bits at step {step} than there were: {', '.join(wrong[:4])}")

    # What is on the disk ----------------------------------------------------------------------------------------------

    def judge(self) -> dict[str, Any]:
        """After a life, when nothing runs."""
        names = set(os.listdir(self.run))
        visible = {name for name in names if not name.startswith(".")}
        for name in sorted(self.acknowledged.keys() - visible - self.going):
            self.found.append(f"{name} was acknowledged and is not there")
        for name in sorted(self.going - visible):
            self.acknowledged.pop(name, None)
        self.going.clear()
        steps = {name: self._step_of(name) for name in sorted(visible)}
        for name, step in self.failed:
            if steps.get(name) == step:
                self.found.append(f"the save of step {step} as {name} was said to have failed, and is there")
        self._judge_leftovers({name for name in names if name.startswith(".")})
        self._judge_growth()
        self.newest_before = max([step for name, step in steps.items() if name != "last"], default=-1)
        for step in [one for one in self.digests if one < self.newest_before - 100]:
            del self.digests[step]
        self.failed, self.held = [], {}
        self.saved_at = self.dcp_saved_at = -math.inf
        self.begun = {}
        self.counts["lives"] += 1
        counts, self.counts = self.counts, Counter()
        found, self.found = self.found, []
        return {"found": found, "counts": counts, "left": len(self.left), **held()}

    def _step_of(self, name: str) -> int:
        """The step of a checkpoint, every byte of which is checked."""
        try:
            report = ss.verify(self.run / name)
            if not report:
                self.found.append(f"{name} does not verify: {report.problems}")
                return -1
            with ss.Checkpoint.open(self.run / name) as checkpoint:
                step = checkpoint.manifest.step
                loaded = checkpoint.load_tensors()
        except ss.CheckpointError as error:
            self.found.append(f"{name} does not load: {error}")
            return -1
        self.counts["checkpoints checked"] += 1
        acknowledged = self.acknowledged.get(name)
        allowed = self.begun.get(name, set()) | ({acknowledged} if acknowledged is not None else set())
        if step not in allowed:
            self.found.append(f"{name} holds step {step}, only {sorted(allowed)} may be there")
        else:
            self.acknowledged[name] = step  # what was not acknowledged is visible now, and stays
        table = loaded.pop("table")
        digests = {one: digest(tensor) for one, tensor in loaded.items()}
        digests |= {f"table[{row}]": digest(table[row]) for row in range(ROWS)}
        if digests != self.digests.get(step):
            wrong = {one for one, _ in digests.items() ^ self.digests.get(step, {}).items()}
            self.found.append(f"{name} holds other bits than were saved: {sorted(wrong)[:4]}")
        return step

    def _judge_leftovers(self, hidden: set[str]) -> None:
        for name in sorted(hidden & self.left):
            path = self.run / name
            is_note = name.startswith(".saving-")
            saved_at = self.dcp_saved_at if is_note else self.saved_at
            age_s = time.time() - path.stat().st_mtime
            owned = name.startswith(".trash-") or ((path / "OWNER").exists() and (path / "OWNER").read_text())
            if saved_at > -math.inf and (owned or age_s - (time.monotonic() - saved_at) > UNOWNED_S):
                self.found.append(f"{name} outlived a save, {age_s:.0f} s old")
        self.left = hidden
        self.left_max = max(self.left_max, len(hidden))

    def _judge_growth(self) -> None:
        for rank, saves in self.held.items():
            self._growth(f"rank {rank}", saves)
        self.own.append(held())
        if len(self.own) % 100 == 0:
            self._growth("the oracle", self.own)

    def _growth(self, who: str, held_at: list[dict[str, int]]) -> None:
        if len(held_at) < SAVES_MIN:
            return
        self.counts["judged for growth"] += 1
        third = len(held_at) // 3
        for what, most in (("fds", GROWTH_FDS), ("rss", GROWTH_BYTES)):
            middle = max(one[what] for one in held_at[third : 2 * third])
            last = max(one[what] for one in held_at[2 * third :])
            if last > middle + most:
                self.found.append(f"{who} grows: {what} {middle} -> {last} in {len(held_at)} saves")


def serve(run: Path, address: str) -> None:
    oracle = Oracle(run)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(address)
    listener.listen(16)
    selector = selectors.DefaultSelector()
    selector.register(listener, selectors.EVENT_READ)
    asked: socket.socket | None = None
    told: list[dict[str, Any]] = []
    while True:
        for key, _ in selector.select(0.0 if asked else None):
            one = key.fileobj
            if one is listener:
                accepted, _ = listener.accept()
                accepted.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, PACKET_BYTES)
                selector.register(accepted, selectors.EVENT_READ)
                continue
            assert isinstance(one, socket.socket)
            try:
                packet = one.recv(PACKET_BYTES)
            except ConnectionResetError:
                packet = b""
            if not packet:
                selector.unregister(one)
                one.close()
                if one is asked:
                    return
            elif packet == b"judge":
                asked = one
            else:
                told.append(json.loads(packet))
        if asked is not None and len(selector.get_map()) == 2 and not selector.select(0.0):
            oracle.hear(told)
            told.clear()
            asked.send(json.dumps(oracle.judge()).encode())
            asked = None


if __name__ == "__main__":
    serve(Path(sys.argv[1]), sys.argv[2])
