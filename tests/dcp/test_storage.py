"""StorageWriter and StorageReader in one process: one format with `ss.save`, no pickle read, nothing lost."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn, optim
from torch.distributed.checkpoint import _storage_utils
from torch.distributed.checkpoint.api import CheckpointException

import snapstone as ss
from roundtrip.bits import nested_equal
from snapstone import _native
from snapstone.dcp import SavePlanner, StorageReader, StorageWriter, install, installed, uninstall

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def trained(seed: int = 0) -> dict[str, Any]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(70, 50), nn.Linear(50, 3))
    optimizer = optim.AdamW(model.parameters())
    model(torch.randn(4, 70)).sum().backward()
    optimizer.step()
    return {
        "model": model.state_dict(),
        "optim": optimizer.state_dict(),
        "step": 7 + seed,
        "rng": torch.get_rng_state(),
        "odd": {"scalar": torch.tensor(2.5), "empty": torch.zeros(0, 3), "strided": torch.randn(6, 8).t()},
        "bf16": torch.randn(9).to(torch.bfloat16),
        "text": "a",
        "pair": (1, 2.5),
    }


def blank() -> dict[str, Any]:
    def zero(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return torch.zeros_like(value)
        if isinstance(value, dict):
            return {key: zero(item) for key, item in value.items()}
        return [zero(item) for item in value] if isinstance(value, list) else type(value)()

    state: dict[str, Any] = zero(trained())
    return state


def root_error(info: pytest.ExceptionInfo[CheckpointException]) -> BaseException:
    (failure,) = info.value.failures.values()
    error: BaseException = failure[0]
    return error


def test_what_dcp_saves_through_the_engine_everything_loads(tmp_path: Path) -> None:
    state = trained()
    metadata = dcp.save(state, storage_writer=StorageWriter(tmp_path / "c"))
    assert isinstance(metadata.storage_meta, dcp.metadata.StorageMeta)
    assert ss.verify(tmp_path / "c")
    loaded = blank()
    dcp.load(loaded, storage_reader=StorageReader(tmp_path / "c"))
    assert nested_equal(loaded, state)
    loaded = blank()
    ss.load(loaded, checkpoint_id=tmp_path / "c")
    assert nested_equal(loaded, state)
    with ss.Checkpoint.open(tmp_path / "c") as checkpoint:
        assert torch.equal(checkpoint.get_tensor("model.0.weight"), state["model"]["0.weight"])
        assert checkpoint.save_id == metadata.storage_meta.save_id


def test_what_the_engine_saves_dcp_loads(tmp_path: Path) -> None:
    state = trained()
    ss.save(state, checkpoint_id=tmp_path / "c")
    loaded = blank()
    dcp.load(loaded, storage_reader=StorageReader(tmp_path / "c"))
    assert nested_equal(loaded, state)


def test_a_stock_checkpoint_is_read_as_it_is(tmp_path: Path) -> None:
    state = trained()
    dcp.save(state, storage_writer=dcp.FileSystemWriter(tmp_path / "c"))
    loaded = blank()
    dcp.load(loaded, storage_reader=StorageReader(tmp_path / "c"))
    assert nested_equal(loaded, state)


class Payload:
    def __init__(self, mark: str) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (self.mark,)


def test_a_planted_metadata_pickle_runs_nothing(tmp_path: Path) -> None:
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / ".metadata").write_bytes(pickle.dumps(Payload(str(tmp_path / "ran"))))
    with pytest.raises(CheckpointException, match=r"mkdir has no place in the metadata"):
        dcp.load({"t": torch.zeros(1)}, storage_reader=StorageReader(tmp_path / "c"))
    assert not (tmp_path / "ran").exists()


def test_a_planted_value_of_a_stock_checkpoint_runs_nothing(tmp_path: Path) -> None:
    state = {"t": torch.ones(2), "value": Payload(str(tmp_path / "ran"))}
    dcp.save(state, storage_writer=dcp.FileSystemWriter(tmp_path / "c"))
    with pytest.raises(CheckpointException) as info:
        dcp.load({"t": torch.zeros(2), "value": None}, storage_reader=StorageReader(tmp_path / "c"))
    assert isinstance(root_error(info), pickle.UnpicklingError)
    assert not (tmp_path / "ran").exists()


def test_the_marker_is_there_for_trainers_and_never_read(tmp_path: Path) -> None:
    dcp.save({"t": torch.ones(2)}, storage_writer=StorageWriter(tmp_path / "c"))
    marker = tmp_path / "c" / ".metadata"
    assert marker.is_file()
    marker.write_bytes(pickle.dumps(Payload(str(tmp_path / "ran"))))
    loaded = {"t": torch.zeros(2)}
    dcp.load(loaded, storage_reader=StorageReader(tmp_path / "c"))
    assert torch.equal(loaded["t"], torch.ones(2))
    assert not (tmp_path / "ran").exists()


def test_a_flipped_byte_never_loads(tmp_path: Path) -> None:
    dcp.save({"t": torch.ones(1000)}, storage_writer=StorageWriter(tmp_path / "c"))
    path = tmp_path / "c" / "rank-00000.data"
    data = bytearray(path.read_bytes())
    data[17] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointException) as info:
        dcp.load({"t": torch.zeros(1000)}, storage_reader=StorageReader(tmp_path / "c"))
    assert isinstance(root_error(info), ss.CorruptCheckpointError)


def test_one_writer_serves_many_saves_with_and_without_reset(tmp_path: Path) -> None:
    writer = StorageWriter(tmp_path / "a")
    ids = []
    for number in range(3):
        dcp.save({"t": torch.full((3,), float(number))}, storage_writer=writer)
        ids.append(writer.save_id)
        checkpoint = ss.Checkpoint.open(tmp_path / "a")
        assert (checkpoint.get_tensor("t") == number).all()
        assert checkpoint.save_id == writer.save_id
    dcp.save({"t": torch.ones(3)}, storage_writer=writer, checkpoint_id=tmp_path / "b")
    assert len({*ids, writer.save_id}) == 4
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]


def test_without_overwrite_the_old_checkpoint_stays(tmp_path: Path) -> None:
    dcp.save({"t": torch.ones(3)}, storage_writer=StorageWriter(tmp_path / "c"))
    with pytest.raises(CheckpointException, match="Checkpoint already exists"):
        dcp.save({"t": torch.zeros(3)}, storage_writer=StorageWriter(tmp_path / "c", overwrite=False))
    assert (ss.Checkpoint.open(tmp_path / "c").get_tensor("t") == 1).all()


@pytest.mark.parametrize(
    "rule", ["uring_write:1:errno=ENOSPC", "fsync:2:errno=EIO", "renameat2:1:errno=EIO", "mkdir:1:errno=EACCES"]
)
def test_a_failed_overwrite_leaves_the_old_checkpoint_and_nothing_else(tmp_path: Path, rule: str) -> None:
    dcp.save({"t": torch.ones(3)}, storage_writer=StorageWriter(tmp_path / "c"))
    writer = StorageWriter(tmp_path / "c")
    _native.fault_arm(rule)
    try:
        with pytest.raises(CheckpointException):
            dcp.save({"t": torch.zeros(3)}, storage_writer=writer)
    finally:
        _native.fault_disarm()
    assert (ss.Checkpoint.open(tmp_path / "c").get_tensor("t") == 1).all()
    assert os.listdir(tmp_path) == ["c"]


@pytest.mark.parametrize("planner_type", [dcp.DefaultSavePlanner, SavePlanner])
def test_the_stock_metadata_is_there_for_tools_that_want_it(tmp_path: Path, planner_type: Any) -> None:
    state = trained()
    dcp.save(state, storage_writer=dcp.FileSystemWriter(tmp_path / "stock"))
    writer = StorageWriter(tmp_path / "ours", dcp_metadata=True)
    for _ in range(2):
        returned = dcp.save(state, storage_writer=writer, planner=planner_type())
    assert b"snapstone" not in (tmp_path / "ours" / ".metadata").read_bytes()  # it loads where this is not installed
    stock = dcp.FileSystemReader(tmp_path / "stock").read_metadata()
    ours = dcp.FileSystemReader(tmp_path / "ours").read_metadata()
    assert ours.state_dict_metadata == stock.state_dict_metadata
    assert ours.planner_data == stock.planner_data
    assert ours.storage_data.keys() == stock.storage_data.keys()
    assert {info.relative_path for info in ours.storage_data.values()} <= set(os.listdir(tmp_path / "ours"))
    assert ours.version == stock.version
    assert ours.storage_meta.checkpoint_id == tmp_path / "ours"
    assert ours.storage_meta.save_id == writer.save_id
    assert returned.storage_data == {}  # what DCP sends to every rank stays small
    loaded = blank()
    dcp.load(loaded, storage_reader=StorageReader(tmp_path / "ours"))
    assert nested_equal(loaded, state)
    assert ss.verify(tmp_path / "ours")


def test_the_stock_metadata_of_cached_plans_has_the_dtypes_of_this_save(tmp_path: Path) -> None:
    kept = None
    for dtype in (torch.float32, torch.float32, torch.bfloat16, torch.float32):
        planner = dcp.DefaultSavePlanner(enable_plan_caching=True)
        kept = dcp.save(
            {"stale": torch.ones(6, dtype=dtype), "empty": torch.ones(0)},
            storage_writer=StorageWriter(tmp_path / "c", dcp_metadata=True),
            planner=planner,
        )
        found = dcp.FileSystemReader(tmp_path / "c").read_metadata()
        assert found.state_dict_metadata["stale"].properties.dtype is dtype
        assert {index.fqn for index in found.storage_data} == {"stale", "empty"}
        assert kept.storage_data == {}
        assert kept.state_dict_metadata["stale"].properties.dtype is torch.float32


def test_cached_plans_do_not_carry_an_old_dtype(tmp_path: Path) -> None:
    for number, dtype in enumerate((torch.float32, torch.float32, torch.bfloat16)):
        planner = dcp.DefaultSavePlanner(enable_plan_caching=True)
        dcp.save(
            {"t": torch.full((5,), number, dtype=dtype)}, storage_writer=StorageWriter(tmp_path / "c"), planner=planner
        )
        tensor = ss.Checkpoint.open(tmp_path / "c").get_tensor("t")
        assert tensor.dtype == dtype
        assert (tensor == number).all()


def test_a_dtype_that_differs_is_cast_as_stock_does_unless_refused(tmp_path: Path) -> None:
    dcp.save({"t": torch.arange(4.0)}, storage_writer=StorageWriter(tmp_path / "c"))
    target = {"t": torch.zeros(4, dtype=torch.float64)}
    dcp.load(target, storage_reader=StorageReader(tmp_path / "c"))
    assert torch.equal(target["t"], torch.arange(4.0, dtype=torch.float64))
    with pytest.raises(CheckpointException) as info:
        dcp.load(target, storage_reader=StorageReader(tmp_path / "c", cast=False))
    assert isinstance(root_error(info), ss.IncompatibleCheckpointError)


class OneShort(dcp.DefaultLoadPlanner):
    def resolve_tensor(self, read_item: Any) -> torch.Tensor:
        return super().resolve_tensor(read_item)[:-1]


class OneShortSave(dcp.DefaultSavePlanner):
    def transform_object(self, write_item: Any, object: Any) -> Any:
        return super().transform_object(write_item, object)[:-1]


def test_a_planner_whose_tensors_are_not_as_planned_is_refused(tmp_path: Path) -> None:
    dcp.save({"t": torch.ones(4)}, storage_writer=StorageWriter(tmp_path / "c"))
    target = {"t": torch.zeros(4)}
    with pytest.raises(CheckpointException) as info:
        dcp.load(target, storage_reader=StorageReader(tmp_path / "c"), planner=OneShort())
    assert isinstance(root_error(info), ValueError)
    assert "mismatch sizes (3,) vs (4,)" in str(root_error(info))
    assert (target["t"] == 0).all()
    with pytest.raises(CheckpointException) as info:
        dcp.save({"t": torch.zeros(4)}, storage_writer=StorageWriter(tmp_path / "c"), planner=OneShortSave())
    assert isinstance(root_error(info), ValueError)
    assert str(root_error(info)) == "t: planned with sizes [4], is [3]"
    assert (ss.Checkpoint.open(tmp_path / "c").get_tensor("t") == 1).all()
    assert os.listdir(tmp_path) == ["c"]


@pytest.mark.parametrize("strategy", ["direct", "scatter", "broadcast", "auto"])
def test_what_cannot_be_opened_is_said_whoever_reads(tmp_path: Path, strategy: Any) -> None:
    with pytest.raises(ss.CheckpointNotFoundError, match="no such checkpoint") as info:
        StorageReader(tmp_path / "absent", strategy=strategy).read_metadata()
    assert info.value.path == str(tmp_path / "absent")


def test_values_without_a_typed_form_need_consent_twice(tmp_path: Path) -> None:
    state = {"t": torch.ones(1), "value": Opaque(3)}
    with pytest.raises(CheckpointException):
        dcp.save(state, storage_writer=StorageWriter(tmp_path / "c"))
    dcp.save(state, storage_writer=StorageWriter(tmp_path / "c", allow_pickle=True))
    loaded = {"t": torch.zeros(1), "value": None}
    with pytest.raises(CheckpointException):
        dcp.load(loaded, storage_reader=StorageReader(tmp_path / "c"))
    dcp.load(loaded, storage_reader=StorageReader(tmp_path / "c", allow_pickle=True))
    assert loaded["value"] == Opaque(3)


class Opaque:
    def __init__(self, number: int) -> None:
        self.number = number

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Opaque) and other.number == self.number

    __hash__ = None  # type: ignore[assignment]


def test_bare_paths_use_the_engine_while_installed(tmp_path: Path) -> None:
    stock = _storage_utils.FileSystemWriter
    state = {"t": torch.ones(3), "step": 1}
    with installed():
        dcp.save(state, checkpoint_id=tmp_path / "a")
        future = dcp.async_save(state, checkpoint_id=tmp_path / "b")
        state["t"] += 1  # the default stager has copied it
        future.result()
        loaded = {"t": torch.zeros(3), "step": 0}
        dcp.load(loaded, checkpoint_id=tmp_path / "a")
    assert nested_equal(loaded, {"t": torch.ones(3), "step": 1})
    assert (ss.Checkpoint.open(tmp_path / "b").get_tensor("t") == 1).all()
    assert _storage_utils.FileSystemWriter is stock
    install()
    install()
    uninstall()
    assert _storage_utils.FileSystemWriter is stock


def test_readers_and_writers_pickle_for_the_process_executor(tmp_path: Path) -> None:
    writer = pickle.loads(pickle.dumps(StorageWriter(tmp_path / "c", codec="zstd")))
    dcp.save({"t": torch.ones(3)}, storage_writer=writer)
    reader = StorageReader(tmp_path / "c")
    reader.read_metadata()
    loaded = {"t": torch.zeros(3)}
    dcp.load(loaded, storage_reader=pickle.loads(pickle.dumps(reader)))
    assert torch.equal(loaded["t"], torch.ones(3))


def test_metadata_tells_what_stock_metadata_tells(tmp_path: Path) -> None:
    state = trained()
    dcp.save(state, storage_writer=StorageWriter(tmp_path / "ours"))
    dcp.save(state, storage_writer=dcp.FileSystemWriter(tmp_path / "stock"))
    ours = StorageReader(tmp_path / "ours").read_metadata()
    stock = dcp.FileSystemReader(tmp_path / "stock").read_metadata()
    assert ours.planner_data == stock.planner_data
    assert ours.state_dict_metadata.keys() == stock.state_dict_metadata.keys()
    for name, entry in stock.state_dict_metadata.items():
        mine = ours.state_dict_metadata[name]
        assert type(mine) is type(entry)
        if isinstance(entry, dcp.metadata.TensorStorageMetadata):
            assert (mine.size, mine.chunks, mine.properties.dtype) == (entry.size, entry.chunks, entry.properties.dtype)


@pytest.mark.parametrize("option", [{"_extensions": [object()]}, {"codec": "lz4"}, {"host_memory_budget": 1}])
def test_options_that_cannot_be_kept_are_refused(tmp_path: Path, option: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"codec|host_memory_budget"):
        StorageWriter(tmp_path / "c", **option)


def test_stock_options_are_accepted(tmp_path: Path) -> None:
    writer = StorageWriter(str(tmp_path / "c"), False, False, 4, 1000, True, True, None)
    dcp.save({"t": torch.ones(3)}, storage_writer=writer)
    assert writer.checkpoint_id == str(tmp_path / "c")
    assert StorageWriter.validate_checkpoint_id(tmp_path / "d")
    assert not StorageWriter.validate_checkpoint_id("s3://bucket/run")
    assert not StorageReader.validate_checkpoint_id("s3://bucket/run")


def test_a_stream_that_needs_pickle_is_not_handed_on(tmp_path: Path) -> None:
    stream = io.BytesIO()
    torch.save(Payload(str(tmp_path / "ran")), stream)
    ss.save({"value": {"$torch": stream.getvalue()}, "t": torch.ones(1)}, checkpoint_id=tmp_path / "c")
    with pytest.raises(CheckpointException):
        dcp.load({"value": None, "t": torch.zeros(1)}, storage_reader=StorageReader(tmp_path / "c"))
    assert not (tmp_path / "ran").exists()


def begin(writer: StorageWriter, state: dict[str, Any]) -> tuple[Any, Any, Any]:
    """The steps of DCP up to the staging directory: (planner, plan, metadata)."""
    planner = dcp.DefaultSavePlanner()
    planner.set_up_planner(state, is_coordinator=True)
    writer.set_up_storage_writer(True, rank=0)
    plans, metadata = planner.create_global_plan([writer.prepare_local_plan(planner.create_local_plan())])
    (plan,) = writer.prepare_global_plan(plans)
    return planner, plan, metadata


@pytest.mark.timeout(30)
@pytest.mark.parametrize("note", [None, {"save_id": "a" * 32, "world_size": 2}])
def test_a_rank_waits_for_its_coordinator_no_longer_than_its_timeout(tmp_path: Path, note: Any) -> None:
    if note is not None:  # of a save that is over
        (tmp_path / ".saving-c").write_text(json.dumps(note))
    writer = StorageWriter(tmp_path / "c", timeout=0.2)
    planner = dcp.DefaultSavePlanner()
    planner.set_up_planner({"t": torch.ones(3)}, is_coordinator=False)
    writer.set_up_storage_writer(False, rank=1)
    with pytest.raises(ss.CheckpointError, match="staging directory never appeared") as info:
        writer.write_data(planner.create_local_plan(), planner)
    assert info.value.path == str(tmp_path / "c")


def test_a_save_that_copies_out_of_shared_files_keeps_its_deadline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SNAPSTONE_CHUNK_BYTES", "65536")
    first = {name: torch.full((16_384,), float(number)) for number, name in enumerate("abcd")}
    dcp.save(first, storage_writer=StorageWriter(tmp_path / "a"))
    changed = {name: tensor + 10 for name, tensor in first.items()} | {"a": first["a"]}
    _native.fault_arm("copy_file_range:1:delay=2500")
    try:
        with pytest.raises(CheckpointException) as info:
            dcp.save(changed, storage_writer=StorageWriter(tmp_path / "b", base=tmp_path / "a", timeout=2))
    finally:
        _native.fault_disarm()
    error = root_error(info)
    assert isinstance(error, ss.CheckpointError)
    assert "not written in time" in str(error)
    assert os.listdir(tmp_path) == ["a"]
    dcp.save(changed, storage_writer=StorageWriter(tmp_path / "b", base=tmp_path / "a"))
    assert (tmp_path / "b" / "rank-00000.carried.data").stat().st_size == 65536
    assert ss.verify(tmp_path / "b")


def test_files_of_another_save_are_not_committed(tmp_path: Path) -> None:
    writer = StorageWriter(tmp_path / "c")
    planner, plan, metadata = begin(writer, {"t": torch.ones(3)})
    first = writer.write_data(plan, planner).value()
    planner, plan, metadata = begin(writer, {"t": torch.zeros(3)})
    second = writer.write_data(plan, planner).value()
    with pytest.raises(ss.CheckpointError, match="another save"):
        writer.finish(metadata, [first])
    assert not (tmp_path / "c").exists()
    writer.finish(metadata, [second])
    assert (ss.Checkpoint.open(tmp_path / "c").get_tensor("t") == 0).all()
    assert os.listdir(tmp_path) == ["c"]


def test_a_forked_child_leaves_the_save_of_its_parent_alone(tmp_path: Path) -> None:
    writer = StorageWriter(tmp_path / "c")
    planner, plan, metadata = begin(writer, {"t": torch.ones(3)})
    result = writer.write_data(plan, planner).value()
    child = os.fork()
    if child == 0:
        writer.reset()
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    writer.finish(metadata, [result])
    assert ss.verify(tmp_path / "c")


def test_one_reader_goes_from_a_stock_checkpoint_to_ours(tmp_path: Path) -> None:
    dcp.save({"t": torch.ones(3)}, storage_writer=dcp.FileSystemWriter(tmp_path / "c"))
    reader = StorageReader(tmp_path / "c")
    loaded = {"t": torch.zeros(3)}
    dcp.load(loaded, storage_reader=reader)
    assert (loaded["t"] == 1).all()
    shutil.rmtree(tmp_path / "c")
    dcp.save({"t": torch.full((3,), 2.0)}, storage_writer=StorageWriter(tmp_path / "c"))
    dcp.load(loaded, storage_reader=reader)
    assert (loaded["t"] == 2).all()


def test_a_base_that_cannot_be_used_leaves_nothing_behind(tmp_path: Path) -> None:
    writer = StorageWriter(tmp_path / "c", base=tmp_path / "nowhere")
    with pytest.raises(CheckpointException, match="nowhere"):
        dcp.save({"t": torch.ones(3)}, storage_writer=writer, no_dist=True)
    assert os.listdir(tmp_path) == []
