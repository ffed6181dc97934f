"""torch.distributed.checkpoint, and its tensors, on CUDA devices."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta

import snapstone as ss
from cuda.device import Devices
from cuda.states import KIB, assert_saved, bits, model, numbers, scribble
from snapstone.dcp import StorageReader, StorageWriter


@pytest.fixture
def mesh(tmp_path: Path) -> Iterator[DeviceMesh]:
    """One rank. Its tensors are where they are: nothing is sent."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield DeviceMesh("cpu", [0])
    dist.destroy_process_group()


def sharded(local: torch.Tensor, mesh: DeviceMesh) -> DTensor:
    meta = TensorMeta(local.shape, local.stride(), local.dtype)
    return DTensor(local, DTensorSpec(mesh, (Shard(0),), tensor_meta=meta), requires_grad=False)


@pytest.mark.filterwarnings("ignore")
def test_dcp_saves_and_loads_tensors_of_devices(device: Devices, tmp_path: Path) -> None:
    state, host = model(device.cuda, other=device.other)
    device.delay(0.02)
    state["large"].copy_(host["large"].to(device.cuda))
    dcp.save(state, storage_writer=StorageWriter(tmp_path / "c"), no_dist=True)
    scribble(state)
    assert_saved(tmp_path / "c", host)
    device.delay(0.02)
    dcp.load(state, storage_reader=StorageReader(tmp_path / "c"), no_dist=True)
    copies = {name: tensor.clone() for name, tensor in state.items()}
    scribble(state)
    for name, tensor in host.items():
        assert torch.equal(bits(device.on_host(copies[name])), bits(tensor)), name


def test_sharded_tensors_of_devices(device: Devices, mesh: DeviceMesh, tmp_path: Path) -> None:
    host = numbers(256 * KIB).view(torch.float32).nan_to_num().reshape(256, -1)
    local = host.to(device.cuda)
    tensor = sharded(local, mesh)
    handle = ss.async_save({"a": tensor}, checkpoint_id=tmp_path / "c", no_dist=True)
    local.fill_(1)
    handle.result()
    assert handle.stats["devices"]["bytes"] == host.nbytes
    assert_saved(tmp_path / "c", {"a": host})
    ss.load({"a": tensor}, checkpoint_id=tmp_path / "c", no_dist=True)
    assert torch.equal(device.on_host(local), host)
