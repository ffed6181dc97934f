"""The fake's torch does what tests of saves rely on: real types, work in streams, memory that is handed out again."""

from __future__ import annotations

import pytest
import torch

from cuda.device import IS_REAL, FakeDevices

pytestmark = pytest.mark.skipif(IS_REAL, reason="of the fake alone")


def test_tensors_are_cuda_tensors_and_hold_what_was_put_there(device: FakeDevices) -> None:
    host = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    tensor = host.to("cuda:1")
    assert type(tensor) is torch.Tensor
    assert (tensor.is_cuda, tensor.device) == (True, torch.device("cuda:1"))
    assert torch.equal(tensor.cpu(), host)
    assert torch.equal(tensor[1:3, ::2].t().cpu(), host[1:3, ::2].t())
    assert torch.equal(tensor.t().contiguous().cpu(), host.t())
    assert torch.equal(tensor.view(torch.int32).cpu(), host.view(torch.int32))
    assert torch.equal(tensor.bfloat16().cpu(), host.bfloat16())


@pytest.mark.parametrize(
    "dtype",
    [torch.bool, torch.uint8, torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.complex64, torch.complex128],
)
def test_every_size_of_element(device: FakeDevices, dtype: torch.dtype) -> None:
    host = torch.arange(32, dtype=torch.uint8).view(dtype) if dtype != torch.bool else torch.tensor([True, False])
    assert torch.equal(host.to("cuda:0").clone().cpu().view(torch.uint8), host.view(torch.uint8))


def test_work_happens_when_the_stream_comes_to_it(device: FakeDevices) -> None:
    device.fake.mode("lazy")
    tensor = torch.zeros(8, device="cuda")
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        tensor.fill_(3)
        copy = tensor.clone()
        tensor.fill_(4)
    assert device.fake.pending() > 0
    with torch.cuda.stream(stream):
        assert copy.tolist() == [3.0] * 8
        assert tensor.tolist() == [4.0] * 8


def test_freed_memory_is_the_next_owners(device: FakeDevices) -> None:
    tensor = torch.zeros(1000, device="cuda")
    address = tensor.data_ptr()
    view = tensor[10:20]
    del tensor
    assert torch.zeros(1000, device="cuda").data_ptr() != address  # the view holds it
    del view
    assert torch.empty(1000, device="cuda").data_ptr() == address


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, foreach=False),
        lambda p: torch.optim.Adam(p, lr=0.1, foreach=False),
        lambda p: torch.optim.AdamW(p, lr=0.1, foreach=False),
    ],
)
def test_optimizers_step_as_on_the_host(device: FakeDevices, make) -> None:
    results = []
    for where in ("cpu", "cuda"):
        parameters = [torch.nn.Parameter(torch.arange(6.0).to(where)) for _ in range(2)]
        optimizer = make(parameters)
        for step in range(3):
            for parameter in parameters:
                parameter.grad = torch.full((6,), 0.5 + step).to(where)
            optimizer.step()
        results.append([parameter.detach().cpu() for parameter in parameters])
    for on_host, on_device in zip(*results, strict=True):
        assert torch.equal(on_host, on_device)


def test_streams_and_events_order_work(device: FakeDevices) -> None:
    tensor = torch.zeros(1 << 10, device="cuda")
    torch.cuda.synchronize()
    first, second = torch.cuda.Stream(), torch.cuda.Stream()
    with torch.cuda.stream(first):
        device.delay(0.01)
        tensor.fill_(1)
    second.wait_stream(first)
    with torch.cuda.stream(second):
        copy = tensor.clone()
    event = second.record_event()
    event.synchronize()
    assert event.query()
    assert torch.equal(copy.cpu(), torch.ones(1 << 10))
