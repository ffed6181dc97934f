"""What came out: for people, and as a dated document."""

from __future__ import annotations

import datetime
import json
import os
import platform
import shlex
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from mutation.accepted import ACCEPTED
from mutation.kill import Outcome
from mutation.record import Reached
from mutation.sites import EXCLUDED, Site

__all__ = ["report", "write"]


def report(sites: list[Site], known: dict[str, Outcome], reached: Reached, work: Path) -> int:
    """1 where no test notices a site of `sites`, or none reaches it, and ACCEPTED has no reason for that."""
    names = {site.name for site in sites}
    survivors = [one for name, one in known.items() if name in names and not one.killed_by and one.tried]
    unexplained = [one for one in survivors if reason_of(one) is None]
    unreached = [site for site in _unreached(sites, known, reached) if reason_of(site) is None]
    killed = sum(1 for name, one in known.items() if name in names and one.killed_by)
    for one in unexplained:
        print(f"survived: {one.name}, line {one.line}: {one.text}  ({one.reached_by} tests reach it)")
    print(
        f"{len(sites)} sites, {killed} killed, {len(survivors) - len(unexplained)} accepted, {len(unexplained)} not, "
        f"{len(unreached)} that no recorded test reaches"
    )
    for site in unreached:
        print(f"no recorded test reaches: {site.name}, line {site.line}: {site.text}")
    unnoticed = [name for row in lists_of(work) for name in row["not_noticed"]]
    print("\n".join(f"not noticed: {name}" for name in unnoticed))
    return 1 if unexplained or unreached or unnoticed else 0


def lists_of(work: Path) -> list[dict[str, Any]]:
    path = work / "lists.json"
    return list(json.loads(path.read_text())) if path.exists() else []


def _unreached(sites: list[Site], known: dict[str, Outcome], reached: Reached) -> list[Site]:
    return [site for site in sites if site.name not in reached.by_site and site.name not in known]


def reason_of(one: Outcome | Site) -> str | None:
    """By name and first line, so that a reason does not pass to another statement."""
    for name, text, reason in ACCEPTED:
        if name == one.name.partition("#")[0] and one.text.startswith(text):
            return reason
    return None


def write(sites: list[Site], known: dict[str, Outcome], reached: Reached, work: Path, folder: Path) -> Path:
    now = datetime.datetime.now(datetime.UTC)
    judged = [known[site.name] for site in sites if site.name in known]
    unreached = _unreached(sites, known, reached)
    unnoticed = [*(one for one in judged if not one.killed_by), *unreached]
    rows = [_row(one) for one in judged]
    killers = Counter(one.killed_by.partition("[")[0] for one in judged if one.killed_by)
    machine = {"cpu": cpu_model(), "cores": os.cpu_count(), "kernel": platform.release()}
    result = {
        "theme": "mutation",
        "date": now.isoformat(timespec="seconds"),
        "command": shlex.join(["python", "-m", "mutation", *sys.argv[1:]]),
        "machine": machine,
        "sites": len(sites),
        "mutants": len(judged),
        "killed": sum(1 for one in judged if one.killed_by),
        "survived": sum(1 for one in judged if not one.killed_by),
        "accepted": {one.name: reason for one in unnoticed if (reason := reason_of(one)) is not None},
        "not_noticed": [one.name for one in unnoticed if reason_of(one) is None],
        "reached_by_no_recorded_test": [site.name for site in unreached],
        "recorded_tests": len(reached.seconds),
        "not_judged": len(sites) - len(judged) - len(unreached),
        "tests_that_fail_without_a_mutant": sorted(reached.failed),
        "left_out": EXCLUDED,
        "lists": lists_of(work),
        "killers": dict(killers.most_common(20)),
        "outcomes": rows,
    }
    path = folder / f"mutation_{cpu_model().lower().replace(' ', '-')}_{now:%Y%m%d}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    return path


def _row(one: Outcome) -> dict[str, Any]:
    row: dict[str, Any] = {"name": one.name, "line": one.line, "text": one.text}
    if one.killed_by:
        return {**row, "killed_by": one.killed_by}
    return {
        **row,
        "survived": reason_of(one) or "no test notices",
        "tried": one.tried,
        "reached_by": one.reached_by,
    }


def cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()
