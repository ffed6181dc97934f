"""Delta saves: only what changed is written, and the checkpoint is as whole as any other."""

from __future__ import annotations

import os
import shutil
import threading
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import snapstone as ss
from format import reference_reader
from snapstone import base as base_module
from snapstone import index

CHUNK = 64 << 10
State = dict[str, Any]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SNAPSTONE_CHUNK_BYTES", str(CHUNK))


@pytest.fixture
def forgetful(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a process that has just started."""
    monkeypatch.setattr(base_module.Memory, "find", lambda *_: None)


def some_state(seed: int = 0) -> State:
    generator = torch.Generator().manual_seed(seed)
    return {
        "frozen": torch.randn(100_000, generator=generator),
        "busy": torch.randn(300, 200, generator=generator),
        "strided": torch.randn(200, 100, generator=generator).T,
        "small": [torch.randn(9, generator=generator) for _ in range(5)],
        "empty": torch.empty(0, 4),
        "step": seed,
    }


def blank() -> State:
    state = some_state(7)
    return {**state, "small": [tensor * 0 for tensor in state["small"]], "frozen": state["frozen"] * 0, "step": None}


def assert_holds(path: Path, state: State) -> None:
    loaded = blank()
    ss.load(loaded, checkpoint_id=path)
    for name in ("frozen", "busy", "strided", "empty"):
        assert torch.equal(loaded[name], state[name]), name
    assert all(map(torch.equal, loaded["small"], state["small"]))
    assert loaded["step"] == state["step"]
    report = ss.verify(path)
    assert report, report.problems
    contents = reference_reader.read(path)
    assert contents.tensors["frozen"].data == state["frozen"].numpy().tobytes()
    assert contents.tensors["busy"].data == state["busy"].numpy().tobytes()


def shared_files(path: Path) -> list[str]:
    return sorted(os.listdir(path / "base")) if (path / "base").exists() else []


def test_nothing_is_written_when_nothing_changed(tmp_path: Path) -> None:
    state = some_state()
    ss.save(state, checkpoint_id=tmp_path / "a")
    saved = ss.save(state, checkpoint_id=tmp_path / "b", base=tmp_path / "a")
    assert saved.own_nbytes == 0
    assert saved.stats["unchanged_chunks"] == saved.stats["chunks"]
    assert (tmp_path / "b" / "rank-00000.data").stat().st_size == 0
    (linked,) = shared_files(tmp_path / "b")
    assert os.path.samefile(tmp_path / "b" / "base" / linked, tmp_path / "a" / "rank-00000.data")
    assert_holds(tmp_path / "b", state)


@pytest.mark.parametrize("remembers", [True, False])
def test_only_changed_chunks_are_written(tmp_path: Path, remembers: bool, request: pytest.FixtureRequest) -> None:
    if not remembers:
        request.getfixturevalue("forgetful")
    state = some_state()
    ss.save(state, checkpoint_id=tmp_path / "a")
    state["frozen"][20_000] += 1  # in the second of its chunks
    saved = ss.save(state, checkpoint_id=tmp_path / "b", base=tmp_path / "a")
    assert saved.own_nbytes == CHUNK
    assert saved.stats["own_bytes"] == CHUNK
    assert saved.stats["depth"] == 1
    assert 0.5 < saved.stats["live_fraction"] < 1.0
    assert saved.shared_nbytes == saved.stats["shared_bytes"]
    assert_holds(tmp_path / "b", state)
    state["frozen"][20_000] -= 1
    assert_holds(tmp_path / "a", state)


def test_each_checkpoint_stands_alone(tmp_path: Path) -> None:
    state = some_state()
    run = tmp_path / "run"
    states = []
    for step in range(6):
        state["step"] = step
        state["busy"] = state["busy"] + 1
        ss.save(state, checkpoint_id=run / f"step-{step}", base="auto")
        states.append({**state})
    shutil.copytree(run / "step-5", tmp_path / "copied")
    (run / "step-4").rename(run / "moved")
    for step in (0, 2, 3):
        shutil.rmtree(run / f"step-{step}")
    assert_holds(run / "step-1", states[1])
    assert_holds(run / "moved", states[4])
    assert_holds(run / "step-5", states[5])
    assert_holds(tmp_path / "copied", states[5])
    assert os.stat(tmp_path / "copied" / "base" / shared_files(run / "step-5")[0]).st_nlink == 1


def test_auto_takes_the_checkpoint_committed_last_and_none_is_a_full_save(tmp_path: Path) -> None:
    state = some_state()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        first = ss.save(state, checkpoint_id=tmp_path / "run" / "z", base="auto")
    assert first.manifest.base is None
    ss.save(some_state(1), checkpoint_id=tmp_path / "run" / "a", base=None)
    saved = ss.save(some_state(1), checkpoint_id=tmp_path / "run" / "m", base="auto")
    assert saved.manifest.base is not None
    assert (saved.manifest.base.name, saved.own_nbytes) == ("a", 0)


def test_a_file_of_which_less_than_half_is_used_is_dropped(tmp_path: Path) -> None:
    state = some_state()
    first = ss.save(state, checkpoint_id=tmp_path / "a")
    kept = state["busy"].clone()
    for name in ("frozen", "strided"):
        state[name] = state[name] + 1
    saved = ss.save(state, checkpoint_id=tmp_path / "b", base=tmp_path / "a")
    assert shared_files(tmp_path / "b") == []
    assert saved.stats["carried_bytes"] == (tmp_path / "b" / "rank-00000.carried.data").stat().st_size > 0
    assert saved.stats["amplification"] == 1.0
    assert 0 < saved.stats["unchanged_chunks"] < saved.stats["chunks"]
    assert saved.own_nbytes == first.own_nbytes
    assert_holds(tmp_path / "b", state)
    state["frozen"] = state["frozen"] + 1
    again = ss.save(state, checkpoint_id=tmp_path / "c", base=tmp_path / "b")
    assert any("carried" in name for name in shared_files(tmp_path / "c"))
    assert again.own_nbytes < first.own_nbytes
    shutil.rmtree(tmp_path / "a")
    shutil.rmtree(tmp_path / "b")
    assert torch.equal(state["busy"], kept)
    assert_holds(tmp_path / "c", state)


def test_space_stays_bounded_however_the_state_drifts(tmp_path: Path) -> None:
    state = some_state()
    generator = torch.Generator().manual_seed(5)
    for step in range(40):
        rows = torch.randint(0, 300, (60,), generator=generator)
        state["busy"][rows] += 1
        state["frozen"][int(torch.randint(0, 100_000, (1,), generator=generator))] += 1
        state["step"] = step
        saved = ss.save(state, checkpoint_id=tmp_path / str(step), base="auto")
        assert saved.stats.get("amplification", 1.0) <= 2.0
        for name in shared_files(tmp_path / str(step)):
            used = _used_bytes(tmp_path / str(step), f"base/{name}")
            assert 2 * used >= (tmp_path / str(step) / "base" / name).stat().st_size, name
        if step:
            shutil.rmtree(tmp_path / str(step - 1))
    assert_holds(tmp_path / "39", state)


def _used_bytes(path: Path, name: str) -> int:
    (one,) = ss.Checkpoint.open(path).reader.indexes
    records = np.frombuffer(one.table, index.CHUNK_DTYPE)
    chunks = np.unique(records[records["file"] == one.files.index(name)])
    return int(index.padded(chunks["stored_bytes"]).sum())


def test_every_nth_save_is_full(tmp_path: Path) -> None:
    state = some_state()
    depths = []
    for step in range(7):
        saved = ss.save(state, checkpoint_id=tmp_path / str(step), base="auto", full_every=3)
        depths.append(saved.manifest.base.depth if saved.manifest.base else 0)
    assert depths == [0, 1, 2, 0, 1, 2, 0]


def test_a_state_that_changed_shape_shares_what_lines_up(tmp_path: Path) -> None:
    state = some_state()
    ss.save(state, checkpoint_id=tmp_path / "a")
    added: State = {"new": torch.randn(50_000), **state}
    saved = ss.save(added, checkpoint_id=tmp_path / "b", base=tmp_path / "a")
    assert saved.own_nbytes <= 200_000 + 3 * CHUNK  # the new one, and what it is packed with
    assert torch.equal(ss.Checkpoint.open(tmp_path / "b").get_tensor("frozen"), state["frozen"])
    del added["busy"]
    added["frozen"] = added["frozen"].reshape(1000, 100)
    saved = ss.save(added, checkpoint_id=tmp_path / "c", base="auto")
    for name, tensor in added.items():
        if isinstance(tensor, torch.Tensor):
            assert torch.equal(ss.Checkpoint.open(tmp_path / "c").get_tensor(name), tensor), name
    assert ss.verify(tmp_path / "c")


def test_equal_bytes_of_another_dtype_or_name_are_their_own(tmp_path: Path) -> None:
    bits = torch.arange(100_000, dtype=torch.int32)
    ss.save({"a": bits}, checkpoint_id=tmp_path / "a")
    saved = ss.save({"a": bits.view(torch.float32)}, checkpoint_id=tmp_path / "b", base="auto")
    assert saved.own_nbytes >= 400_000
    assert ss.Checkpoint.open(tmp_path / "b").get_tensor("a").dtype == torch.float32
    saved = ss.save({"c": bits}, checkpoint_id=tmp_path / "c", base=tmp_path / "a")
    assert saved.own_nbytes >= 400_000


@pytest.mark.parametrize("chunk_bytes", [128 << 10, 96 << 10])
def test_another_chunk_size_shares_nothing_wrongly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk_bytes: int
) -> None:
    state = some_state()
    ss.save(state, checkpoint_id=tmp_path / "a")
    monkeypatch.setenv("SNAPSTONE_CHUNK_BYTES", str(chunk_bytes))
    ss.save(state, checkpoint_id=tmp_path / "b", base="auto")
    assert_holds(tmp_path / "b", state)


def test_overwriting_the_base_itself(tmp_path: Path) -> None:
    state = some_state()
    for step in range(3):
        state["step"] = step
        state["busy"] = state["busy"] + step
        ss.save(state, checkpoint_id=tmp_path / "last", base="auto", overwrite=True)
    assert shared_files(tmp_path / "last")
    assert_holds(tmp_path / "last", state)
    with pytest.raises(FileExistsError):
        ss.save(state, checkpoint_id=tmp_path / "last", base=tmp_path / "last")


def test_tied_tensors_come_apart_and_together(tmp_path: Path) -> None:
    tied = torch.randn(60_000)
    ss.save({"a": tied, "b": tied}, checkpoint_id=tmp_path / "1")
    apart = {"a": tied, "b": tied.clone()}
    saved = ss.save(apart, checkpoint_id=tmp_path / "2", base="auto")
    apart["b"] += 1
    ss.save(apart, checkpoint_id=tmp_path / "3", base="auto")
    ss.save({"a": tied, "b": tied}, checkpoint_id=tmp_path / "4", base="auto")
    assert saved.own_nbytes <= 60_000 * 4 + CHUNK
    for step, b in ((2, tied), (3, apart["b"]), (4, tied)):
        checkpoint = ss.Checkpoint.open(tmp_path / str(step))
        assert torch.equal(checkpoint.get_tensor("a"), tied)
        assert torch.equal(checkpoint.get_tensor("b"), b)
        assert ss.verify(tmp_path / str(step))


@pytest.mark.parametrize("codec", ["zstd", "xor-zstd", "xor-zstd:1"])
def test_codecs_and_deltas_mix(tmp_path: Path, codec: str) -> None:
    state = some_state()
    states = {}
    for step in range(8):
        state["step"] = step
        state["busy"] = state["busy"] * (1 + 1e-4)
        chosen = codec if step % 3 else None
        ss.save(state, checkpoint_id=tmp_path / str(step), base="auto", codec=chosen, keyframe_every=3)
        states[step] = {**state}
    for step in (0, 3):
        shutil.rmtree(tmp_path / str(step))
        del states[step]
    for step, expected in states.items():
        assert_holds(tmp_path / str(step), expected)


def test_differences_are_smaller_and_end_at_keyframes(tmp_path: Path) -> None:
    weights = (torch.randn(200_000) * 0.02).bfloat16()
    depths, sizes = [], []
    for step in range(9):
        weights = (weights.float() * (1 + 1e-3 * torch.randn(200_000) * (torch.rand(200_000) < 0.1))).bfloat16()
        saved = ss.save(
            {"w": weights}, checkpoint_id=tmp_path / str(step), base="auto", codec="xor-zstd", keyframe_every=3
        )
        kind = saved.stats["codecs"]["bfloat16 w"]
        depths.append(len(shared_files(tmp_path / str(step))))
        sizes.append(kind["stored_bytes"])
        assert (kind["differences"] > 0) == (step % 3 != 0)
        assert kind["ratio"] == kind["raw_bytes"] / kind["stored_bytes"]
        assert kind["bytes_per_second"] > 0
        assert torch.equal(ss.Checkpoint.open(tmp_path / str(step)).get_tensor("w"), weights)
    assert depths == [0, 1, 2] * 3
    assert max(sizes[1], sizes[2]) < 0.5 * sizes[0]
    for step in range(8):
        shutil.rmtree(tmp_path / str(step))
    assert torch.equal(ss.Checkpoint.open(tmp_path / "8").get_tensor("w"), weights)


def test_the_snapshot_instant_holds_with_a_base(tmp_path: Path) -> None:
    """What is compared is what the state was at the call, whatever the optimizer does afterwards."""
    model = torch.nn.Linear(400, 300)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)

    def step() -> None:
        optimizer.zero_grad()
        model(torch.randn(4, 400)).square().sum().backward()
        optimizer.step()

    step()
    ss.save({"m": model.state_dict()}, checkpoint_id=tmp_path / "a")
    for number in range(5):
        handles = [
            ss.async_save({"m": model.state_dict()}, checkpoint_id=tmp_path / f"{number}", base="auto", fence=optimizer)
        ]
        expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        step()
        handles[0].result()
        checkpoint = ss.Checkpoint.open(tmp_path / f"{number}")
        for name, tensor in expected.items():
            assert torch.equal(checkpoint.get_tensor(f"m.{name}"), tensor)


def test_saves_of_two_threads_share_one_base(tmp_path: Path) -> None:
    state = some_state()
    ss.save(state, checkpoint_id=tmp_path / "base")
    changed = [{**state, "busy": state["busy"] + number} for number in range(4)]
    threads = [
        threading.Thread(
            target=ss.save, args=(one,), kwargs={"checkpoint_id": tmp_path / str(n), "base": tmp_path / "base"}
        )
        for n, one in enumerate(changed)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, one in enumerate(changed):
        assert_holds(tmp_path / str(number), one)


# The guard against stale copies ---------------------------------------------------------------------------------------


def trained(steps: int) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = torch.nn.Linear(300, 300)
    optimizer = torch.optim.Adam(model.parameters())
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(4, 300)).square().sum().backward()
        optimizer.step()
    return model, optimizer


@pytest.mark.parametrize("based", [True, False])
def test_a_later_step_with_the_optimizer_state_of_an_earlier_one(tmp_path: Path, based: bool) -> None:
    model, optimizer = trained(3)
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    base = "auto" if based else None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ss.save(state, checkpoint_id=tmp_path / "1", step=1, base=base)
        ss.save(state, checkpoint_id=tmp_path / "1b", step=1, base=base)
        ss.save(state, checkpoint_id=tmp_path / "2i", step=2, base=base, on_unchanged="ignore")
    with pytest.warns(RuntimeWarning, match="stale"):
        ss.save(state, checkpoint_id=tmp_path / "3", step=3, base=base)
    with pytest.raises(ss.CheckpointError, match="stale"):
        ss.save(state, checkpoint_id=tmp_path / "4", step=4, base=base, on_unchanged="raise")
    assert not (tmp_path / "4").exists()
    assert sorted(os.listdir(tmp_path)) == ["1", "1b", "2i", "3"]
    model, optimizer = trained(4)
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ss.save(state, checkpoint_id=tmp_path / "5", step=5, base=base, on_unchanged="raise")


def test_a_frozen_model_without_an_optimizer_is_no_news(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(3):
            ss.save(some_state(), checkpoint_id=tmp_path / str(step), step=step, base="auto", on_unchanged="raise")


def test_bad_options_are_refused(tmp_path: Path) -> None:
    for options in ({"full_every": 0}, {"keyframe_every": 65}, {"on_unchanged": "no"}, {"base": ""}, {"codec": "xor"}):
        with pytest.raises(ValueError, match=next(iter(options))):
            ss.save(some_state(), checkpoint_id=tmp_path / "x", **options)  # type: ignore[arg-type]
    assert os.listdir(tmp_path) == []
