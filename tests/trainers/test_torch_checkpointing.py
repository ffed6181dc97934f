"""torch_checkpointing's own save and load over the engine's storage."""

from __future__ import annotations

import functools
import io
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch_checkpointing import CheckpointManager, ItemSpec
from torch_checkpointing.checkpoint_layout import JsonSerialization, LayoutInfo, RawSerialization
from torch_checkpointing.storage.base_storage import ReadArgs
from torch_checkpointing.storage.filesystem import LocalFileSystemStorageConfig

import snapstone as ss
from snapstone import _native
from snapstone.errors import CheckpointNotFoundError, CorruptCheckpointError
from snapstone.integrations import torch_checkpointing as integration
from snapstone.integrations import versions
from snapstone.integrations.torch_checkpointing import Storage, StorageConfig, export

JOB = Path(__file__).with_name("torch_checkpointing_job.py")


@pytest.fixture(autouse=True)
def no_faults() -> Iterator[None]:
    yield
    _native.fault_disarm()


@pytest.fixture
def storage(monkeypatch: pytest.MonkeyPatch) -> Storage:
    monkeypatch.setattr(integration, "_SEGMENT_BYTES", 1 << 20)
    return StorageConfig().create_storage()


def manager_of(storage_config: Any, **items: ItemSpec) -> CheckpointManager:
    config = CheckpointManager.Config.with_sync_save()
    config.storage_config = storage_config
    config.items = items
    return CheckpointManager(config)


def state() -> dict[str, Any]:
    torch.manual_seed(1)
    return {"model": {"a": torch.randn(700, 701), "b": torch.arange(5)}, "step": {"at": 7}, "notes": b"raw bytes"}


ITEMS = {
    "step": ItemSpec(layout=LayoutInfo("deep/step.json", JsonSerialization())),
    "notes": ItemSpec(layout=LayoutInfo("notes.bin", RawSerialization())),
}


def same(found: dict[str, Any], expected: dict[str, Any]) -> bool:
    tensors = all(torch.equal(found["model"][name], tensor) for name, tensor in expected["model"].items())
    return tensors and all(found[key] == expected[key] for key in ("step", "notes"))


@pytest.mark.parametrize("use_mmap", [True, False])
def test_a_manager_saves_and_loads_and_every_file_is_a_verified_checkpoint(tmp_path: Path, use_mmap: bool) -> None:
    manager = manager_of(StorageConfig(), **ITEMS)
    manager._config.load.use_mmap = use_mmap
    path = str(tmp_path / "one")
    manager.save(path, state())
    assert same(manager.load(path, dict.fromkeys(state())), state())
    files = sorted(str(file.parent.relative_to(path)) for file in Path(path).rglob("MANIFEST.json"))
    assert files == ["deep/step.json", "model_0.pt", "notes.bin"]
    assert all(ss.verify(Path(path, file)) for file in files)
    assert not (tmp_path / "tmp_one").exists()
    export(path, tmp_path / "plain")
    assert same(
        manager_of(LocalFileSystemStorageConfig(use_direct_io=False), **ITEMS).load(str(tmp_path / "plain"), state()),
        state(),
    )


def test_a_stock_checkpoint_from_before_the_switch_loads(tmp_path: Path) -> None:
    manager_of(LocalFileSystemStorageConfig(use_direct_io=False), **ITEMS).save(str(tmp_path / "stock"), state())
    manager = manager_of(StorageConfig(), **ITEMS)
    assert same(manager.load(str(tmp_path / "stock"), dict.fromkeys(state())), state())


def test_a_wrong_byte_is_never_loaded_and_the_error_names_its_file(tmp_path: Path) -> None:
    manager = manager_of(StorageConfig(), **ITEMS)
    path = str(tmp_path / "one")
    manager.save(path, state())
    (data,) = Path(path, "model_0.pt").glob("*.data*")
    bytes_ = bytearray(data.read_bytes())
    bytes_[len(bytes_) // 2] ^= 1
    data.write_bytes(bytes_)
    with pytest.raises(CorruptCheckpointError, match=r"model_0\.pt"):
        manager.load(path, dict.fromkeys(state()))
    with pytest.raises(FileNotFoundError):
        manager.load(str(tmp_path / "two"), dict.fromkeys(state()))


def test_streams_read_any_range_across_segments(tmp_path: Path, storage: Storage) -> None:
    path = tmp_path / "file"
    data = bytes(range(256)) * 10_000  # 2.4 segments
    with storage.stream_write(path) as stream:
        for at in range(0, len(data), 999_999):
            assert stream.write(memoryview(data)[at : at + 999_999]) == min(999_999, len(data) - at)
    assert storage.read(path) == data
    assert storage.getsize(path) == len(data)
    assert (storage.exists(path), storage.isdir(path), storage.ls(tmp_path)) == (True, False, ["file"])
    with storage.stream_read(path, ReadArgs(pre_read_full_file=False)) as stream:
        assert stream.seek(-3, io.SEEK_END) == len(data) - 3
        assert stream.read(10) == data[-3:]
        assert stream.read(10) == b""
        assert stream.seek((1 << 20) - 5) == (1 << 20) - 5
        assert stream.read(10) == data[(1 << 20) - 5 : (1 << 20) + 5]
        assert stream.tell() == (1 << 20) + 5
    storage.write(path, b"")
    assert (storage.read(path), storage.getsize(path)) == (b"", 0)
    storage.delete(path)
    assert not storage.exists(path)
    with pytest.raises(CheckpointNotFoundError):
        storage.read(path)


def test_a_stream_that_fails_leaves_what_was_there(tmp_path: Path, storage: Storage) -> None:
    path = tmp_path / "file"
    storage.write(path, b"old")

    def half() -> None:
        with storage.stream_write(path) as stream:
            stream.write(b"new")
            raise ValueError

    with pytest.raises(ValueError):  # noqa: PT011 # the one above
        half()
    assert storage.read(path) == b"old"
    _native.fault_arm("fsync:1:errno=EIO;fdatasync:1:errno=EIO")
    with pytest.raises(OSError, match="Input/output"):
        storage.write(path, b"new")
    _native.fault_disarm()
    assert storage.read(path) == b"old"
    assert storage.ls(tmp_path) == ["file"]


def test_every_directory_that_is_made_is_durable(tmp_path: Path, storage: Storage) -> None:
    _native.fault_arm("fsync:999:errno=EIO")  # which counts
    try:
        storage.mkdir(tmp_path / "a" / "b" / "c")
        assert _native.fault_seen("fsync") == 3
        storage.mkdir(tmp_path / "a" / "b" / "c")
        storage.mkdir(tmp_path / "a" / "d", recursive=False)
        assert _native.fault_seen("fsync") == 4
    finally:
        _native.fault_disarm()
    with pytest.raises(FileExistsError):
        storage.mkdir(tmp_path / "a", recursive=False)


def test_rename_keeps_to_the_table_of_its_contract(tmp_path: Path, storage: Storage) -> None:
    def fresh(name: str, kind: str) -> Path:
        path = tmp_path / name
        if storage.exists(path):
            storage.rmdir(path) if storage.isdir(path) else storage.delete(path)
        if kind in ("empty", "full"):
            storage.mkdir(path)
        if kind == "full":
            storage.write(path / "inner", name.encode())
        if kind == "file":
            storage.write(path, name.encode())
        if kind == "plain":
            path.write_bytes(name.encode())
        return path

    for source in ("full", "file", "plain"):
        for target in ("absent", "empty", "full", "file", "plain"):
            src, dst = fresh("src", source), fresh("dst", target)
            directory = source == "full"
            lands = target in (("absent", "empty") if directory else ("absent", "file", "plain"))
            if not lands:
                with pytest.raises(OSError):  # noqa: PT011 # of several kinds
                    storage.rename(src, dst, is_directory=directory)
                assert storage.exists(src), (source, target)
                continue
            storage.rename(src, dst, is_directory=directory)
            assert not storage.exists(src), (source, target)
            assert storage.read(dst / "inner" if directory else dst) == b"src", (source, target)


def test_the_configuration_travels_to_saver_processes_and_refuses_what_it_does_not_know() -> None:
    config = pickle.loads(pickle.dumps(StorageConfig(save_options={"codec": "zstd"})))
    assert config == StorageConfig(save_options={"codec": "zstd"})
    with pytest.raises(TypeError, match="base: not among codec"):
        StorageConfig(save_options={"base": "auto"})


def test_another_version_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "version", lambda package: "0.2.0")
    with pytest.raises(versions.UnsupportedVersionError, match=r"torch-checkpointing 0\.2\.0 .* >= 0\.1\.1, < 0\.2"):
        versions.require("torch-checkpointing", "0.1.1", "0.2")
    assert integration.VERSION == "0.1.1"


@functools.cache
def _launcher(ranks: int) -> tuple[str, ...]:
    return ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks))


def run(what: str, directory: Path) -> tuple[int, str]:
    command = [sys.executable, *_launcher(2), str(JOB), what, "--dir", str(directory)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, process_group=0
    ) as process:
        try:
            output, _ = process.communicate(timeout=200)
        except BaseException:
            os.killpg(process.pid, 9)
            raise
    return process.returncode, output


@pytest.mark.timeout(420)
def test_killed_in_a_save_and_resumed_it_ends_as_if_nothing_had_been(tmp_path: Path) -> None:
    code, output = run("killed", tmp_path)
    assert code != 0, output
    assert sorted(path.name for path in tmp_path.glob("*step-*")) == ["step-2", "tmp_step-4"], output
    code, output = run("resumed", tmp_path)
    assert code == 0, output
    for rank in range(2):
        assert json.loads((tmp_path / f"result-{rank}.json").read_text()) == {"at": 2, "same": True}
        assert ss.verify(tmp_path / "step-4" / f"job_{rank}.pt")
    assert sorted(path.name for path in tmp_path.glob("*step-*")) == ["step-2", "step-4", "step-6"]
