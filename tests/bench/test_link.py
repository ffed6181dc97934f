"""`snapstone bench link`: real ranks, whose bytes arrive; and what a machine without a partner or device says."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from bench.conftest import measure
from snapstone.bench import results
from snapstone.bench.link import PIECE_BYTES
from snapstone.report import Measurements, csv_text, page


def rows_of(document: Any) -> dict[tuple[str, str], Any]:
    return {(one["transport"], one["operation"]): one for one in document["links"]}


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_measure_what_arrives_at_each(tmp_path: Path, ranks: int) -> None:
    before = set(os.listdir("/dev/shm"))
    done = measure(tmp_path, "link", "--size", "17MiB", "--samples", 2, "--out", tmp_path, ranks=ranks)
    assert done.returncode == 0, done.stdout + done.stderr
    document = results.read(tmp_path / f"link-{ranks}-ranks.json")
    assert document["complete"]
    assert document["problems"] == []
    assert document["environment"]["world"] == {"ranks": ranks, "nodes": 1, "backend": "gloo"}
    rows = rows_of(document)
    nbytes = PIECE_BYTES * ranks
    arriving = ranks * (PIECE_BYTES // ranks) * (ranks - 1)
    for link, expected in (
        (("memory", "copy"), nbytes),
        (("gloo", "broadcast"), nbytes),
        (("gloo", "all_gather"), arriving),
    ):
        assert (rows[link]["nbytes"], rows[link]["reason"]) == (expected, None)
        assert len(rows[link]["bytes_per_second"]) == 2
        assert all(1e6 < rate < 1e12 for rate in rows[link]["bytes_per_second"])
    for link in (("nccl", "broadcast"), ("nccl", "all_gather"), ("cuda", "d2h"), ("cuda", "h2d")):
        assert rows[link]["bytes_per_second"] == []
        assert "CUDA" in rows[link]["reason"]
    assert [line.split()[:2] for line in done.stdout.splitlines() if line.startswith(("memory ", "gloo "))] == [
        ["memory", "copy"],
        ["gloo", "broadcast"],
        ["gloo", "all_gather"],
    ]
    assert not [name for name in set(os.listdir("/dev/shm")) - before if name.startswith("snapstone-bench-")]
    measurements = Measurements.read(tmp_path)
    assert 'id="chart-link-1"' in page(measurements)
    assert f"link-{ranks}-ranks.json,link,memory,measured,,copy,B/s,0," in csv_text(measurements)


def test_alone_there_is_nobody_to_send_to(tmp_path: Path) -> None:
    done = measure(tmp_path, "link", "--samples", 1, "--size", "16MiB", "--json")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document.pop("schema") == "snapstone.bench-link/1"
    assert document["complete"] is True
    assert [one["bytes_per_second"] for one in document["links"]] == [[]] * 7
    assert all(one["reason"] for one in document["links"])


def test_more_than_fits_is_refused_with_the_numbers(tmp_path: Path) -> None:
    done = measure(tmp_path, "link", "--size", "100TiB", "--out", tmp_path)
    assert done.returncode == 4
    assert "bytes of memory are needed on a node and" in done.stderr
    assert not list(tmp_path.glob("link-*"))


@pytest.mark.needs_cuda
def test_a_device_is_measured_in_both_directions(tmp_path: Path) -> None:
    done = measure(tmp_path, "link", "--device", "cuda", "--size", "64MiB", "--samples", 2, "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    rows = rows_of(results.read(tmp_path / "link-1-ranks.json"))
    assert all(len(rows["cuda", operation]["bytes_per_second"]) == 2 for operation in ("d2h", "h2d"))
