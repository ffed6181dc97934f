"""From the figures of a cluster to rows: bytes over rates, the published cases, and what a bigger cluster costs."""

from __future__ import annotations

import json
import math
from dataclasses import fields, replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from snapstone.bench.cluster import (
    KINDS,
    SIZES,
    Cluster,
    Given,
    Measured,
    Modelled,
    StallModel,
    mtbf_gpu_hours,
    plan,
    plan_row,
    shares,
    timing_of,
)

PROPERTY = settings(max_examples=100, deadline=None)
ENGINES = [Modelled(kind, kind) for kind in KINDS]

positive = st.floats(1e-3, 1e15)
clusters = st.builds(
    Cluster,
    state_bytes_per_gpu=positive,
    state_bytes=st.none() | positive,
    replicas=st.sampled_from([1, 2, 8]),
    gpus_per_host=st.integers(1, 72),
    d2h_bytes_per_second=positive,
    disk_write_bytes_per_second=positive,
    disk_read_bytes_per_second=positive,
    shared_bytes_per_second=st.none() | positive,
    fabric_bytes_per_second=positive,
    step_seconds=st.floats(1e-3, 1e4),
    overlap_share=st.floats(0, 1),
    mtbf_gpu_hours=st.floats(1e-3, 1e9),
    restart_seconds=st.floats(0, 1e5),
    load_seconds=st.none() | st.floats(0, 1e5),
    load_strategy=st.sampled_from(["direct", "scatter"]),
)
engines = st.one_of(
    st.builds(Modelled, st.just("x"), st.sampled_from(KINDS), st.floats(0, 100)),
    st.builds(Measured, st.just("x"), st.floats(0, 1), positive, st.none() | positive),
    st.builds(lambda stall, more: Given("x", stall, stall + more), st.floats(0, 1e4), st.floats(0, 1e4)),
)


def test_llama_3_was_interrupted_every_three_hours() -> None:
    """466 interruptions in 54 days on 16,384 GPUs, 419 of them unexpected."""
    assert mtbf_gpu_hours(466, 54, 16_384) == pytest.approx(45_566, abs=1)
    assert mtbf_gpu_hours(419, 54, 16_384) == pytest.approx(50_677, abs=1)
    cluster = Cluster(mtbf_gpu_hours=mtbf_gpu_hours(466, 54, 16_384))
    assert cluster.mtbf_seconds(16_384) / 3600 == pytest.approx(2.78, abs=0.01)
    assert Cluster(mtbf_gpu_hours=mtbf_gpu_hours(419, 54, 16_384)).mtbf_seconds(16_384) / 3600 == pytest.approx(
        3.09, abs=0.01
    )


def test_one_failure_per_50_000_gpu_hours() -> None:
    every = {gpus: Cluster().mtbf_seconds(gpus) / 3600 for gpus in SIZES}
    assert every[8] == 6250
    assert every[16_384] == pytest.approx(3.05, abs=0.01)
    assert every[100_000] == 0.5


def test_times_are_bytes_over_rates() -> None:
    cluster = Cluster(
        state_bytes_per_gpu=10e9,
        d2h_bytes_per_second=50e9,
        disk_write_bytes_per_second=8e9,
        disk_read_bytes_per_second=20e9,
        step_seconds=0.1,
        overlap_share=0.5,
        restart_seconds=100,
    )
    blocking, staged, hidden = (timing_of(engine, cluster, 64) for engine in ENGINES)
    assert blocking.stall_seconds == pytest.approx(0.2 + 80 / 8)
    assert staged.stall_seconds == pytest.approx(0.2)
    assert hidden.stall_seconds == pytest.approx(0.2 - 0.05)
    assert {timing.durable_seconds for timing in (blocking, staged, hidden)} == {blocking.stall_seconds}
    assert staged.recovery_seconds == pytest.approx(100 + 80 / 20)
    assert timing_of(Modelled("x", "hidden", 0.7), replace(cluster, step_seconds=10), 64).stall_seconds == 0.7


def test_a_host_that_is_not_full_has_its_disk_for_fewer() -> None:
    cluster = Cluster(state_bytes_per_gpu=11e9)
    assert cluster.write_seconds(2) == 2
    assert cluster.write_seconds(8) == cluster.write_seconds(800) == 8
    assert (cluster.hosts(2), cluster.hosts(8), cluster.hosts(9), cluster.hosts(100_000)) == (1, 1, 2, 12_500)


def test_shared_storage_is_a_limit_of_all_hosts() -> None:
    cluster = Cluster(state_bytes_per_gpu=11e9, disk_read_bytes_per_second=88e9, shared_bytes_per_second=1e12)
    assert cluster.write_seconds(8) == 8
    assert cluster.write_seconds(100_000) == 1100
    assert cluster.read_seconds(100_000) == 1100
    assert replace(cluster, load_seconds=3).read_seconds(100_000) == 3


def test_the_state_of_a_model_is_divided_by_the_gpus() -> None:
    cluster = Cluster(state_bytes=16e12, replicas=4)
    assert cluster.bytes_per_gpu(16_000) == 4e9
    assert cluster.write_seconds(16_000) == pytest.approx(8 * 1e9 / 11e9)


def test_replicas_are_saved_once_and_read_once_only_by_scatter() -> None:
    cluster = Cluster(
        state_bytes_per_gpu=10e9, replicas=8, disk_read_bytes_per_second=20e9, fabric_bytes_per_second=40e9
    )
    assert cluster.write_seconds(64) == pytest.approx(10 / 11)
    assert cluster.read_seconds(64) == 4
    assert replace(cluster, load_strategy="scatter").read_seconds(64) == 70 / 40  # 10 GB read, 70 GB over the fabric
    slow = replace(cluster, shared_bytes_per_second=16e9)
    assert (slow.write_seconds(64), slow.read_seconds(64)) == (5, 40)
    assert replace(slow, load_strategy="scatter").read_seconds(64) == 5


def test_a_measured_engine_is_never_faster_than_it_was() -> None:
    engine = Measured("x", stall_seconds_per_byte=1e-10, write_bytes_per_second=4e9, load_bytes_per_second=2e9)
    timing = timing_of(engine, Cluster(restart_seconds=0), 64)
    assert timing.stall_seconds == pytest.approx(0.8)
    assert timing.durable_seconds == pytest.approx(64 / 4)
    assert timing.recovery_seconds == pytest.approx(64 / 2)
    slower_disk = timing_of(engine, Cluster(disk_write_bytes_per_second=1e9), 64)
    assert slower_disk.durable_seconds == pytest.approx(64)


@PROPERTY
@given(clusters, engines, st.integers(1, 20_000))
def test_every_row_is_finite_and_adds_up(cluster: Cluster, engine: StallModel, hosts: int) -> None:
    row = plan_row(cluster, engine, hosts * 8)
    json.dumps(row, allow_nan=False)
    parts = (row["goodput"], row["stall_share"], row["replay_share"], row["recovery_share"])
    assert sum(parts) == pytest.approx(1, abs=1e-9)
    assert row["durable_seconds"] >= row["stall_seconds"] >= 0
    assert row["cadence_seconds"] >= (row["durable_seconds"] - row["stall_seconds"]) * (1 - 1e-9)
    for other in (row["goodput_at_young"], row["goodput_at_daly"]):
        assert other is None or 0 <= other <= 1
    assert row["lost_seconds_per_failure"] >= row["replay_seconds_per_failure"] >= 0


@PROPERTY
@given(clusters, engines, st.integers(1, 10_000), st.integers(2, 10))
def test_more_gpus_never_have_better_goodput(cluster: Cluster, engine: StallModel, hosts: int, factor: int) -> None:
    """At one size of state per GPU: the same stall or a longer one, the same time to durable or a longer one."""
    cluster = replace(cluster, state_bytes=None, gpus_per_host=8)
    few, many = (plan_row(cluster, engine, gpus) for gpus in (8 * hosts, 8 * hosts * factor))
    assert many["goodput"] <= few["goodput"] * (1 + 1e-9) + 1e-12
    assert many["mtbf_seconds"] == pytest.approx(few["mtbf_seconds"] / factor)


def test_a_row_is_for_the_cadence_that_was_asked_for() -> None:
    cluster, engine = Cluster(), ENGINES[1]
    row = plan_row(cluster, engine, 16_384, interval_steps=50)
    best = plan_row(cluster, engine, 16_384)
    assert row["interval_steps"] == 50
    assert row["cadence_seconds"] == 50 * cluster.step_seconds
    assert row["goodput"] == shares(timing_of(engine, cluster, 16_384), 310).goodput < best["goodput"]
    assert row["cadence_seconds_exact"] == best["cadence_seconds_exact"]


def test_every_engine_and_size_has_a_row() -> None:
    rows = plan(Cluster(), ENGINES)
    assert [(row["engine"], row["gpus"]) for row in rows] == [(kind, gpus) for kind in KINDS for gpus in SIZES]
    assert all(row["simulated_goodput"] is None for row in rows)
    by = {(row["engine"], row["gpus"]): row["goodput"] for row in rows}
    assert all(by["blocking", gpus] < by["staged", gpus] < by["hidden", gpus] for gpus in SIZES)


def test_rows_are_simulated_where_failures_are_not_rare() -> None:
    pytest.importorskip("simpy", reason="the simulation needs the package simpy")
    rare, common = plan(Cluster(), [ENGINES[1]], (8, 32_768), runs=5, seed=3)
    assert rare["simulated_goodput"] is None
    spread = common["simulated_goodput"]
    assert spread is not None
    assert spread["low"] < spread["median"] < spread["high"]
    assert spread["low"] - 0.005 < common["goodput"] < spread["high"] + 0.005
    assert common == plan(Cluster(), [ENGINES[1]], (32_768,), runs=5, seed=3)[0]


@pytest.mark.parametrize("name", [figure.name for figure in fields(Cluster) if figure.name != "load_strategy"])
def test_impossible_figures_are_refused_by_name(name: str) -> None:
    for value in (-1, math.nan, math.inf, 1e31):
        with pytest.raises(ValueError, match=f"^{name}="):
            Cluster(**{name: value})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"load_strategy": "teleport"}, "load_strategy='teleport': direct or scatter"),
        ({"overlap_share": 1.1}, "overlap_share=1.1: a part of a step"),
        ({"step_seconds": 0}, "step_seconds=0"),
        ({"mtbf_gpu_hours": 1e-10}, "mtbf_gpu_hours=1e-10: must be between"),
        ({"mtbf_gpu_hours": None}, "mtbf_gpu_hours: a number is needed"),
    ],
)
def test_other_figures_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Cluster(**values)


def test_impossible_plans_are_refused() -> None:
    for sizes, options, message in (
        ((0,), {}, "0 GPUs"),
        ((10**9,), {}, "must be 1 to 100000000"),
        ((8,), {"interval_steps": 0}, "interval_steps=0"),
        ((8,), {"runs": -1}, "runs=-1"),
    ):
        with pytest.raises(ValueError, match=message):
            plan(Cluster(), ENGINES, sizes, **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="10 GPUs cannot hold 4 replicas"):
        plan(Cluster(replicas=4), ENGINES, (10,))
    with pytest.raises(ValueError, match="needs 0 <= stall <= durable"):
        Given("x", 5, 4)
    with pytest.raises(ValueError, match="fixed_seconds=-1"):
        Modelled("x", "staged", -1)
