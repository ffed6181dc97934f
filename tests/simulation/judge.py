"""The invariants.

1. One outcome: when a rank reports success of a save, none reports failure, and every byte is visible under its name.
   When all report failure, nothing is visible, except that a commit whose last sync failed stays (it says so), and then
   none reports success. When rank 0 dies in the instant of that failure, before it can leave the mark that disowns what
   is visible, the others may take it for committed: `docs/guarantees.md` names this exclusion.
2. No rank waits past its deadline plus `LATE_S`.
3. A rank that fails through no fault of its own names one that was at fault, and none when none was.
4. The next save of the same ranks works, and of a new job too, which removes all that was left.
5. A load gives every rank right bytes or an error. Only a rank that lost the store may differ from the others. No rank
   takes Python values before every rank has read.
6. What a rank says itself, the others know at once, not at the deadline, unless they wait inside gloo.

Not judged: a rank that is dead or stopped for good, and what Ctrl-C makes of the rank that gets it (it may come after
the commit).
"""

from __future__ import annotations

import json
import math
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from simulation.engine import data_of
from simulation.scenario import COMMIT_ERRORS
from simulation.world import Process
from snapstone.errors import CheckpointError, RankFailedError

if TYPE_CHECKING:
    from simulation.history import Ended, Played
    from simulation.scenario import Fault

__all__ = ["clean", "first", "seen", "undisturbed"]

LATE_S = 6.0
AT_ONCE_S = 0.9
# What is laid out for a rank to run into, which it may never do.
ARMED = {
    "write error": "write_error",
    "read error": "read_error",
    "slow write": "slow_write",
    "commit error": "commit",
    "commit dies": "commit",
}
SLOW = ("stop", "cut", "slow write")


def seen(path: Path) -> str | None:
    """The save_id of what is visible there."""
    try:
        return str(json.loads((path / "MANIFEST.json").read_bytes())["save_id"])
    except FileNotFoundError:
        return None


def first(played: Played, processes: list[Process], directory: Path, before: str | None) -> None:
    """Judges the operation that the faults befell."""
    scenario, problems = played.scenario, played.problems
    commits = [fault for fault in scenario.faults if ARMED.get(fault.kind) == "commit"]
    for fault in scenario.faults:
        fault.fired = fault.fired and ARMED.get(fault.kind) not in processes[fault.rank].facts
        replaced = any(fault is one for one in commits[:-1])  # by the last one that is laid out
        fault.fired = fault.fired and not replaced
    _deadlines(played, processes)
    _names(played)
    if scenario.operation == "load":
        _load(played, processes)
        return
    path = directory / ("old" if scenario.operation == "overwrite" else "new")
    now = seen(path)
    committed = now is not None and now != (before if scenario.operation == "overwrite" else None)
    if committed:
        problems.extend(_incomplete(path, scenario.world_size))
    judged = {rank: ended for rank, ended in played.ended.items() if not isinstance(ended.error, KeyboardInterrupt)}
    succeeded = sorted(rank for rank, ended in judged.items() if ended.error is None)
    failed = sorted(rank for rank, ended in judged.items() if ended.error is not None)
    if succeeded and failed:
        problems.append(f"two outcomes: success on {succeeded}, failure on {failed}")
    if succeeded and not committed:
        problems.append(f"success on {succeeded}, and nothing is visible")
    if succeeded and _uncertain(played, "commit error"):
        problems.append(f"success on {succeeded}, and the last sync of the commit failed")
    if failed and not succeeded and committed and not _uncertain(played, "commit error", "commit dies"):
        problems.append(f"failure on {failed}, and the checkpoint is visible")
    if scenario.operation == "overwrite" and now is None:
        problems.append("neither the old checkpoint nor the new one is visible")


def _uncertain(played: Played, *kinds: str) -> bool:
    """A commit whose last sync failed, by a fault of these kinds."""
    faults = [fault for fault in played.scenario.faults if fault.fired and fault.kind in kinds]
    return any(COMMIT_ERRORS[fault.rules] for fault in faults)


def _load(played: Played, processes: list[Process]) -> None:
    problems = played.problems
    outcomes: dict[bool, list[int]] = {True: [], False: []}
    for rank, ended in sorted(played.ended.items()):
        if ended.error is None and ended.value is not True:
            problems.append(f"rank {rank} loaded wrong bytes")
        if isinstance(ended.error, KeyboardInterrupt) or "is unknown" in str(ended.error):
            continue
        outcomes[ended.error is None].append(rank)
    if outcomes[True] and outcomes[False]:
        problems.append(f"two outcomes: loaded on {outcomes[True]}, failed on {outcomes[False]}")
    took = [process.rank for process in processes if process.facts.get("took values")]
    unread = [fault for fault in played.scenario.faults if fault.fired and fault.kind == "read error"]
    if took and any(fault.when != "fill" for fault in unread):
        problems.append(f"ranks {took} took Python values, and rank {unread[0].rank} could not read")


def _deadlines(played: Played, processes: list[Process]) -> None:
    for rank, ended in played.ended.items():
        due = max(ended.begun_s + played.scenario.timeout_s, processes[rank].stopped_until) + LATE_S
        if ended.ended_s > due:
            played.problems.append(f"rank {rank} ended {ended.ended_s - due + LATE_S:.2f} s after its deadline")


def _names(played: Played) -> None:
    # A process that leaves after a failure has heard of it as all others have; if all it does is leave, all is well.
    failed_first = {rank for rank, ended in played.ended.items() if ended.error is not None}
    fired = [fault for fault in played.scenario.faults if fault.fired]
    only_leaves = all(fault.kind == "leave" for fault in fired)
    fired = [fault for fault in fired if fault.kind != "leave" or not (only_leaves or fault.rank in failed_first)]
    at_fault = {fault.rank for fault in fired}
    failed = {rank: ended for rank, ended in played.ended.items() if ended.error is not None}
    in_time = any(fault.fired_s <= played.scenario.timeout_s for fault in fired)
    for rank, ended in failed.items():
        if not in_time and played.scenario.slow > 1:
            continue  # too many slow messages in a row
        if rank in at_fault or _ran_out_of_time(played, ended):
            continue
        if not isinstance(ended.error, RankFailedError) or not at_fault.intersection(ended.error.failed_ranks):
            played.problems.append(
                f"rank {rank} names none of {sorted(at_fault)}: {type(ended.error).__name__}: {ended.error}"
            )
    # gloo's waits end at the deadline, or with their peer.
    told = played.scenario.operation != "load" or (played.scenario.node_count == 1 and played.scenario.writers < 8)
    told = told or any(fault.kind == "read error" for fault in fired)  # the others wait in a vote, or come to one
    if told and len(fired) == 1 and fired[0].kind in ("interrupt", "write error", "read error") and failed:
        begin = min(failed[rank].ended_s for rank in failed)
        for rank, ended in failed.items():
            if ended.ended_s - begin > AT_ONCE_S:
                played.problems.append(f"rank {rank} heard of it {ended.ended_s - begin:.2f} s after another")


def _ran_out_of_time(played: Played, ended: Ended) -> bool:
    """The deadline has passed for somebody who waited for nobody when it did: others were slow, and none was silent."""
    first_s = min(one.ended_s for one in played.ended.values() if one.error is not None)
    due_s = min(one.begun_s for one in played.ended.values()) + played.scenario.timeout_s
    faults = [fault for fault in played.scenario.faults if fault.fired and fault.fired_s < min(first_s, due_s)]
    faults = [fault for fault in faults if fault.kind != "leave"]
    if any(fault.kind not in SLOW or fault.seconds == math.inf for fault in faults):
        return type(ended.error) is CheckpointError and ended.ended_s - ended.begun_s >= played.scenario.timeout_s
    told = ("took longer than", "did not end within")
    # Who has waited for the slow one is too late itself: it says so to the others, who name it.
    heard = isinstance(ended.error, RankFailedError) and _says_to_be_late(ended.error)
    named = [played.ended[rank].error for rank in getattr(ended.error, "failed_ranks", ()) if rank in played.ended]
    if named and all(type(error) is CheckpointError and any(words in str(error) for words in told) for error in named):
        return bool(faults)
    # What ends a collective at the deadline does not know who was late.
    unnamed = isinstance(ended.error, RankFailedError) and not ended.error.failed_ranks
    if unnamed and "the process group broke while ranks exchanged bytes (Timed out" in str(ended.error):
        return bool(faults)
    # Whoever is named had indeed not come by the deadline.
    if isinstance(ended.error, RankFailedError) and _is_silent(played, ended.error, faults, due_s):
        return bool(faults)
    late = (heard or type(ended.error) is CheckpointError) and any(words in str(ended.error) for words in told)
    return late and bool(faults)


def _says_to_be_late(error: RankFailedError) -> bool:
    """Whether the one that is named says so of itself."""
    lead = "rank 0 could not commit: " in str(error)
    found = re.search(r"rank (\d+) failed: CheckpointError: ", str(error))
    said_by = 0 if lead else int(found[1]) if found else None
    return tuple(error.failed_ranks) == (said_by,)


def _is_silent(played: Played, error: RankFailedError, faults: list[Fault], due_s: float) -> bool:
    """Whether none of those that are named had voted in time, and not only because they waited for the one that counts
    the votes: who comes back too late cannot name others without itself.
    """
    if (found := re.search(r"no answer from (?:rank|\d+ ranks) \(?([\d, ]+)(, ...)?", str(error))) is None:
        return False
    told = {int(rank) for rank in re.findall(r"\d+", found[1])}
    if not told <= set(error.failed_ranks) or (not found[2] and len(told) < len(error.failed_ranks)):
        return False
    labels = re.findall(r"\((\S+?)\): ", str(error))  # of the vote, and of what went before it
    notes = played.world.history
    counted = {rank for _, rank, what in notes if what == f"set {labels[0]}/outcome/{rank}"} or {0}
    voted = {rank for when, rank, what in notes if what == f"arrived {labels[-1]}/vote/{rank}" and when < due_s}
    too_late = {fault.rank for fault in faults if fault.fired_s + fault.seconds > due_s}
    return not voted.intersection(error.failed_ranks) and not counted <= too_late


def _incomplete(path: Path, world_size: int) -> list[str]:
    document = json.loads((path / "MANIFEST.json").read_bytes())
    problems = []
    if document["world_size"] != world_size:
        problems.append(f"{path.name} is of {document['world_size']} ranks, not {world_size}")
    for entry in document["writers"]:
        for file in (entry["index"], *entry["data"]):
            there = path / file["name"]
            if not there.exists() or there.read_bytes() != data_of(document["save_id"], entry["rank"]):
                problems.append(f"{path.name} is visible without {file['name']}")
    return problems


def reconnected(played: Played, ended: dict[int, Ended], processes: list[Process], path: Path) -> None:
    """The first save over a connection that was reset: who did not know yet finds out, and it fails for all."""
    told = {type(one.error) for one in ended.values()}
    if len(ended) < len(processes) or told != ({type(None)} if path.exists() else {RankFailedError}):
        errors = {rank: f"{one.error}" for rank, one in ended.items()}
        played.problems.append(f"{played.stage}: a connection was reset: {errors}, {path.name}: {path.exists()}")


def undisturbed(played: Played, ended: dict[int, Ended], processes: list[Process], path: Path) -> None:
    errors = {rank: one.error for rank, one in ended.items() if one.error is not None}
    if errors or len(ended) < len(processes):
        told = {rank: f"{type(error).__name__}: {error}" for rank, error in errors.items()}
        played.problems.append(f"{played.stage}: the next save failed: {told}, {len(ended)} ended")
        return
    played.problems.extend(f"{played.stage}: {problem}" for problem in _incomplete(path, len(processes)))


def clean(played: Played, directory: Path) -> None:
    """Nothing is left but checkpoints."""
    left = sorted(name for name in os.listdir(directory) if name.startswith("."))
    # Without OWNER it is nobody's for a while: of a lead that died in its commit, or an exchange that may not last.
    left = [name for name in left if not name.startswith(".staging-") or (directory / name / "OWNER").exists()]
    if left:
        played.problems.append(f"left over: {left}")


def worst_s(played: Played, processes: Any = None) -> float:
    """How long after its deadline the last rank ended."""
    return max(
        (ended.ended_s - ended.begun_s - played.scenario.timeout_s for ended in played.ended.values()),
        default=-math.inf,
    )
