"""Joint loads in which something goes wrong between two votes, ranks disagree, or the checkpoint is replaced: every
rank hears of it at once, no rank keeps bytes of another checkpoint, and the next load works.
"""

from __future__ import annotations

import errno
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import snapstone as ss
from distributed.rank_states import AT_ONCE_S, LATE_S, LONG_S, segment_descriptors
from distributed.ranks import run_ranks, values
from snapstone import _native, fabric, joint, rounds
from snapstone.collective import Deadline, Group
from snapstone.segment import Segment

MIB = 1 << 20
ROWS = 3072


def state(rank: int, factor: int) -> dict[str, Any]:
    return {
        "w": torch.arange(ROWS * 1024, dtype=torch.float32).reshape(ROWS, 1024) * factor,
        "own": {f"of-{rank}": torch.full((300_000,), float((rank + 1) * factor))},
    }


def load(
    rank: int, path: Path, nodes: int = 1, strategy: Any = "scatter", timeout: float = LONG_S, **options: Any
) -> None:
    """In many rounds."""
    os.environ["SNAPSTONE_NODE"] = f"node-{rank % nodes}"
    rounds.BUCKET_BYTES = rounds.BUCKET_BYTES_PER_NODE = MIB
    target = state(rank, 0)
    checkpoint = ss.load(target, checkpoint_id=path, strategy=strategy, timeout=timeout, **options)
    expected = state(rank, 1)
    assert strategy == "direct" or checkpoint.stats["rounds"] > 3
    assert torch.equal(target["w"], expected["w"])
    assert torch.equal(target["own"][f"of-{rank}"], expected["own"][f"of-{rank}"])


def outcome(action: Callable[[], None]) -> tuple[str, tuple[int, ...], float]:
    """Name of the error, the ranks that it blames, and the seconds that it took."""
    begin = time.monotonic()
    try:
        action()
    except BaseException as error:
        return type(error).__name__, getattr(error, "failed_ranks", ()), time.monotonic() - begin
    return "loaded", (), time.monotonic() - begin


def _save(rank: int, path: Path) -> None:
    ss.save(state(rank, 1), checkpoint_id=path)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    values(run_ranks(3, _save, tmp_path / "c"))
    return tmp_path / "c"


def _load(rank: int, path: Path, nodes: int) -> tuple[str, tuple[int, ...], float]:
    return outcome(lambda: load(rank, path, nodes))


@pytest.mark.parametrize("nodes", [1, 3])
def test_a_data_file_that_only_one_rank_reads_and_misses_fails_all_at_once(saved: Path, nodes: int) -> None:
    (saved / "rank-00001.data").unlink()
    found = values(run_ranks(3, _load, saved, nodes))
    assert [name for name, _, _ in found] == ["RankFailedError", "IncompleteCheckpointError", "RankFailedError"]
    assert [failed for _, failed, _ in found] == [(1,), (), (1,)]
    assert max(seconds for _, _, seconds in found) < AT_ONCE_S


def _fail_between_votes(rank: int, path: Path, step: str, nodes: int) -> tuple[Any, Any]:
    def fail(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    owner: Any = joint._JointLoad if hasattr(joint._JointLoad, step) else rounds.Rounds
    real = getattr(owner, step)
    if rank == 1:
        setattr(owner, step, fail)
    first = outcome(lambda: load(rank, path, nodes))
    setattr(owner, step, real)
    return first, outcome(lambda: load(rank, path))


@pytest.mark.parametrize("nodes", [1, 3])
@pytest.mark.parametrize("step", ["_exchange_boxes", "_divide", "_map_segment", "_start_alone", "_take"])
def test_ctrl_c_between_two_votes_is_told_to_all_at_once_and_the_next_load_works(
    saved: Path, step: str, nodes: int
) -> None:
    found = values(run_ranks(3, _fail_between_votes, saved, step, nodes))
    for rank, ((name, failed, seconds), (after, _, _)) in enumerate(found):
        assert (name, failed) == (("KeyboardInterrupt", ()) if rank == 1 else ("RankFailedError", (1,)))
        assert seconds < AT_ONCE_S
        assert after == "loaded"


def _raise_in_progress(rank: int, path: Path) -> tuple[str, tuple[int, ...], float]:
    def report(done: int, _: int) -> None:
        if rank == 2 and done > MIB:
            raise ValueError("no")

    return outcome(lambda: load(rank, path, progress=report))


def test_a_progress_callback_that_raises_fails_all_at_once(saved: Path) -> None:
    found = values(run_ranks(3, _raise_in_progress, saved))
    assert [(name, failed) for name, failed, _ in found] == [("RankFailedError", (2,))] * 2 + [("ValueError", ())]
    assert max(seconds for _, _, seconds in found) < AT_ONCE_S


LONG_MIB = 384


def _long(rank: int) -> dict[str, Any]:
    """Of which rank 1 has much alone."""
    return {"w": torch.ones(1024), "own": {f"of-{rank}": torch.ones(LONG_MIB * MIB if rank else 1, dtype=torch.uint8)}}


def _save_long(rank: int, path: Path) -> None:
    ss.save(_long(rank), checkpoint_id=path)


def _end_at_first_bytes(rank: int, path: Path) -> tuple[str, int]:
    """What it raised, and how many reads it began in all."""

    def fail(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    def begun() -> int:
        return int(_native.fault_seen("uring_read") + _native.fault_seen("pread"))

    if rank == 1:
        rounds.Rounds._finish = fail  # type: ignore[method-assign]
        _native.fault_arm("uring_read:1+:delay=4;pread:1+:delay=4")
    try:
        ss.load(_long(rank), checkpoint_id=path, strategy="scatter", timeout=LONG_S)
    except BaseException as error:
        raised = error  # with the frames in it, which are no reason to go on
    before, now = -1, begun()
    while before < now:
        time.sleep(0.3)
        before, now = now, begun()
    return type(raised).__name__, now


def test_a_load_that_was_interrupted_reads_no_further(tmp_path: Path) -> None:
    values(run_ranks(2, _save_long, tmp_path / "c"))
    (lost, _), (interrupted, reads) = values(run_ranks(2, _end_at_first_bytes, tmp_path / "c"))
    assert (lost, interrupted) == ("RankFailedError", "KeyboardInterrupt")
    assert 1 < reads < LONG_MIB * 2 / 3  # of 1 MiB; those in flight come to an end


def _load_with(rank: int, path: Path, strategies: list[str]) -> tuple[Any, Any]:
    first = outcome(lambda: load(rank, path, strategy=strategies[rank]))
    return first, outcome(lambda: load(rank, path))


@pytest.mark.parametrize(
    "strategies", [("scatter", "broadcast", "scatter"), ("direct", "scatter", "scatter"), ("auto", "auto", "direct")]
)
def test_different_strategies_are_refused_on_every_rank(saved: Path, strategies: tuple[str, ...]) -> None:
    for (name, _, seconds), (after, _, _) in values(run_ranks(3, _load_with, saved, strategies)):
        assert name == "ValueError"
        assert seconds < AT_ONCE_S
        assert after == "loaded"


def _end_in_transfer(rank: int, path: Path, signum: int) -> tuple[str, tuple[int, ...], float]:
    real = fabric.Fabric.transfer
    rounds = []

    def transfer(*arguments: Any) -> None:
        rounds.append(0)
        if len(rounds) == 3:
            os.kill(os.getpid(), signum)
        real(*arguments)

    if rank == 1:
        fabric.Fabric.transfer = transfer  # type: ignore[method-assign]
    return outcome(lambda: load(rank, path, nodes=3, timeout=5))


@pytest.mark.parametrize(("signum", "how"), [(signal.SIGKILL, "died"), (signal.SIGSTOP, "stopped")])
def test_a_rank_that_is_lost_between_vote_and_transfer_is_named(saved: Path, signum: int, how: str) -> None:
    results = run_ranks(3, _end_in_transfer, saved, signum)
    assert [result.outcome for result in results] == ["returned", how, "returned"]
    for result in (results[0], results[2]):
        name, failed, seconds = result.value
        assert (name, failed) == ("RankFailedError", (1,))
        assert seconds < (AT_ONCE_S if how == "died" else 5 + LATE_S)


def _interrupt_transfer(rank: int, path: Path) -> tuple[Any, Any]:
    real = fabric._limit
    waits = []

    def interrupt(deadline: Any) -> Any:
        waits.append(0)
        if len(waits) == 5:
            raise KeyboardInterrupt  # its messages are posted
        return real(deadline)

    if rank == 1:
        fabric._limit = interrupt
    first = outcome(lambda: load(rank, path, nodes=3, timeout=10))
    return first, outcome(lambda: load(rank, path, nodes=3, timeout=10))


def test_messages_of_a_load_that_was_interrupted_do_not_reach_the_next_one(saved: Path) -> None:
    for rank, ((name, _, _), (after, _, _)) in enumerate(values(run_ranks(3, _interrupt_transfer, saved))):
        assert name == ("KeyboardInterrupt" if rank == 1 else "RankFailedError")
        assert after == "loaded"


def _cast(rank: int, path: Path, strategy: str) -> list[tuple[int, int]]:
    rounds.BUCKET_BYTES = MIB
    reports: list[tuple[int, int]] = []
    target = {"w": torch.zeros(ROWS, 1024, dtype=torch.bfloat16)}
    options: Any = {"strategy": strategy, "strict": False, "cast": True}
    stats = ss.load(target, checkpoint_id=path, progress=lambda *report: reports.append(report), **options).stats
    assert torch.equal(target["w"], state(0, 1)["w"].bfloat16())
    assert stats["bytes_needed"] == ROWS * 1024 * 4
    return reports


@pytest.mark.parametrize("strategy", ["direct", "scatter", "broadcast"])
def test_progress_counts_saved_bytes_up_to_its_total_when_dtypes_differ(saved: Path, strategy: str) -> None:
    total = ROWS * 1024 * 4
    for reports in values(run_ranks(3, _cast, saved, strategy)):
        assert reports == sorted(reports)
        assert reports[-1] == (total, total)


REPLACE = """
import sys, torch, snapstone
state = {"w": torch.ones(int(sys.argv[2]), 1024), "own": {f"of-{i}": torch.ones(300_000) for i in range(3)}}
snapstone.save(state, checkpoint_id=sys.argv[1], overwrite=True)
"""


def _replaced(rank: int, path: Path, verify: bool) -> str:
    replaced = []

    def replace(done: int, _: int) -> None:
        if rank == 0 and done > MIB and not replaced:
            replaced.append(True)
            env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
            subprocess.run([sys.executable, "-c", REPLACE, str(path), str(ROWS)], check=True, env=env)

    with pytest.raises(ss.CheckpointError) as caught:
        load(rank, path, verify=verify, progress=replace, strict=False)
    return str(caught.value)


def _save_alone(rank: int, path: Path) -> None:
    own = {f"of-{i}": torch.full((300_000,), float(i + 1)) for i in range(3)}
    ss.save({"w": state(0, 1)["w"], "own": own}, checkpoint_id=path)


@pytest.mark.parametrize("verify", [True, False])
def test_a_checkpoint_that_is_replaced_meanwhile_is_not_mixed_with_its_successor(tmp_path: Path, verify: bool) -> None:
    values(run_ranks(1, _save_alone, tmp_path / "c"))
    messages = values(run_ranks(3, _replaced, tmp_path / "c", verify, timeout=90))
    assert all("the checkpoint was replaced while it was read" in message for message in messages)


def test_a_segment_is_opened_only_as_the_one_that_was_made() -> None:
    mine, other = Segment.make(4096), Segment.make(4096)
    again = Segment.open(mine.path, 4096)
    mine.tensor(0, 1).fill_(7)
    assert again.tensor(0, 1).item() == 7
    place, _, name = mine.path.partition(" ")
    for wrong in (f"{other.path.partition(' ')[0]} {name}", f"/proc/{os.getpid()}/fd/0 {name}", f"{place} elsewhere"):
        with pytest.raises(OSError, match="not the segment"):
            Segment.open(wrong, 4096)
    for one in (mine, other, again):
        one.close()


def test_a_segment_that_cannot_be_made_or_opened_leaves_no_descriptor() -> None:
    segment = Segment.make(4096)
    before = segment_descriptors()
    nbytes, limits = 64 * MIB, resource.getrlimit(resource.RLIMIT_AS)
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + nbytes // 2, limits[1]))
    try:
        with pytest.raises(OSError, match=rf"{nbytes} bytes to share.*memory; strategy='direct' needs none") as caught:
            Segment.make(nbytes)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
    assert caught.value.errno == errno.ENOMEM
    with pytest.raises(OverflowError, match="too large"):
        Segment.make(1 << 64)
    with pytest.raises(ValueError, match="greater than file size"):
        Segment.open(segment.path, 8192)
    assert segment_descriptors() == before != set()
    segment.close()


def _limited(rank: int, path: Path) -> tuple[str, str]:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if rank == 0:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    with pytest.raises((OSError, ss.RankFailedError)) as caught:
        load(rank, path)
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    load(rank, path)
    return type(caught.value).__name__, str(caught.value)


def test_without_memory_to_share_every_rank_hears_what_needs_none(saved: Path) -> None:
    found = values(run_ranks(3, _limited, saved, store="launcher"))  # a FileStore would meet the limit too
    assert [name for name, _ in found] == ["OSError", "RankFailedError", "RankFailedError"]
    assert all("strategy='direct' needs none" in message for _, message in found)


def _given_up(rank: int, path: Path) -> tuple[str, tuple[int, ...], str]:
    """Rank 1 has a second for the load. The others have more, and read the last round when rank 1 has given it up."""
    given_up = path.parent / "given up"
    keep_in_step, read = rounds.Rounds._keep_in_step, rounds.Rounds._read

    def kept(self: rounds.Rounds) -> bytes:
        ended = keep_in_step(self)
        given_up.touch()
        return ended

    def waited(self: rounds.Rounds, k: int) -> None:
        end = time.monotonic() + 30
        while k == len(self._division.rounds) - 1 and not given_up.exists() and time.monotonic() < end:
            time.sleep(0.005)
        read(self, k)

    if rank == 1:
        rounds.Rounds._keep_in_step = kept  # type: ignore[method-assign]
    else:
        rounds.Rounds._read = waited  # type: ignore[method-assign]
    with pytest.raises(ss.CheckpointError) as caught:
        load(rank, path, timeout=1.0 if rank else LONG_S)
    return type(caught.value).__name__, getattr(caught.value, "failed_ranks", ()), str(caught.value)


def test_a_load_of_which_one_rank_has_had_no_part_is_a_failure_on_all(saved: Path) -> None:
    for name, _, message in values(run_ranks(3, _given_up, saved)):
        assert name == "CheckpointError"
        assert "load did not end within" in message


def _exchanged_late(rank: int) -> tuple[str, tuple[int, ...]]:
    deadline = Deadline(1.0)
    if rank == 1:
        time.sleep(1.5)
    memory = torch.zeros(8, dtype=torch.uint8)
    mine, theirs = fabric.Message(memory, 1 - rank, 0), fabric.Message(memory.clone(), 1 - rank, 0)
    with pytest.raises(ss.CheckpointError) as caught:
        fabric.Fabric(None, Group.create()).transfer([mine], [theirs], deadline)
    return type(caught.value).__name__, getattr(caught.value, "failed_ranks", ())


def test_who_comes_late_to_an_exchange_does_not_blame_who_has_waited() -> None:
    assert values(run_ranks(2, _exchanged_late)) == [("RankFailedError", (1,)), ("CheckpointError", ())]
