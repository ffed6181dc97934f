"""The CUDA that tests of saves and loads run on: the fake driver's, or with SNAPSTONE_TEST_CUDA=real the machine's.

Tests use torch and torch.cuda, and what is here; so they run on either. Nothing here waits for a device unless it says
so.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import pytest
import torch

from cuda.fake_driver import FakeDriver

__all__ = ["IS_REAL", "Devices", "FakeDevices", "RealDevices"]

IS_REAL = os.environ.get("SNAPSTONE_TEST_CUDA") == "real"


class Devices:
    """`cuda` and `other` are two devices, or the same one where there is one."""

    cuda = torch.device("cuda:0")
    other = torch.device("cuda:0")

    def delay(self, seconds: float, stream: torch.cuda.Stream | None = None) -> None:
        """Work for a stream (default: the current one) that takes this long, as training does."""
        raise NotImplementedError

    def held(self) -> AbstractContextManager[None]:
        """While it is entered, the current stream of `cuda` does nothing; a device does for a second."""
        raise NotImplementedError

    def capturing(self, stream: torch.cuda.Stream) -> AbstractContextManager[None]:
        """While it is entered, a CUDA graph is captured from the stream, which is the current one."""
        raise NotImplementedError

    def graph(self, step: Callable[[], None], stream: torch.cuda.Stream) -> Callable[[], None]:
        """The step, captured from the stream into a CUDA graph: what is returned replays it in the current stream."""
        raise NotImplementedError

    def on_host(self, tensor: torch.Tensor) -> torch.Tensor:
        """The elements once all devices have done all work: waits."""
        torch.cuda.synchronize()
        return tensor.cpu()


class FakeDevices(Devices):
    other = torch.device("cuda:1")

    def __init__(self, fake: FakeDriver) -> None:
        self.fake = fake

    def delay(self, seconds: float, stream: torch.cuda.Stream | None = None) -> None:
        stream = stream or torch.cuda.current_stream(self.cuda)
        self.fake.enqueue_delay(seconds, stream=stream.cuda_stream or None, device=stream.device.index)

    @contextmanager
    def held(self) -> Iterator[None]:
        stream = torch.cuda.current_stream(self.cuda)
        self.fake.enqueue_hold(stream=stream.cuda_stream or None, device=stream.device.index)
        try:
            yield
        finally:
            self.fake.let_go()

    @contextmanager
    def capturing(self, stream: torch.cuda.Stream) -> Iterator[None]:
        handle, ordinal = stream.cuda_stream, stream.device.index
        with torch.cuda.stream(stream):
            self.fake.capture(True, stream=handle, device=ordinal)
            try:
                yield
            finally:
                self.fake.capture(False, stream=handle, device=ordinal)

    def graph(self, step: Callable[[], None], stream: torch.cuda.Stream) -> Callable[[], None]:
        """The fake replays nothing: the step enqueues its work again."""
        with self.capturing(stream):
            pass
        return step


class RealDevices(Devices):
    _CYCLES_PER_SECOND = 1_500_000_000

    def __init__(self) -> None:
        if not torch.cuda.is_available():
            pytest.fail("SNAPSTONE_TEST_CUDA=real, and torch finds no CUDA device", pytrace=False)
        if torch.cuda.device_count() > 1:
            self.other = torch.device("cuda:1")

    def delay(self, seconds: float, stream: torch.cuda.Stream | None = None) -> None:
        with torch.cuda.stream(stream):
            torch.cuda._sleep(int(seconds * self._CYCLES_PER_SECOND))

    @contextmanager
    def held(self) -> Iterator[None]:
        self.delay(1)
        yield

    @contextmanager
    def capturing(self, stream: torch.cuda.Stream) -> Iterator[None]:
        with torch.cuda.graph(torch.cuda.CUDAGraph(), stream=stream):
            yield

    def graph(self, step: Callable[[], None], stream: torch.cuda.Stream) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            step()
        return graph.replay
