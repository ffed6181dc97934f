"""`snapstone bench load`: cold loads alone and by ranks of torchrun, each compared with what was saved.

Every measurement is a process of its own, or several: the command joins a process group.
"""

from __future__ import annotations

import json
import mmap
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import snapstone as ss
from bench.conftest import pinned_packages
from distributed.ranks import at_store, serve_store
from snapstone import _native
from snapstone.bench import results
from snapstone.bench.load_files import FILE_ENGINES, missing_package, raw_tensors
from snapstone.bench.load_targets import Targets, nbytes_of_rank

COMMAND = ["-m", "snapstone.bench", "load"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("load") / "step-3"
    ss.save(state(), checkpoint_id=path, step=3)
    return path


def state() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(3)
    weights = torch.randn(1023, 1024, generator=generator)
    return {
        "model": {"weight": weights, "half": weights.bfloat16(), "bias": torch.randn(1, generator=generator)},
        "step": torch.tensor(3),
        "note": "a value that is no tensor",
    }


def nbytes() -> int:
    return 1023 * 1024 * 6 + 4 + 8


def environment(**variables: str) -> dict[str, str]:
    path = os.pathsep.join([str(Path(ss.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **variables}


def run(checkpoint: Path, *arguments: str | Path, ranks: int = 1, **variables: str) -> subprocess.CompletedProcess[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    return subprocess.run(
        [sys.executable, *launcher, *COMMAND, "--from", str(checkpoint), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=100,
        env=environment(**variables),
    )


def by_strategy(document: Any) -> dict[str, Any]:
    return {load["strategy"]: load for load in document["loads"]}


def test_alone_one_strategy_is_measured_and_the_others_say_why_not(checkpoint: Path, tmp_path: Path) -> None:
    # Through the page cache, which the save has filled: cold only when its pages are dropped.
    done = run(checkpoint, "--samples", "3", "--out", tmp_path, "--json", SNAPSTONE_IO="buffered")
    assert done.returncode == 0, done.stderr
    printed = json.loads(done.stdout)
    assert printed.pop("schema") == "snapstone.bench-load/1"
    document = results.read(tmp_path / "load-1-ranks-replicated.json")
    assert printed == document
    assert document["complete"] is True
    assert document["checkpoint"] == {
        "path": str(checkpoint),
        "step": 3,
        "nbytes": nbytes(),
        "own_nbytes": (checkpoint / "rank-00000.data").stat().st_size,
        "world_size": 1,
        "layout": "replicated",
    }
    loads = by_strategy(document)
    direct = loads["direct"]
    assert (direct["status"], direct["reason"], direct["engine"]) == ("measured", None, "snapstone")
    assert len(direct["seconds"]) == 3
    assert all(seconds > 0 for seconds in direct["seconds"])
    assert nbytes() <= direct["bytes_read"] <= document["checkpoint"]["own_nbytes"]
    assert "POSIX_FADV_DONTNEED" in direct["cold_by"] or "in memory" in direct["cold_by"]
    for strategy in ("scatter", "broadcast"):
        assert (loads[strategy]["status"], loads[strategy]["seconds"]) == ("absent", [])
        assert "one rank" in loads[strategy]["reason"]


def test_ranks_that_read_for_each_other_read_once(checkpoint: Path, tmp_path: Path) -> None:
    done = run(checkpoint, "--samples", "2", "--out", tmp_path, ranks=2)
    assert done.returncode == 0, done.stderr
    document = results.read(tmp_path / "load-2-ranks-replicated.json")
    assert document["environment"]["world"]["ranks"] == 2
    loads = by_strategy(document)
    assert {load["status"] for load in loads.values()} == {"measured"}
    assert [len(loads[strategy]["seconds"]) for strategy in ("direct", "scatter", "broadcast")] == [2, 2, 2]
    assert loads["direct"]["bytes_read"] >= 2 * nbytes()
    assert loads["scatter"]["bytes_read"] < 1.1 * nbytes()
    assert loads["broadcast"]["bytes_read"] < 1.1 * nbytes()
    rows = [line.split() for line in done.stdout.splitlines() if line.startswith("snapstone ")]
    assert [row[1] for row in rows] == ["direct", "scatter", "broadcast"]  # rank 0 alone prints


def test_sharded_ranks_want_their_parts_alone(checkpoint: Path, tmp_path: Path) -> None:
    done = run(checkpoint, "--samples", "1", "--layout", "sharded", "--strategy", "direct", "--out", tmp_path, ranks=2)
    assert done.returncode == 0, done.stderr
    (direct,) = results.read(tmp_path / "load-2-ranks-sharded.json")["loads"]
    assert (direct["status"], len(direct["seconds"])) == ("measured", 1)
    assert direct["bytes_read"] < 1.5 * nbytes()  # chunks on the border are read twice


def test_a_damaged_checkpoint_is_a_failure_with_its_reason_and_no_time(tmp_path: Path) -> None:
    damaged = tmp_path / "damaged"
    ss.save(state(), checkpoint_id=damaged)
    data = bytearray((damaged / "rank-00000.data").read_bytes())
    data[5000] ^= 1
    (damaged / "rank-00000.data").write_bytes(data)
    done = run(damaged, "--samples", "1", "--out", tmp_path / "R")
    assert done.returncode == 1
    assert "rank-00000.data" in done.stderr
    assert results.read(tmp_path / "R" / "load-1-ranks-replicated.json")["complete"] is False


def test_a_load_that_fails_costs_its_strategy_and_no_other(checkpoint: Path, tmp_path: Path) -> None:
    """Reads fail from one of them on, in the middle of the second measured load."""
    variables = {"SNAPSTONE_IO": "buffered", "SNAPSTONE_FAULT": "pread:60+:errno=EIO"}
    done = run(checkpoint, "--samples", "50", "--strategy", "direct,auto", "--out", tmp_path, **variables)
    assert done.returncode == 1
    document = results.read(tmp_path / "load-1-ranks-replicated.json")
    loads = by_strategy(document)
    assert document["complete"] is False
    for load in loads.values():
        assert load["status"] == "partial"
        assert 0 < len(load["seconds"]) < 50
        assert "Input/output error" in load["reason"]
    assert "problem: direct: rank 0: " in done.stdout


def test_bytes_that_a_load_did_not_write_are_found(checkpoint: Path) -> None:
    with ss.Checkpoint.open(checkpoint) as opened:
        targets = Targets(opened.load_tensors().items(), "replicated", 0, 1)
    assert targets.nbytes == nbytes()
    targets.forget()
    assert targets.wrong() == ["model.weight", "model.half", "model.bias", "step"]
    ss.load(targets.state, checkpoint_id=checkpoint, strict=False)
    assert targets.wrong() == []
    targets.state["model.bias"].view(torch.uint8)[2] ^= 1
    assert targets.wrong() == ["model.bias"]
    targets.forget()
    assert len(targets.wrong()) == 4


def test_a_load_from_the_page_cache_is_not_passed_off_as_cold(checkpoint: Path, tmp_path: Path) -> None:
    if _native.file_system_facts(str(checkpoint))["memory_backed"]:
        pytest.skip("there are no cold loads from memory")
    with open(checkpoint / "rank-00000.data", "rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as data:
        assert len(set(data[::4096])) > 1  # in use here, so that no fadvise drops it
        done = run(checkpoint, "--samples", "1", "--out", tmp_path, SNAPSTONE_IO="buffered")
    assert done.returncode == 1, done.stderr
    (problem,) = results.read(tmp_path / "load-1-ranks-replicated.json")["problems"]
    assert "the others were in a cache" in problem


def test_memory_of_a_rank_is_its_part() -> None:
    assert nbytes_of_rank(1001, "replicated", 8) == 1001
    assert nbytes_of_rank(1001, "sharded", 8) == 126


def test_wrong_arguments_are_refused_before_anything_is_read(checkpoint: Path, tmp_path: Path) -> None:
    unknown = run(checkpoint, "--strategy", "direct,telepathy", "--out", tmp_path)
    assert unknown.returncode == 2
    assert "telepathy" in unknown.stderr
    assert run(tmp_path / "absent", "--out", tmp_path).returncode == 3
    assert list(tmp_path.iterdir()) == []


def test_a_safetensors_file_is_loaded_by_the_packages_that_are_there(tmp_path: Path) -> None:
    save_file = pytest.importorskip("safetensors.torch").save_file
    path = tmp_path / "model.safetensors"
    tensors = {**state()["model"], "step": state()["step"], "none": torch.empty(0, 3)}
    save_file(tensors, path)
    os.sync()  # what is not on the disk yet cannot be dropped
    done = run(path, "--samples", "2", "--out", tmp_path / "R")
    assert done.returncode == 0, done.stdout + done.stderr
    document = results.read(tmp_path / "R" / "load-1-ranks-replicated.json")
    assert [load["engine"] for load in document["loads"]] == list(FILE_ENGINES)
    for load in document["loads"]:
        if missing := missing_package(load["engine"]):
            assert load["engine"] not in pinned_packages()
            assert (load["status"], load["reason"], load["seconds"]) == ("absent", missing, [])
        else:
            assert (load["status"], load["strategy"], len(load["seconds"])) == ("measured", "file", 2)
            assert load["nbytes"] == path.stat().st_size
    assert run(path, "--layout", "sharded").returncode == 2


def test_the_raw_reader_finds_what_safetensors_wrote_and_refuses_the_rest(tmp_path: Path) -> None:
    save_file = pytest.importorskip("safetensors.torch").save_file
    path = tmp_path / "model.safetensors"
    tensors = {**state()["model"], "step": state()["step"], "none": torch.empty(0, 3)}
    save_file(tensors, path, metadata={"format": "pt"})
    found = dict(raw_tensors(str(path)))
    assert found.keys() == tensors.keys()
    assert all(
        torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype for name, tensor in tensors.items()
    )
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(ValueError, match="ends before"):
        dict(raw_tensors(str(path)))
    for wrong in (b"", b"\xff" * 16, (3).to_bytes(8, "little") + b"[1]"):
        path.write_bytes(wrong)
        with pytest.raises(ValueError, match="not a safetensors file"):
            dict(raw_tensors(str(path)))


class Slow:
    """Two ranks that load slowly, started by hand so that one of them can be killed."""

    def __init__(self, checkpoint: Path, out: Path) -> None:
        self.store = serve_store()
        arguments = ["--from", str(checkpoint), "--samples", "500", "--strategy", "direct", "--out", str(out)]
        where = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"} | at_store(self.store.port)
        self.document = out / "load-2-ranks-replicated.json"
        self.ranks = [
            subprocess.Popen(
                [sys.executable, *COMMAND, *arguments, "--timeout", "10"],
                env=environment(
                    **where,
                    RANK=str(rank),
                    LOCAL_RANK=str(rank),
                    SNAPSTONE_IO="buffered",
                    SNAPSTONE_FAULT="pread:1+:delay=20",
                ),
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(2)
        ]

    def wait_for_samples(self) -> None:
        deadline = time.monotonic() + 60
        while not (self.document.exists() and results.read(self.document)["loads"][0]["seconds"]):
            assert time.monotonic() < deadline
            assert all(rank.poll() is None for rank in self.ranks), [rank.communicate() for rank in self.ranks]
            time.sleep(0.05)


@pytest.fixture
def slow(checkpoint: Path, tmp_path: Path) -> Iterator[Slow]:
    ranks = Slow(checkpoint, tmp_path)
    yield ranks
    for process in ranks.ranks:
        process.kill()
        process.wait()


def test_a_rank_that_dies_leaves_what_was_measured(slow: Slow) -> None:
    slow.wait_for_samples()
    slow.ranks[1].kill()
    output, errors = slow.ranks[0].communicate(timeout=60)
    assert slow.ranks[0].returncode == 1, errors
    document = results.read(slow.document)
    assert document["complete"] is False
    assert len(document["loads"][0]["seconds"]) >= 1
    assert document["loads"][0]["status"] == "partial"
    (problem,) = document["problems"]
    assert "stopped: " in problem
    assert "problem: stopped: " in output


def test_rank_0_that_dies_leaves_what_was_measured(slow: Slow) -> None:
    slow.wait_for_samples()
    slow.ranks[0].kill()
    _, errors = slow.ranks[1].communicate(timeout=60)
    assert slow.ranks[1].returncode == 1, errors
    document = results.read(slow.document)
    assert document["complete"] is False
    assert len(document["loads"][0]["seconds"]) >= 1


def test_ctrl_c_writes_what_was_measured(slow: Slow) -> None:
    slow.wait_for_samples()
    for process in slow.ranks:
        process.send_signal(signal.SIGINT)
    assert slow.ranks[0].wait(timeout=60) == 130
    document = results.read(slow.document)
    assert (document["complete"], document["problems"]) == (False, ["interrupted"])
    assert document["loads"][0]["seconds"]
