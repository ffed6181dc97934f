"""What tests with lists of their own leave out one at a time: each of their cases is one step that somebody misses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mutation.forked import run_python

__all__ = ["LISTS", "judge_lists"]

SECONDS = 3600.0

LISTS = {
    "every fsync, of files and directories": "tests/crash/test_crash_states.py::"
    "test_without_any_one_sync_a_crash_is_found_that_spoils_or_loses_a_checkpoint",
    "every wait, record, poll and keep-alive of devices": "tests/cuda/test_steps.py::test_no_step_can_be_left_out",
    "votes, claims and deadlines between ranks": "tests/simulation/test_ranks.py::test_no_rule_can_be_left_out",
}


def judge_lists(root: Path, work: Path) -> list[dict[str, Any]]:
    """Of each list that this repository has: cases, and those in which nobody missed what was left out."""
    rows = []
    for what, test in LISTS.items():
        if not (root / test.partition("::")[0]).exists():
            continue
        ran = run_python(root, [test], work / "scratch" / "lists", SECONDS, {}, first_failure=False)
        outcomes = {result["nodeid"]: result for result in ran.results}
        failed = {name: one["message"] for name, one in outcomes.items() if one["outcome"] == "failed"}
        seconds = round(sum(one["seconds"] for one in outcomes.values()), 1)
        rows.append({"what": what, "test": test, "cases": len(outcomes), "not_noticed": failed, "seconds": seconds})
        print(f"{what}: {len(outcomes)} left out, {len(failed)} not noticed", flush=True)
    (work / "lists.json").write_text(json.dumps(rows))
    return rows
