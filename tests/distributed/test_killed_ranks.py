"""SIGKILL before and after every step of the commit protocol, on every rank of 1, 2 and 4.

Invariants:
  1. The survivors come to one outcome by their deadline. If it is a failure, it names a rank that was killed.
  2. The checkpoint is there exactly if they say so, or have not said anything: whole, or the old one, or none.
  3. What was saved before is as it was. The next save works, and removes what the dead left.

`SNAPSTONE_TEST_KILLS=all` (`make kill`) takes every function, line and system call of one rank and of two; `make test`
takes every step and vote on each of two ranks, and of the rest a part. One rank alone: tests/durability.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from doomed_ranks import Doom, End, blames_the_dead, prepare, save, sweep
from rank_states import assert_holds, hidden
from ranks import run_ranks, values

import snapstone as ss
from durability import points, small, steps
from durability.counted import count
from snapstone import _native

ALL = os.environ.get("SNAPSTONE_TEST_KILLS") == "all"
KINDS = ("new", "overwrite", "delta")
REPOSITORY = Path(__file__).resolve().parents[2]

pytestmark = [pytest.mark.timeout(3600 if ALL else 900), pytest.mark.usefixtures("small_chunks")]


# What is killed where -------------------------------------------------------------------------------------------------


class Passed(NamedTuple):
    """By a rank of a save that nobody kills."""

    functions: list[str]
    lines: list[str]
    calls: list[str]
    call_count: int


Passes = dict[tuple[int, str], list[Passed]]  # of each rank, by world size and kind


def _seen(rank: int, run: Path, kind: str) -> tuple[Any, ...]:
    _native.fault_arm("none:1:kill")
    passed = points.Seen()
    passed.start()
    save(rank, run, kind)
    passed.stop()
    calls = [name for name in _native.fault_seen_names() if "/" not in name]
    return list(passed.functions), list(passed.lines), calls, _native.fault_seen("*")


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Passes:
    passes = {}
    for world_size in (1, 2) if ALL else (2,):
        prepared = tmp_path_factory.mktemp("prepared")
        values(run_ranks(world_size, prepare, str(prepared)))  # by other processes, which remember the structure
        for kind in KINDS:
            run = tmp_path_factory.mktemp("seen")
            shutil.copytree(prepared, run, copy_function=os.link, dirs_exist_ok=True)
            passes[world_size, kind] = [Passed(*one) for one in values(run_ranks(world_size, _seen, run, kind))]
    return passes


def test_every_step_of_a_save_has_its_kills(seen: Passes) -> None:
    known = {*steps.step_functions(), *steps.AFTER_A_DEATH}
    passed: set[str] = set()
    calls: set[str] = set()
    for ranks in seen.values():
        for functions, _, names, _ in ranks:
            passed.update(functions)
            calls.update(names)
    of_a_step = ("Writer.", "Outcome.", "Target.", "assign", "Channel.vote", "Channel.gather", "Channel.broadcast")
    new = {name for name in passed if name.startswith(of_a_step)} - known
    new = {name for name in new if name.partition("(")[0] not in steps.HELPERS}
    assert not new, "tests/durability/steps.py does not know these: say which step each is, or that it is none"
    assert set(steps.step_functions()) <= passed
    assert calls <= {*sum(steps.CALLS.values(), ()), *steps.PRIVATE}, "a system call that belongs to no step"


def test_the_steps_are_those_of_the_protocol() -> None:
    protocol = (
        (REPOSITORY / "docs/guarantees.md").read_text().partition("## The commit protocol")[2].partition("**When")[0]
    )
    documented = [int(number) for number in re.findall(r"^(\d+)\. ", protocol, re.MULTILINE)]
    source = (REPOSITORY / "csrc/store/staging.cc").read_text().partition("#include")[0]
    commented = [int(number) for number in re.findall(r"^//   (\d+)\. ", source, re.MULTILINE)]
    assert documented == [0, *commented]
    covered = set(steps.FUNCTIONS) | set(steps.CALLS) | {6}  # 6 is an fsync: every one of them is a call of step 2
    assert covered == set(documented)


def dooms_of(world_size: int, kind: str, seen: list[Passed], stride: int = 1) -> Iterator[Doom]:
    """For each rank every `stride`th of: before and after each step and vote, before some calls; all of them, and
    before and after every function, and before every line, if all are wanted.
    """
    for rank, one in enumerate(seen):
        wanted = [f"{name}:{when}" for name in one.functions for when in ("before", "after")]
        if not ALL:
            wanted = [place for place in wanted if place in steps.BOUNDARIES]
        places = wanted + [f"*:{nth}:kill" for nth in range(1 + rank, one.call_count + 1, 1 if ALL else 12)]
        if ALL:
            places += one.lines
        yield from (Doom(world_size, kind, ((rank, place),)) for place in places[rank % stride :: stride])


# The kills ------------------------------------------------------------------------------------------------------------


def swept(run: Path, dooms: list[Doom]) -> list[End]:
    for world_size in sorted({doom.world_size for doom in dooms}):
        values(run_ranks(world_size, prepare, str(run / f"of-{world_size}")))
    (ends,) = values(run_ranks(1, sweep, str(run), dooms, store="none", timeout=3400 if ALL else 800))
    assert len(ends) == len(dooms)
    return list(ends)


def judge(run: Path, doom: Doom, end: End) -> str:
    """Says how it ended: "killed", "survived"; fails for what must not be."""
    problem = blames_the_dead(doom, end)
    assert not problem, f"{doom}: {problem}"
    (run / ".store").unlink(missing_ok=True)
    survivors = [one for one in end.ends if one is not None]
    committed = _committed(run, doom)
    if survivors:
        assert committed == (survivors[0]["error"] is None), f"{doom}: {survivors}, and the checkpoint says {committed}"
    for path in (run / "step-1", run / "step-2"):
        if path.exists():
            assert_holds(
                path, doom.world_size, 2 if path.name == "step-2" or (doom.kind == "overwrite" and committed) else 1
            )
    next_save_clears(run)
    return "survived" if len(survivors) == doom.world_size else f"killed, {'new' if committed else 'old'}"


def _committed(run: Path, doom: Doom) -> bool:
    if doom.kind != "overwrite":
        return (run / "step-2").exists()
    with ss.Checkpoint.open(run / "step-1") as checkpoint:
        return bool(checkpoint.objects()["seed"] == 2)


def next_save_clears(run: Path) -> None:
    """A save of another job; what has no owner, since its own was not yet or not any more there, goes by age."""
    ss.save(small.state(3), checkpoint_id=run / "after", no_dist=True)
    for name in hidden(run):
        owner = run / name / "OWNER"
        assert name.startswith(".staging-"), name
        assert not (owner.exists() and owner.read_text()), name
        os.utime(run / name, (0, 0))
    _native.reap(str(run))
    assert hidden(run) == []


@pytest.mark.parametrize("kind", KINDS)
def test_killed_at_every_step_on_each_rank(tmp_path: Path, kind: str, seen: Passes) -> None:
    stride = 1 if ALL or kind == "new" else 6
    dooms = [doom for (size, of), passed in seen.items() if of == kind for doom in dooms_of(size, kind, passed, stride)]
    if ALL or kind == "new":
        # Ranks 1 to 3 pass what rank 1 of two does.
        first, other = seen[2, kind]
        dooms += dooms_of(4, kind, [first, other, other, other], 10 if ALL else 20)
    ended = [
        judge(tmp_path / str(number), *one)
        for number, one in enumerate(zip(dooms, swept(tmp_path, dooms), strict=True))
    ]
    counts = {end: ended.count(end) for end in sorted(set(ended))}
    count("kills", len(ended) - ended.count("survived"))
    print(f"{len(dooms)} kills of {kind}: {counts}")
    assert counts["killed, old"] > len(dooms) // 5
    assert counts["killed, new"] >= 2
    assert counts.get("survived", 0) < len(dooms) // 6, "points that are not reached prove nothing"


# Rank 0 dies with the decision; then another rank dies while it finds out what that was.
LEAD = ["Outcome.commit:before", "renameat2:1:kill", "Outcome.announce:before", "Channel.vote(written):after"]
FINDS_OUT = ["Outcome.on_disk:before", "Outcome.committed:before", "Outcome.committed:after", "rename:1:kill"]


def test_a_second_rank_dies_while_it_finds_out_what_the_first_left(tmp_path: Path) -> None:
    dooms = [
        Doom(world_size, kind, ((0, lead), (1, other)))
        for world_size, kind in (((2, "new"), (4, "new"), (4, "overwrite")) if ALL else ((4, "new"),))
        for row, lead in enumerate(LEAD)
        for column, other in enumerate(FINDS_OUT)
        if ALL or (row + column) % 2 == 0
    ]
    ended = [
        judge(tmp_path / str(number), *one)
        for number, one in enumerate(zip(dooms, swept(tmp_path, dooms), strict=True))
    ]
    assert {"killed, old", "killed, new"} <= set(ended)
    assert "survived" not in ended
