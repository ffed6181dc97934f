"""Promise 6 between ranks: every conversation ends by its deadline, and ends the same way on every rank.

Real processes over real stores; ranks raise, die, stop and come late. Times are measured inside the ranks.
"""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch.distributed as dist
from ranks import Ranks, Result, Store, announce, run_ranks, values

from snapstone.collective import Channel, Deadline, Group
from snapstone.errors import RankFailedError

LATE_S = 2.0  # past the deadline: the longest that a call may take


def _own(rank: int) -> bytes:
    return b"rank %d" % rank


def _fails(call: Callable[[], Any]) -> tuple[str, tuple[int, ...], float]:
    """The message, ranks and seconds of the RankFailedError that `call` must raise."""
    begin = time.monotonic()
    with pytest.raises(RankFailedError) as caught:
        call()
    return str(caught.value), caught.value.failed_ranks, time.monotonic() - begin


def _meet() -> None:
    """Every rank is here, and knows that every rank is: rank 0's close() waits for the others."""
    channel = Group.create().channel("start")
    channel.exchange("start", b"", Deadline(20))
    channel.close()


# ---- what is said is heard


def _all_verbs(rank: int) -> dict[str, Any]:
    channel = Group.create().channel("save")
    deadline = Deadline(20)
    heard = {
        "exchange": channel.exchange("names", _own(rank), deadline),
        "gather": channel.gather("index", _own(rank), deadline, "after"),
        "broadcast": channel.broadcast("id", b"save id" if rank == 0 else None, deadline),
        "agree": channel.agree("config", b"same", deadline),
        "disagree": channel.agree("rank", b"x" if rank == 0 else b"y", deadline),
        "vote": channel.vote("written", None, _own(rank), deadline),
        "empty": channel.exchange("nothing", b"", deadline),
    }
    channel.close()
    return heard


@pytest.mark.parametrize(
    ("world_size", "store"), [(1, "file"), (2, "tcp"), (2, "env"), (3, "launcher"), (4, "file"), (4, "tcp")]
)
def test_every_verb_gives_every_rank_what_the_others_said(world_size: int, store: Store) -> None:
    everyone = [_own(rank) for rank in range(world_size)]
    for rank, heard in enumerate(values(run_ranks(world_size, _all_verbs, store=store))):
        assert heard == {
            "exchange": everyone,
            "gather": everyone if rank == 0 else None,
            "broadcast": b"save id",
            "agree": True,
            "disagree": world_size == 1,
            "vote": everyone,
            "empty": [b""] * world_size,
        }


def _large(rank: int, nbytes: int) -> list[bool]:
    payloads = [random.Random(seed).randbytes(nbytes) + bytes(nbytes) for seed in range(2)]
    with_deadline = Deadline(20)
    channel = Group.create().channel("save")
    exchanged = channel.exchange("large", payloads[rank], with_deadline)
    broadcast = channel.broadcast("index", payloads[0] if rank == 0 else None, with_deadline)
    channel.close()
    return [exchanged == payloads, broadcast == payloads[0]]


def test_payloads_above_the_stores_own_limit_arrive_whole() -> None:
    assert values(run_ranks(2, _large, 9 << 20, store="tcp")) == [[True, True]] * 2


def test_one_process_needs_no_store_and_no_peers() -> None:
    for group in (Group.create(), Group.create(no_dist=True)):
        channel = group.channel("save")
        soon = Deadline(0)
        assert (group.rank, group.world_size) == (0, 1)
        assert channel.exchange("a", b"x", soon) == [b"x"]
        assert channel.gather("b", b"x", soon, "after") == [b"x"]
        assert channel.broadcast("c", b"x", soon) == b"x"
        with pytest.raises(ValueError, match="broadcast 'f': rank 0 must pass a payload"):
            channel.broadcast("f", None, soon)
        assert channel.agree("d", b"x", soon)
        with pytest.raises(OSError, match="mine"):
            channel.vote("e", OSError("mine"), b"", soon)
        channel.close()


def test_a_label_is_used_once() -> None:
    channel = Group.create(no_dist=True).channel("save")
    channel.exchange("a", b"", Deadline(1))
    with pytest.raises(ValueError, match="'a' is used twice"):
        channel.exchange("a", b"", Deadline(1))


# ---- an error is a vote


def _vote_with_errors(rank: int, failing: list[int], busy: list[int], deadline_s: float) -> list[bytes]:
    _meet()
    channel = Group.create().channel("save")
    if rank in busy:
        time.sleep(1.5)
    error = OSError(28, f"disk of rank {rank} is full") if rank in failing else None
    try:
        return channel.vote("written", error, _own(rank), Deadline(deadline_s))
    finally:
        channel.close()


@pytest.mark.parametrize("failing", [0, 2])
@pytest.mark.parametrize("store", ["tcp", "file"])
def test_one_failing_rank_fails_all_at_once_and_is_named(failing: int, store: Store) -> None:
    for result in run_ranks(4, _vote_with_errors, [failing], [], 30.0, store=store):
        assert result.outcome == "raised"
        assert result.seconds < 2
        if result.rank == failing:
            assert type(result.error) is OSError
            assert "disk of rank" in str(result.error)
        else:
            assert isinstance(result.error, RankFailedError)
            assert result.error.failed_ranks == (failing,)
            assert f"rank {failing} failed: OSError: [Errno 28] disk of rank {failing} is full" in str(result.error)


def test_an_error_does_not_wait_for_ranks_that_still_write() -> None:
    results = run_ranks(4, _vote_with_errors, [1], [0, 3], 30.0)
    assert results[2].seconds < 1.0
    for result in (results[0], results[2], results[3]):
        assert isinstance(result.error, RankFailedError)
        assert result.error.failed_ranks == (1,)
        assert result.seconds < 2.5


def test_when_several_fail_each_raises_its_own_and_the_rest_agree() -> None:
    results = run_ranks(4, _vote_with_errors, [1, 3], [], 30.0)
    assert [type(result.error) for result in results] == [RankFailedError, OSError, RankFailedError, OSError]
    assert str(results[0].error) == str(results[2].error)
    assert "rank 1" in str(results[0].error) or "rank 3" in str(results[0].error)


def _racing_errors(rank: int, rounds: int) -> list[str]:
    group = Group.create()
    delays = random.Random(rank)
    told = []
    for _ in range(rounds):
        _meet()
        channel = group.channel("save")
        time.sleep(delays.uniform(0, 0.002))
        error = OSError(f"of rank {rank}") if rank in (1, 3) else None
        with pytest.raises(OSError if error else RankFailedError) as caught:
            channel.vote("written", error, b"", Deadline(20))
        told.append(str(caught.value))
        channel.close()
    return told


def test_of_two_outcomes_claimed_at_once_every_rank_obeys_the_same() -> None:
    leader, _, follower, _ = values(run_ranks(4, _racing_errors, 60, store="tcp"))
    assert leader == follower


# ---- silence is a vote too


def _vote_without(rank: int, silent: int, signum: int, deadline_s: float) -> tuple[str, tuple[int, ...], float]:
    _meet()
    channel = Group.create().channel("save")
    if rank == silent:
        time.sleep(0.3)  # the others are in their vote by now
        os.kill(os.getpid(), signum)
    try:
        return _fails(lambda: channel.vote("written", None, _own(rank), Deadline(deadline_s)))
    finally:
        channel.close()


def _survivors(results: list[Result], silent: int, outcome: str) -> list[Any]:
    assert results[silent].outcome == outcome
    return values(results[:silent] + results[silent + 1 :])


@pytest.mark.parametrize(
    ("signum", "outcome", "store"), [(signal.SIGKILL, "died", "tcp"), (signal.SIGSTOP, "stopped", "file")]
)
def test_a_rank_that_dies_or_stops_is_named_at_the_deadline(signum: int, outcome: str, store: Store) -> None:
    results = run_ranks(4, _vote_without, 2, signum, 1.5, store=store)
    told = _survivors(results, 2, outcome)
    for message, failed_ranks, seconds in told:
        assert failed_ranks == (2,)
        assert "no answer from rank 2 within 1.5 s" in message
        assert 1.4 < seconds < 1.5 + LATE_S
    assert len({message for message, _, _ in told}) == 1


def test_rank_0_stopped_with_the_store_in_it_holds_nobody_past_the_deadline() -> None:
    results = run_ranks(3, _vote_without, 0, signal.SIGSTOP, 1.0, store="tcp")
    for message, failed_ranks, seconds in _survivors(results, 0, "stopped"):
        assert failed_ranks == (0,)
        assert "served by rank 0 or its launcher, gave no answer" in message
        assert 0.9 < seconds < 1.0 + LATE_S


def test_rank_0_killed_with_the_store_in_it_is_noticed_at_once() -> None:
    results = run_ranks(3, _vote_without, 0, signal.SIGKILL, 30.0, store="tcp")
    for message, failed_ranks, seconds in _survivors(results, 0, "died"):
        assert failed_ranks == (0,)
        assert "broke the connection" in message
        assert seconds < 2


def test_rank_0_stopped_with_the_store_elsewhere_is_named_by_all() -> None:
    results = run_ranks(3, _vote_without, 0, signal.SIGSTOP, 1.0, store="launcher")
    told = _survivors(results, 0, "stopped")
    for message, failed_ranks, seconds in told:
        assert failed_ranks == (0,)
        assert "no answer from rank 0 within 1 s" in message
        assert seconds < 1.0 + LATE_S
    assert len({message for message, _, _ in told}) == 1


def _comes_after_its_own_deadline(rank: int) -> tuple[str, tuple[int, ...], float]:
    _meet()
    channel = Group.create().channel("save")
    if rank != 0:
        time.sleep(1.0)
    try:
        return _fails(lambda: channel.vote("written", None, _own(rank), Deadline(20 if rank else 0)))
    finally:
        channel.close()


def test_a_rank_that_comes_after_its_deadline_names_itself_with_the_others() -> None:
    for message, failed_ranks, _ in values(run_ranks(3, _comes_after_its_own_deadline)):
        assert "no answer from 3 ranks (0, 1, 2)" in message
        assert failed_ranks == (0, 1, 2)


def _after_an_outage(rank: int) -> list[float]:
    group = Group.create()
    _meet()
    if rank == 0:
        os.kill(os.getpid(), signal.SIGSTOP)  # the launcher wakes it up
    else:
        first = _fails(lambda: group.channel("save").exchange("a", b"", Deadline(0.5)))
        second = _fails(lambda: group.channel("save").exchange("b", b"", Deadline(0.5)))
        announce("failed twice")
        return [first[2], second[2], group.channel("load").exchange("c", b"", Deadline(20)) == [b"", b""]]
    for _ in range(2):
        group.channel("save")
    return [0.0, 0.0, group.channel("load").exchange("c", b"", Deadline(20)) == [b"", b""]]


def test_after_an_outage_of_the_store_the_next_operation_works() -> None:
    with Ranks(2, _after_an_outage, store="tcp") as ranks:
        ranks.wait_for(1, "failed twice")
        ranks.signal(0, signal.SIGCONT)
        for first_s, second_s, works in values(ranks.results(30)):
            assert first_s < 0.5 + LATE_S
            assert second_s < 0.5 + LATE_S
            assert works


def _stuck_call(rank: int) -> tuple[float, list[bytes]]:
    group = Group.create()
    _, _, seconds = _fails(lambda: group.call(lambda store: time.sleep(60), Deadline(0.2)))
    return seconds, group.channel("save").exchange("a", _own(rank), Deadline(20))


def test_a_store_call_that_never_returns_costs_one_operation_only() -> None:
    for seconds, heard in values(run_ranks(2, _stuck_call)):
        assert seconds < 1
        assert heard == [_own(0), _own(1)]


def _dead_store(rank: int) -> list[float]:
    _meet()
    if rank == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.3)
    return [_fails(lambda: Group.create().channel("save").exchange("a", b"", Deadline(20)))[2] for _ in range(3)]


def test_a_dead_store_fails_every_later_operation_at_once() -> None:
    results = run_ranks(2, _dead_store, store="tcp")
    assert max(values(results[1:])[0]) < 1


def _late_leader(rank: int) -> tuple[str, tuple[int, ...], float]:
    _meet()
    channel = Group.create().channel("save")
    if rank == 0:
        time.sleep(2.0)
    told = _fails(lambda: channel.vote("written", None, b"", Deadline(0.5)))
    channel.close()
    return told


def test_a_rank_0_that_comes_late_obeys_what_the_others_decided() -> None:
    told = values(run_ranks(3, _late_leader))
    assert len({message for message, _, _ in told}) == 1
    assert {failed_ranks for _, failed_ranks, _ in told} == {(0,)}


def _one_way(rank: int) -> list[tuple[str, tuple[int, ...], float]]:
    told = []
    channel = Group.create().channel("load")
    if rank == 0:
        told.append(_fails(lambda: channel.gather("index", b"", Deadline(1.0), "after")))
    elif rank == 1:
        channel.gather("index", b"", Deadline(1.0), "after")
        told.append(_fails(lambda: channel.broadcast("plan", None, Deadline(1.0))))
    return told


def test_gather_names_who_is_missing_and_broadcast_names_rank_0() -> None:
    gathered, awaited, _ = values(run_ranks(3, _one_way))
    assert gathered[0][1] == (2,)
    assert awaited[0][1] == (0,)
    for told in (gathered[0], awaited[0]):
        assert 0.9 < told[2] < 1.0 + LATE_S


def _interrupted(rank: int) -> float:
    _meet()
    channel = Group.create().channel("save")
    if rank == 0:
        return 0.0
    threading.Timer(0.5, announce, ["waiting"]).start()
    with pytest.raises(KeyboardInterrupt):
        channel.exchange("never", b"", Deadline(60))
    return time.monotonic()


def test_ctrl_c_ends_a_wait() -> None:
    with Ranks(2, _interrupted) as ranks:
        ranks.wait_for(1, "waiting")
        sent = time.monotonic()
        ranks.signal(1, signal.SIGINT)
        assert values(ranks.results(20))[1] - sent < 1.0


# ---- many operations, many groups


def _many(rank: int, count: int) -> list[int]:
    group = Group.create()
    store: Any = dist.distributed_c10d._get_default_store()
    while hasattr(store, "underlying_store"):
        store = store.underlying_store
    keys = []
    for index in range(count):
        channel = group.channel("save")
        deadline = Deadline(20)
        channel.gather("index", bytes(10_000), deadline, "after")
        assert len(channel.vote("written", None, _own(rank), deadline)) == group.world_size
        assert channel.broadcast("done", _own(index) if rank == 0 else None, deadline) == _own(index)
        channel.close()
        keys.append(store.num_keys())
    return keys


def test_two_hundred_operations_leave_no_keys_behind() -> None:
    for keys in values(run_ranks(2, _many, 200, store="tcp")):
        assert max(keys[100:]) <= max(keys[:20]) + 4
        assert keys[-1] < 60


def _two_threads(rank: int, count: int) -> dict[str, list[list[bytes]]]:
    group = Group.create()
    heard: dict[str, list[list[bytes]]] = {}

    def talk(channel: Channel) -> None:
        deadline = Deadline(20)
        heard[channel.kind] = [
            channel.exchange(str(index), f"{channel.kind} {index} {rank}".encode(), deadline) for index in range(count)
        ]
        channel.close()

    channels = [group.channel("first"), group.channel("second")]
    # Opposite orders: neither conversation may wait for the other.
    threads = [threading.Thread(target=talk, args=[channel]) for channel in (channels if rank else channels[::-1])]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return heard


def test_two_channels_at_once_do_not_disturb_each_other() -> None:
    for heard in values(run_ranks(2, _two_threads, 20, store="tcp")):
        for kind in ("first", "second"):
            assert heard[kind] == [[f"{kind} {index} {rank}".encode() for rank in range(2)] for index in range(20)]


def _subgroup(rank: int) -> Any:
    subgroup = dist.new_group([1, 3])
    if rank not in (1, 3):
        with pytest.raises(ValueError, match="not a member"):
            Group.create(subgroup)
        return Group.create().channel("all").exchange("a", _own(rank), Deadline(20))
    group = Group.create(subgroup)
    assert Group.create(subgroup) is group
    channel = group.channel("save")
    heard = channel.exchange("a", _own(rank), Deadline(20))
    assert heard == [_own(1), _own(3)]
    told = None
    if rank == 1:
        told = _fails(lambda: channel.vote("b", None, b"", Deadline(20)))
    else:
        with pytest.raises(OSError, match="full"):
            channel.vote("b", OSError("full"), b"", Deadline(20))
    channel.close()
    everyone = Group.create().channel("all").exchange("a", _own(rank), Deadline(20))
    return (group.rank, group.world_size, group.ranks, told, everyone)


def test_a_subgroup_talks_alone_and_names_global_ranks() -> None:
    results = values(run_ranks(4, _subgroup))
    everyone = [_own(rank) for rank in range(4)]
    assert results[0] == results[2] == everyone
    assert results[1][:3] == (0, 2, (1, 3))
    assert results[3][:3] == (1, 2, (1, 3))
    assert results[1][3][1] == (3,)
    assert "rank 3 failed: OSError: full" in results[1][3][0]
    assert results[1][4] == results[3][4] == everyone


def _hasty_rank_0(rank: int) -> bytes:
    channel = Group.create().channel("save")
    if rank != 0:
        time.sleep(0.7)
    outcome = channel.broadcast("committed", b"yes" if rank == 0 else None, Deadline(10))
    channel.close()
    if rank == 0:
        os._exit(0)  # and the store with it
    return outcome


def test_rank_0_that_exits_after_close_takes_no_answer_with_it() -> None:
    results = run_ranks(3, _hasty_rank_0, store="tcp")
    assert results[0].exitcode == 0
    assert values(results[1:]) == [b"yes", b"yes"]


def _second_life(rank: int) -> list[bytes]:
    store = dist.distributed_c10d._get_default_store()
    lives = []
    for life in range(2):
        dist.destroy_process_group()
        dist.init_process_group("gloo", store=dist.PrefixStore(f"gloo {life}", store), rank=rank, world_size=2)
        dist.distributed_c10d._world.pg_map[dist.group.WORLD] = ("gloo", store)  # same store, same group name
        channel = Group.create().channel("save")
        lives.append(channel.exchange("life", b"%d" % life, Deadline(10)))
        # Never closed, as after a failure: its keys stay in the store.
    return lives[1]


def test_a_group_built_again_on_the_same_store_does_not_hear_its_former_self() -> None:
    assert values(run_ranks(2, _second_life, store="launcher")) == [[b"1", b"1"]] * 2


def _unusable_groups(rank: int) -> int:
    child = os.fork()
    if child == 0:
        try:
            Group.create()
        except ValueError as error:
            os._exit(7 if "belongs to the process that forked this one" in str(error) else 8)
        os._exit(9)
    dist.distributed_c10d._world.pg_map[dist.group.WORLD] = ("mpi", None)  # as a group of MPI is entered
    with pytest.raises(ValueError, match="process_group: its backend has no key-value store"):
        Group.create()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_a_group_of_a_forking_parent_or_without_a_store_is_refused() -> None:
    assert values(run_ranks(1, _unusable_groups)) == [7]
