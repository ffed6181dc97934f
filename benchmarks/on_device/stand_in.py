"""The fake driver of the tests in the place of a device, for a run that shows that everything runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch

__all__ = ["StandIn"]


_Generator = torch.Generator


class _OnHost(_Generator):
    """Operations of the fake are computed there."""

    def __new__(cls, device: Any = "cpu") -> Any:
        return _Generator("cpu")


def _fill(tensor: torch.Tensor, mask: int) -> None:
    """As work of the current stream: a step changes every element, and waits for nothing."""
    tensor.detach().fill_(mask)


class StandIn:
    """torch.cuda is the fake's for the rest of this process, which found its driver through SNAPSTONE_LIBCUDA."""

    def __init__(self) -> None:
        from cuda import fake_torch
        from cuda.device import FakeDevices
        from cuda.fake_driver import FakeDriver
        from snapstone.bench import optimizer

        self._driver = FakeDriver()
        fake_torch.install()
        self._patch = pytest.MonkeyPatch()
        fake_torch.patch(self._patch, self._driver)
        self._patch.setattr(torch, "Generator", _OnHost)
        self._patch.setattr(optimizer, "_flip", _fill)
        # Work for the current stream that takes so many seconds, as forward and backward do.
        self.delay = FakeDevices(self._driver).delay

    def violations(self) -> list[str]:
        """Accesses that nothing had ordered."""
        self._driver.drain()
        return self._driver.violations()
