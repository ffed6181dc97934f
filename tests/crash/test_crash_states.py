"""Promises 1, 2 and 3 across a crash of the machine: every save, compaction, repair, failure and clean-up is recorded,
cut at every moment, and each state that the file system may be in then is judged.
"""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest

from crash import journal
from crash.explore import Explorer, Found
from crash.recorder import Scenario, record
from crash.scenarios import SCENARIOS
from crash.syncs import FOREIGN, ROOT, UNNEEDED, named_syncs, unnamed_syncs

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
    assert found.states > 20
    assert found.checkpoints_read > 0
    _total.add(found)
    _explored.add(scenario.name)
    if len(_explored) == len(SCENARIOS):
        assert _total.states + _total.recovery_states >= STATES_MIN, _total
        assert _total.recoveries > 20


def test_every_sync_has_a_name() -> None:
    assert unnamed_syncs() == []
    assert named_syncs() >= {"sync/data", "sync/index", "sync/manifest", "sync/commit", "sync/exchange", "sync/reap"}
    assert named_syncs() >= {"sync/marker", "sync/pruned", "sync/seal", "sync/repaired_mode"}
    assert [path for path in FOREIGN if "_native.sync_" not in (ROOT / path).read_text()] == []
    calls = [path for path in (ROOT / "csrc").rglob("*.cc") if "::fsync(" in path.read_text()]
    assert {path.name for path in calls} == {"file.cc", "directory.cc"}


def test_a_repaired_file_has_owner_and_mode_on_the_disk_before_it_takes_its_place(
    scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The new file is private until then, and might be nobody's to read after a crash."""
    fchmod = os.fchmod

    def marked(descriptor: int, mode: int) -> None:
        fchmod(descriptor, mode)
        journal.mark(f"mode {os.fstat(descriptor).st_ino}")

    def is_synced(skipped: str) -> bool:
        (scenario,) = (scenario for scenario in SCENARIOS if scenario.name == "repair")
        ops = record(scenario, scratch, skipped).ops
        (at,) = (at for at, op in enumerate(ops) if op.kind == journal.MARK and op.name.startswith("mode "))
        placed = next(at for at, op in enumerate(ops) if op.other.endswith(".data"))
        inode = int(ops[at].name.split()[1])
        return any(op.kind == journal.SYNC and op.subject == inode for op in ops[at:placed])

    monkeypatch.setattr(os, "fchmod", marked)
    assert is_synced("")
    assert not is_synced("sync/repaired_mode")


# The scenario that misses each of them; "save" for the others.
LIKELY = {
    "sync/copied": "carry",
    "sync/entries": "ranks",
    "sync/exchange": "overwrite",
    "sync/handed_entries": "publish_ranks",
    "sync/handed_file": "publish_ranks",
    "sync/heard": "heard",
    "sync/hidden": "publish",
    "sync/latest": "deepspeed",
    "sync/made_directory": "publish",
    "sync/marker": "marker",
    "sync/parents": "parents",
    "sync/pruned": "prune",
    "sync/published": "publish",
    "sync/reap": "failed_exchange",
    "sync/repaired_base": "repair_base",
    "sync/repaired_entry": "repair",
    "sync/repaired_file": "repair_no_manifest",
    "sync/seal": "publish",
    "sync/sealed_entries": "publish",
    "sync/sealed_file": "publish",
    "sync/shared_entries": "link",
    "sync/shared_file": "copied",
    "sync/shared_kept": "carry",
    "sync/stock_optimizer": "stock_file",
    "sync/stub": "deepspeed",
    "sync/stubs": "deepspeed",
    "sync/stubs_begun": "deepspeed",
    "sync/stubs_gone": "deepspeed",
}


@pytest.mark.parametrize("step", sorted(named_syncs() - UNNEEDED))
def test_without_any_one_sync_a_crash_is_found_that_spoils_or_loses_a_checkpoint(step: str, scratch: Path) -> None:
    likely = LIKELY.get(step, "save")
    (scenario,) = (scenario for scenario in SCENARIOS if scenario.name == likely)
    recording = record(scenario, scratch, step)
    found = Explorer(recording, scratch, draws=5, seed=SEED, stop=1).run()
    assert found.violations, f"nobody misses {step}"
    print(found.violations[0])
