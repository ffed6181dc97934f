"""Promises 1, 2 and 3 across a crash of the machine: every save, compaction, repair, failure and clean-up is recorded,
cut at every moment, and each state that the file system may be in then is judged.
"""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest

from crash.explore import Explorer, Found
from crash.scenarios import SCENARIOS, Scenario, record
from crash.syncs import ROOT, UNNEEDED, named_syncs, unnamed_syncs

pytestmark = pytest.mark.timeout(300)

SEED = int(os.environ.get("SNAPSTONE_CRASH_SEED", "1"))
DRAWS = 60  # at each cut, beside the corner cases
RECOVER_EVERY = 60
STATES_MIN = 20_000

_total = Found()
_explored: set[str] = set()


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.name)
def test_no_crash_spoils_a_checkpoint_or_loses_one(scenario: Scenario, scratch: Path, tmp_path: Path) -> None:
    recording = record(scenario, scratch)
    (tmp_path / "recording").write_bytes(pickle.dumps(recording))
    found = Explorer(recording, scratch, draws=DRAWS, seed=SEED, recover_every=RECOVER_EVERY).run()
    print(f"{scenario.name}, seed {SEED}: {found}")
    replay = f"to see one: python -m crash replay {tmp_path / 'recording'} CUT:STATE"
    assert not found.violations, "\n".join([*found.violations, replay])
    assert found.states > 50
    assert found.checkpoints_read > 1
    _total.add(found)
    _explored.add(scenario.name)
    if len(_explored) == len(SCENARIOS):
        assert _total.states + _total.recovery_states >= STATES_MIN, _total
        assert _total.recoveries > 20


def test_every_sync_has_a_name() -> None:
    assert unnamed_syncs() == []
    assert named_syncs() >= {"sync/data", "sync/index", "sync/manifest", "sync/commit", "sync/exchange", "sync/reap"}
    calls = [path for path in (ROOT / "csrc").rglob("*.cc") if "::fsync(" in path.read_text()]
    assert {path.name for path in calls} == {"file.cc", "directory.cc"}


# The scenario that misses each of them; "save" for the others.
LIKELY = {
    "sync/copied": "carry",
    "sync/entries": "ranks",
    "sync/exchange": "overwrite",
    "sync/heard": "heard",
    "sync/marker": "marker",
    "sync/parents": "parents",
    "sync/reap": "failed_exchange",
    "sync/repaired_base": "repair_base",
    "sync/repaired_entry": "repair",
    "sync/repaired_file": "repair_index",
    "sync/shared_entries": "link",
    "sync/shared_file": "copied",
    "sync/shared_kept": "carry",
}


@pytest.mark.parametrize("step", sorted(named_syncs() - UNNEEDED))
def test_without_any_one_sync_a_crash_is_found_that_spoils_or_loses_a_checkpoint(step: str, scratch: Path) -> None:
    likely = LIKELY.get(step, "save")
    (scenario,) = (scenario for scenario in SCENARIOS if scenario.name == likely)
    recording = record(scenario, scratch, step)
    found = Explorer(recording, scratch, draws=5, seed=SEED, stop=1).run()
    assert found.violations, f"nobody misses {step}"
    print(found.violations[0])
