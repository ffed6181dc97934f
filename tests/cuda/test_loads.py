"""Loads into tensors on CUDA devices: after what the stream did with them, before what it does next, verified."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import snapstone as ss
from cuda.device import Devices
from cuda.states import CODECS, KIB, MIB, Tensors, adamw, assert_same, bits, host_copy, model, numbers, state_of
from snapstone import CorruptCheckpointError


def blank(state: Tensors) -> Tensors:
    """Tensors like these that hold something else, strides and devices included."""
    return {name: torch.empty_like(tensor).fill_(3) for name, tensor in state.items()}


def assert_loaded(device: Devices, state: Tensors, host: Tensors) -> None:
    for name, tensor in host.items():
        assert torch.equal(bits(device.on_host(state[name])), bits(tensor)), name


@pytest.mark.parametrize("codec", CODECS)
def test_targets_are_filled_between_what_the_stream_does(device: Devices, tmp_path: Path, codec: str | None) -> None:
    state, host = model(device.cuda, other=device.other)
    ss.save(state, checkpoint_id=tmp_path / "c", codec=codec)
    for _ in range(3):
        stream = torch.cuda.Stream(device.cuda)
        with torch.cuda.stream(stream):
            targets = blank(state)
            device.delay(0.02, stream)
            targets["large"].fill_(9)  # before the load: must not come after it
            loaded = ss.load(targets, checkpoint_id=tmp_path / "c")
            copies = {name: tensor.clone() for name, tensor in targets.items()}
            targets["large"].fill_(8)
        assert_loaded(device, copies, host)
        assert loaded.stats["bytes_needed"] == sum(tensor.nbytes for tensor in host.values())


def test_a_strided_target_and_other_parts_than_were_saved(device: Devices, tmp_path: Path) -> None:
    host = numbers(2 * MIB).view(torch.float32).nan_to_num().reshape(512, -1)
    ss.save({"a": host}, checkpoint_id=tmp_path / "c")
    wide = torch.zeros(512, 4 * host.shape[1], device=device.cuda)
    target = wide[:, host.shape[1] : 2 * host.shape[1]]
    ss.load({"a": target}, checkpoint_id=tmp_path / "c")
    result = device.on_host(wide)
    assert torch.equal(result[:, host.shape[1] : 2 * host.shape[1]], host)
    assert not result[:, : host.shape[1]].any()
    assert not result[:, 2 * host.shape[1] :].any()
    transposed = torch.zeros(host.shape[1], 512, device=device.cuda).t()
    ss.load({"a": transposed}, checkpoint_id=tmp_path / "c")
    assert torch.equal(device.on_host(transposed), host)


def test_converted_lazy_and_derived_targets(device: Devices, tmp_path: Path) -> None:
    master = (numbers(64 * KIB, 1).float() / 7).reshape(256, 256)
    pairs = torch.view_as_complex(torch.arange(200.0).reshape(100, 2))
    saved = {"master": master, "p": master.bfloat16(), "half": master, "lazy": pairs}
    ss.save(saved, checkpoint_id=tmp_path / "c", derive=True)
    targets = {
        "master": torch.zeros_like(master, device=device.cuda),
        "p": torch.zeros(256, 256, dtype=torch.bfloat16, device=device.cuda),
        "half": torch.zeros(256, 256, dtype=torch.float16, device=device.cuda),
        "lazy": torch.zeros(100, dtype=torch.complex64, device=device.cuda).conj(),
    }
    ss.load(targets, checkpoint_id=tmp_path / "c", cast=True)
    assert torch.equal(device.on_host(targets["master"]), master)
    assert torch.equal(device.on_host(targets["p"]), master.bfloat16())
    assert torch.equal(device.on_host(targets["half"]), master.half())
    assert torch.equal(device.on_host(targets["lazy"].resolve_conj()), pairs)


def test_a_checkpoint_opens_on_a_device(device: Devices, tmp_path: Path) -> None:
    state, host = model(device.cuda)
    ss.save(state, checkpoint_id=tmp_path / "c")
    opened = ss.Checkpoint.open(tmp_path / "c", device=device.other)
    loaded = opened.load_tensors()
    assert {tensor.device for tensor in loaded.values()} == {device.other}
    assert_loaded(device, loaded, host)
    part = opened.get_slice("matrix")[100:200:3, 7:9]
    assert part.device == device.other
    assert torch.equal(device.on_host(part), host["matrix"][100:200:3, 7:9])


def test_a_run_resumes_from_devices_to_devices(device: Devices, tmp_path: Path) -> None:
    optimizer = adamw(device.cuda)
    state = {"optimizer": optimizer, "w": torch.ones(5, device=device.cuda)}
    expected = host_copy(device, state_of(optimizer, state["w"]))
    ss.async_save(state, checkpoint_id=tmp_path / "c", fence=optimizer).result()
    optimizer.step()
    state["w"].zero_()
    ss.load(state, checkpoint_id=tmp_path / "c")
    saved = host_copy(device, state_of(optimizer, state["w"]))
    assert_same(expected["moments"], saved["moments"])
    assert_same(expected["buffers"], saved["buffers"])


@pytest.mark.parametrize("codec", CODECS)
def test_a_wrong_byte_never_reaches_a_device(device: Devices, tmp_path: Path, codec: str | None) -> None:
    host = {"a": numbers(2 * MIB), "b": numbers(2 * MIB, 1) % 7}
    ss.save(host, checkpoint_id=tmp_path / "c", codec=codec)
    data = tmp_path / "c" / "rank-00000.data"
    content = bytearray(data.read_bytes())
    content[len(content) // 4] ^= 1
    data.write_bytes(bytes(content))
    targets = {name: torch.full((2 * MIB,), 3, dtype=torch.uint8, device=device.cuda) for name in host}
    with pytest.raises(CorruptCheckpointError) as caught:
        ss.load(targets, checkpoint_id=tmp_path / "c")
    assert caught.value.tensor in host
    torch.cuda.synchronize()
    for name, tensor in targets.items():
        found = device.on_host(tensor).reshape(-1, MIB)
        for chunk, wanted in zip(found, host[name].reshape(-1, MIB), strict=True):
            assert torch.equal(chunk, wanted) or bool((chunk == 3).all())
    chunks = torch.cat([device.on_host(tensor).reshape(-1, MIB) for tensor in targets.values()])
    assert bool((chunks == 3).all(dim=1).any()), "the chunk with the wrong byte reached its target"


def test_a_load_inside_a_capture_is_refused(device: Devices, tmp_path: Path) -> None:
    ss.save({"a": torch.zeros(100)}, checkpoint_id=tmp_path / "c")
    target = torch.ones(100, device=device.cuda)
    torch.cuda.synchronize()
    with (
        device.capturing(torch.cuda.Stream(device.cuda)),
        pytest.raises(RuntimeError, match="captured into a CUDA graph"),
    ):
        ss.load({"a": target}, checkpoint_id=tmp_path / "c")
    ss.load({"a": target}, checkpoint_id=tmp_path / "c")
    assert torch.equal(device.on_host(target), torch.zeros(100))
