"""Random runs, always the same ones: every checkpoint that was committed holds what the state was at the call."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import snapstone as ss
from cuda.device import IS_REAL, Devices, FakeDevices
from cuda.stress import CHUNK_BYTES, Run


@pytest.mark.parametrize("seed", range(4))
def test_checkpoints_hold_what_the_state_was_at_the_call(
    device: Devices, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    monkeypatch.setenv("SNAPSTONE_CHUNK_BYTES", str(CHUNK_BYTES))
    for name in ("SNAPSTONE_HBM_FRACTION", "SNAPSTONE_DIGEST"):
        monkeypatch.setenv(name, "0" if name.endswith("FRACTION") else "auto")  # the run changes them
    if isinstance(device, FakeDevices):
        device.fake.seed(seed)
    run = Run(device, tmp_path, seed)
    run.go(20)
    ss.wait()
    if run.has_faults and not IS_REAL:
        assert isinstance(device, FakeDevices)
        torch.cuda.synchronize()
        device.fake.reset()  # of what a failed save read too late it complains
