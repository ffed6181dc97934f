"""`snapstone.dcp.install`: whoever uses DCP's own names gets the engine, saves in the background hold the state of the
call, errors of theirs come out on every rank, and uninstalling puts back every name.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import _storage_utils, filesystem, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import snapstone as ss
from distributed.ranks import run_ranks, values
from snapstone import _native
from snapstone.dcp import StorageReader, StorageWriter, install, installed, uninstall

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

NAMES = [
    (_storage_utils, "FileSystemWriter"),
    (_storage_utils, "FileSystemReader"),
    (dcp, "FileSystemWriter"),
    (dcp, "FileSystemReader"),
    (dcp, "save"),
    (dcp, "load"),
    (state_dict_saver, "save"),
]


def test_writers_and_readers_constructed_by_name_are_the_engines(tmp_path: Path) -> None:
    state = {"t": torch.arange(5.0), "step": 3}
    dcp.save(state, storage_writer=dcp.FileSystemWriter(tmp_path / "stock"))
    with installed():
        os.makedirs(tmp_path / "ours")  # as Accelerate does
        dcp.save(state, storage_writer=dcp.FileSystemWriter(tmp_path / "ours", thread_count=2), planner=None)
        for name in ("ours", "stock"):
            loaded = {"t": torch.zeros(5), "step": 0}
            dcp.load(loaded, storage_reader=dcp.FileSystemReader(tmp_path / name))
            assert torch.equal(loaded["t"], state["t"])
            assert loaded["step"] == 3
        assert isinstance(dcp.FileSystemReader(str(tmp_path)), StorageReader)
    assert ss.verify(tmp_path / "ours")


def test_classes_derived_while_installed_are_stock(tmp_path: Path) -> None:
    with installed():

        class Writer(dcp.FileSystemWriter):  # type: ignore[misc]
            pass

        assert isinstance(StorageWriter(), dcp.FileSystemWriter)
        assert not isinstance(StorageWriter(), Writer)
        assert isinstance(filesystem.FileSystemWriter(tmp_path), dcp.FileSystemWriter)
        dcp.save({"t": torch.ones(3)}, storage_writer=Writer(tmp_path / "c"))
    assert isinstance(Writer(tmp_path), filesystem.FileSystemWriter)
    assert not (tmp_path / "c" / "MANIFEST.json").exists()
    assert (tmp_path / "c" / ".metadata").exists()


def test_uninstall_puts_back_every_name() -> None:
    stock = [getattr(owner, name) for owner, name in NAMES]
    install(asynchronous=True)
    assert dcp.save is not state_dict_saver.save
    install()
    assert dcp.save is state_dict_saver.save
    with installed(asynchronous=True):
        assert dcp.save is not state_dict_saver.save
    assert dcp.save is state_dict_saver.save
    assert dcp.FileSystemWriter is not filesystem.FileSystemWriter  # as before the block
    install(asynchronous=True)
    uninstall()
    assert [getattr(owner, name) for owner, name in NAMES] == stock
    with pytest.raises(ValueError, match="in_flight=0"):
        install(in_flight=0)


@pytest.fixture
def slow_writes() -> Any:
    _native.fault_arm("fsync:1+:delay=150")
    yield
    _native.fault_disarm()


def test_a_save_in_the_background_holds_the_state_of_the_call(tmp_path: Path, slow_writes: Any) -> None:
    state = {"t": torch.zeros(1000), "list": [0]}
    with installed(asynchronous=True):
        for number in range(5):
            state["t"].fill_(number)
            state["list"][0] = number
            handle = dcp.save(state, checkpoint_id=tmp_path / f"c{number}")
            assert not (tmp_path / f"c{number}").exists()
        state["t"].fill_(-1)
        assert isinstance(handle, ss.SaveHandle)
        loaded = {"t": torch.zeros(1000), "list": [0]}
        dcp.load(loaded, checkpoint_id=tmp_path / "c4")  # waits
        assert loaded["t"].eq(4).all()
        dcp.save({"t": torch.ones(1)}, checkpoint_id=tmp_path / "c4")
        dcp.save({"t": torch.zeros(1)}, checkpoint_id=tmp_path / "c4")  # waits for the one before
        assert ss.Checkpoint.open(tmp_path / "c4").get_tensor("t").item() == 1
    ss.wait()
    assert ss.Checkpoint.open(tmp_path / "c4").get_tensor("t").item() == 0
    for number in range(4):
        assert ss.verify(tmp_path / f"c{number}")
        found = ss.Checkpoint.open(tmp_path / f"c{number}").state_dict()
        assert found["t"].eq(number).all()
        assert found["list"] == [number]


def test_no_more_saves_are_in_flight_than_allowed(tmp_path: Path, slow_writes: Any) -> None:
    with installed(asynchronous=True, in_flight=1):
        first = dcp.save({"t": torch.ones(9)}, checkpoint_id=tmp_path / "a")
        assert not first.done()
        second = dcp.save({"t": torch.ones(9)}, checkpoint_id=tmp_path / "b")
        assert first.done()
        second.result()


def test_errors_come_with_wait_or_with_the_next_use_of_the_path(tmp_path: Path) -> None:
    def fail(name: str) -> None:
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / "precious").touch()
        dcp.save({"t": torch.ones(3)}, checkpoint_id=tmp_path / name)

    with installed(asynchronous=True):
        fail("a")
        with pytest.raises(CheckpointException, match="target exists"):
            ss.wait()
        ss.wait()
        dcp.save({"t": torch.ones(3)}, checkpoint_id=tmp_path / "b")  # an error is told once
        ss.wait()
        fail("c")
        with pytest.raises(CheckpointException, match="target exists"):
            dcp.load({"t": torch.ones(3)}, checkpoint_id=tmp_path / "c")
        fail("d")
        with pytest.raises(CheckpointException, match="target exists"):
            fail("d")
    ss.wait()


def test_other_storage_stays_as_it_is(tmp_path: Path) -> None:
    with installed(asynchronous=True):
        dcp.save({"t": torch.ones(3)}, storage_writer=dcp.HuggingFaceStorageWriter(str(tmp_path)))
        assert list(tmp_path.glob("*.safetensors"))


def _ranks_save(rank: int, run: Path) -> list[str]:
    mesh = init_device_mesh("cpu", (2,))
    told = []
    with installed(asynchronous=True):
        state: dict[str, Any] = {"t": distribute_tensor(torch.zeros(8, 3), mesh, [Shard(0)])}
        for number in range(4):
            state["t"].to_local().fill_(number)
            os.makedirs(run / f"s{number}" / "model", exist_ok=True)
            writer = dcp.FileSystemWriter(run / f"s{number}" / "model")
            dcp.save(state, storage_writer=writer, planner=dcp.DefaultSavePlanner())
            for _ in range(5):  # the training's own collectives, meanwhile
                dist.all_reduce(torch.ones(3))
        ss.wait()
        bad = {"t": torch.zeros(3, device="meta")} if rank == 1 else {"t": torch.zeros(3)}
        try:
            dcp.save(bad, checkpoint_id=run / "bad")
        except TypeError as error:
            told.append(f"call: {error}")
        try:
            ss.wait()
        except CheckpointException as error:
            told.append(f"wait: {error}")
        # Only rank 0's store of the error is timed differently: the next saves begin on both ranks all the same.
        time.sleep(0.2 * rank)
        dcp.save(state, checkpoint_id=run / "after")
        ss.wait()
    return told


def test_ranks_agree_and_training_goes_on_meanwhile(tmp_path: Path) -> None:
    first, second = values(run_ranks(2, _ranks_save, tmp_path))
    for number in range(4):
        assert ss.Checkpoint.open(tmp_path / f"s{number}" / "model").get_tensor("t").eq(number).all()
    assert ss.verify(tmp_path / "after")
    assert [one.split(":")[0] for one in first] == ["wait"]
    assert "meta" in first[0]
    assert [one.split(":")[0] for one in second] == ["call"]
    assert not (tmp_path / "bad").exists()
