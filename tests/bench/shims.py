"""Engines that call CUDA although nothing is on a device: their adapters run here with those calls taken away."""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from snapstone.bench.engines import Setting
from snapstone.bench.engines.nvidia_resiliency import NvidiaResiliency


class NvidiaResiliencyOnCpu(NvidiaResiliency):
    """With its other caller, which forks: a writer that is spawned would not have what is taken away here."""

    needs_cuda: ClassVar[bool] = False
    persistent: ClassVar[bool] = False

    def __init__(self, setting: Setting) -> None:
        nothing: Any = lambda *_: None  # noqa: E731
        torch.cuda.synchronize = nothing
        torch.cuda.current_device = lambda: "cpu"  # type: ignore[assignment, return-value]
        super().__init__(setting)
