"""What is recorded and then cut at every moment: real saves of each kind, compactions, repairs, failures, clean-ups."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import snapstone as ss
from crash import journal
from crash.explore import save
from crash.judge import What
from crash.recorder import Act, Recorder, Scenario
from crash.trainers import TRAINERS
from distributed.ranks import run_ranks, values
from durability import small
from durability.chain import CHUNK_BYTES
from snapstone import _native

__all__ = ["SCENARIOS"]

RANKS = 2
AGE_S = 3600
DEADLINE_S = 4.0  # of a rank that rank 0 leaves alone


def _previous(run: Path) -> None:
    ss.save(small.state(1), checkpoint_id=run / "previous")


def _nothing(run: Path) -> None:
    pass


def _saves(name: str = "next", **options: Any) -> Act:
    def act(run: Path, recorder: Recorder) -> None:
        with recorder():
            save(run, name, 2, **options)
            save(run, "later", 3)

    return act


def _saves_delta(kind: str) -> Act:
    def act(run: Path, recorder: Recorder) -> None:
        name = "previous" if kind == "replace" else "next"
        with recorder():
            save(run, name, small.DELTAS[kind], base=run / "previous", overwrite=kind == "replace")

    return act


def _copied(run: Path) -> None:
    """A run that another program copied, and did not sync."""
    small.save_previous(run)
    moved = run.with_name("original")
    run.rename(moved)
    shutil.copytree(moved, run)
    shutil.rmtree(moved)


def _is_data(path: Path) -> bool:
    return path.name.endswith(".data")


def _compacts(run: Path, recorder: Recorder) -> None:
    with recorder():
        ss.compact(run / "previous")


def _damaged(damage: Callable[[Path], None]) -> Callable[[Path], None]:
    """A run, and a copy of it from before `damage`."""

    def prepare(run: Path) -> None:
        small.save_previous(run)
        shutil.copytree(run, run.with_name("replica"))
        damage(run)

    return prepare


def _overwritten(pattern: str) -> Callable[[Path], None]:
    def damage(run: Path) -> None:
        (path,) = run.glob(pattern)
        with path.open("r+b") as file:
            file.seek(path.stat().st_size // 4)
            file.write(b"\xff" * 64)

    return damage


def _repairs(run: Path, recorder: Recorder) -> None:
    with recorder():
        for name, what in _DELTA.items():
            journal.mark(f"begin {name} {what}")
        assert ss.repair(run / "previous", sources=[run.with_name("replica")])
        for name, what in _DELTA.items():
            journal.mark(f"done {name} {what}")


def _marked_delta(run: Path) -> None:
    ss.save(small.layers(small.ORIGIN), checkpoint_id=run / "origin")
    options: dict[str, Any] = {"base": run / "origin", "dcp_marker": True}
    ss.save(small.layers(small.PREVIOUS), checkpoint_id=run / "previous", **options)


def _fails(rules: str) -> Act:
    """A save that fails and cleans up; then one that succeeds."""

    def act(run: Path, recorder: Recorder) -> None:
        with recorder(rules), suppress(OSError, ss.CheckpointError):
            save(run, "next", 2)
        with recorder():
            save(run, "next", 3)

    return act


def _overwrite_not_synced(run: Path, recorder: Recorder) -> None:
    """The last sync of an overwrite fails; the next save cleans up behind it."""
    spare = run.with_name("spare")
    _previous(spare)
    with recorder.faults():
        ss.save(small.state(2), checkpoint_id=spare / "previous", overwrite=True)
        count = _native.fault_seen("fsync")
    shutil.rmtree(spare)
    with recorder(f"fsync:{count}:errno=EIO"), suppress(OSError, ss.CheckpointError):
        save(run, "previous", 2, overwrite=True)
    (replaced,) = run.glob(".staging-*")
    os.utime(replaced, (time.time() - AGE_S,) * 2)  # without OWNER only what is old is taken for dead
    with recorder():
        save(run, "next", 3)


def _all_ranks(function: Callable[..., Any]) -> Act:
    def act(run: Path, recorder: Recorder) -> None:
        environment = {"SNAPSTONE_CHUNK_BYTES": str(CHUNK_BYTES)}
        values(run_ranks(RANKS, function, run, recorder.path, recorder.rules, env=environment))

    return act


def _rank_saves(rank: int, run: Path, path: Path, rules: str) -> None:
    recorder = Recorder(path, rules)
    with recorder():
        save(run, "next", 2)
        save(run, "previous", 3, overwrite=True)


def _rank_saves_deltas(rank: int, run: Path, path: Path, rules: str) -> None:
    recorder = Recorder(path, rules)
    with recorder():
        save(run, "next", small.DELTAS["link"], base=run / "previous")
        save(run, "carried", small.DELTAS["carry"], base=run / "previous")


def _rank_saves_previous(rank: int, run: Path) -> None:
    small.save_previous(run)


def _previous_of_ranks(run: Path) -> None:
    environment = {"SNAPSTONE_CHUNK_BYTES": str(CHUNK_BYTES)}
    values(run_ranks(RANKS, _rank_saves_previous, run, env=environment))


def _rank_0_dies(rank: int, run: Path, path: Path, rules: str, count: int) -> None:
    """Between the rename and the sync of the parent: the other finds the checkpoint, and reports success."""
    recorder = Recorder(path, rules)
    with recorder(f"fsync:{count}:kill" if rank == 0 and count else ""):
        journal.mark("begin next 2")
        ss.save(small.state(2), checkpoint_id=run / "next", timeout=DEADLINE_S if count else 60)
        journal.mark("done next 2")
        if rank == 0 and not count:
            (path.parent / "count").write_text(str(_native.fault_seen("fsync")))


def _hears_of_the_commit(run: Path, recorder: Recorder) -> None:
    environment = {"SNAPSTONE_CHUNK_BYTES": str(CHUNK_BYTES)}
    spare, dry = run.with_name("spare"), recorder.path.with_suffix(".dry")
    _previous(spare)
    values(run_ranks(RANKS, _rank_0_dies, spare, dry, recorder.rules, 0, env=environment))
    shutil.rmtree(spare)
    dry.unlink(missing_ok=True)
    counted = recorder.path.parent / "count"
    count = int(counted.read_text())
    counted.unlink()
    first, second = run_ranks(RANKS, _rank_0_dies, run, recorder.path, recorder.rules, count, env=environment)
    assert (first.outcome, second.outcome) == ("died", "returned"), (first, second)


_OLD: dict[str, What] = {"previous": 1}
_DELTA: dict[str, What] = {"origin": small.ORIGIN, "previous": small.PREVIOUS}
_DELTAS = (small.ORIGIN, small.PREVIOUS, *sorted(set(small.DELTAS.values())))

SCENARIOS = [
    Scenario("save", _previous, _saves(), _OLD, (1, 2, 3)),
    Scenario("direct", _previous, _saves(codec="zstd"), _OLD, (1, 2, 3), io="uring"),
    Scenario("threads", _previous, _saves(), _OLD, (1, 2, 3), io="threads-direct"),
    Scenario("marker", _previous, _saves(dcp_marker=True), _OLD, (1, 2, 3)),
    Scenario("parents", _nothing, _saves(), {}, (2, 3), run=("deep", "run")),
    Scenario("overwrite", _previous, _saves("previous", overwrite=True), _OLD, (1, 2, 3)),
    Scenario("link", small.save_previous, _saves_delta("link"), _DELTA, _DELTAS),
    Scenario("carry", small.save_previous, _saves_delta("carry"), _DELTA, _DELTAS),
    Scenario("replace", small.save_previous, _saves_delta("replace"), _DELTA, _DELTAS),
    Scenario(
        "copied",
        _copied,
        _saves_delta("link"),
        {},
        _DELTAS,
        unsynced=_is_data,
        others=frozenset({"origin", "previous"}),
    ),
    Scenario("compact", _marked_delta, _compacts, _DELTA, _DELTAS),
    *(
        Scenario(name, _damaged(damage), _repairs, _DELTA, _DELTAS, damaged=frozenset(damaged))
        for name, damage, damaged in (
            ("repair", _overwritten("origin/*.data"), {"origin", "previous"}),
            ("repair_base", lambda run: shutil.rmtree(run / "previous" / "base"), {"previous"}),
            ("repair_index", _overwritten("previous/*.index"), {"previous"}),
            ("repair_manifest", _overwritten("previous/MANIFEST.json"), {"previous"}),
            ("repair_no_manifest", lambda run: (run / "previous" / "MANIFEST.json").unlink(), {"previous"}),
        )
    ),
    Scenario("failed_write", _previous, _fails("pwrite:2:errno=EIO;uring_write:1:errno=EIO"), _OLD, (1, 2, 3)),
    Scenario("failed_sync", _previous, _fails("fsync:1:errno=EIO"), _OLD, (1, 2, 3)),
    Scenario("failed_exchange", _previous, _overwrite_not_synced, _OLD, (1, 2, 3)),
    Scenario("ranks", _previous, _all_ranks(_rank_saves), _OLD, (1, 2, 3), clients=True),
    Scenario("delta_ranks", _previous_of_ranks, _all_ranks(_rank_saves_deltas), _DELTA, _DELTAS, clients=True),
    Scenario("heard", _previous, _hears_of_the_commit, _OLD, (1, 2)),
    *TRAINERS,
]
