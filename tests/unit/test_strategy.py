"""What `auto` chooses, and that it says why."""

from __future__ import annotations

import logging

import pytest

from snapstone.strategy import SMALL_BYTES, Need, Rates, choose, is_measured, union_bytes

GB = 10**9
DISK = Rates(storage=2 * GB, fabric=float("inf"), memory=10 * GB)


def replicas(count: int, nbytes: int, nodes: int = 1) -> list[Need]:
    return [Need("same", nbytes, f"node-{rank % nodes}") for rank in range(count)]


def shards(count: int, nbytes: int) -> list[Need]:
    return [Need(f"part {rank}", nbytes, "node-0") for rank in range(count)]


def test_what_is_asked_for_is_taken() -> None:
    for strategy in ("direct", "scatter", "broadcast"):
        assert choose(strategy, replicas(4, GB), GB, []) == strategy
        assert not is_measured(strategy, replicas(4, GB), GB)


def test_needs_that_do_not_overlap_are_read_alone_and_not_measured() -> None:
    assert choose("auto", shards(4, GB), 4 * GB, []) == "direct"
    assert not is_measured("auto", shards(4, GB), 4 * GB)


def test_distinct_needs_larger_than_the_checkpoint_overlap() -> None:
    columns_of_every_row = shards(4, GB)
    assert union_bytes(columns_of_every_row, GB) == GB
    assert is_measured("auto", columns_of_every_row, GB)
    assert choose("auto", columns_of_every_row, GB, [DISK] * 4) == "scatter"


def test_a_small_replica_is_broadcast_and_not_measured() -> None:
    assert choose("auto", replicas(4, SMALL_BYTES), SMALL_BYTES, []) == "broadcast"
    assert not is_measured("auto", replicas(4, SMALL_BYTES), SMALL_BYTES)


@pytest.mark.parametrize(
    ("rates", "nodes", "expected"),
    [
        (DISK, 1, "scatter"),
        (Rates(storage=2 * GB, fabric=GB, memory=10 * GB), 4, "direct"),
        (Rates(storage=GB / 10, fabric=GB, memory=10 * GB), 4, "scatter"),
        (Rates(storage=GB, fabric=GB / 10, memory=10 * GB), 4, "direct"),
        (Rates(storage=100 * GB, fabric=float("inf"), memory=GB), 1, "direct"),
    ],
)
def test_speeds_decide(rates: Rates, nodes: int, expected: str) -> None:
    assert choose("auto", replicas(4, GB, nodes), GB, [rates] * 4) == expected


def test_ranks_of_a_node_share_its_storage_however_they_measured_it() -> None:
    together = [Rates(GB / 2, float("inf"), 10 * GB)] * 4
    one_after_the_other = [Rates(2 * GB, float("inf"), 10 * GB)] * 4
    assert choose("auto", replicas(4, GB), GB, together) == "scatter"
    assert choose("auto", replicas(4, GB), GB, one_after_the_other) == "scatter"


def test_the_log_says_why(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="snapstone"):
        choose("auto", replicas(4, GB), GB, [DISK] * 4)
    assert caplog.messages == [
        "load: strategy scatter: 4 ranks on 1 nodes need 4000000000 bytes of which 1000000000 are distinct: "
        "each for itself takes 2.00 s, read once and exchanged 0.50 s"
    ]
