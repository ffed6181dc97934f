"""The figures of a cluster and of what it trains, each with where its default comes from."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Final

__all__ = ["GPUS_MAX", "Cluster", "mtbf_gpu_hours"]

GPUS_MAX: Final = 100_000_000

# No figure of a real cluster is outside, and no formula overflows inside.
_LEAST: Final = 1e-9
_MOST: Final = 1e30


def _figure(default: Any, text: str, source: str, *, whole: bool = False) -> Any:
    return field(default=default, metadata={"text": text, "source": source, "whole": whole})


@dataclass(frozen=True, slots=True)
class Cluster:
    """Measured or assumed figures, the same for every size of the cluster. Null figures are None.

    Raises:
        ValueError: a figure is negative, zero where that makes no sense, or not a number.
    """

    state_bytes_per_gpu: float = _figure(
        8e9,
        "state of one GPU, at every size",
        "70e9 parameters of 14 bytes (bfloat16, and float32 master, exp_avg, exp_avg_sq) on 128 GPUs, rounded",
    )
    state_bytes: float | None = _figure(None, "state of the whole model, divided by the GPUs instead", "none")
    replicas: int = _figure(1, "GPUs that hold each byte; a save writes it once", "fully sharded", whole=True)
    gpus_per_host: int = _figure(8, "GPUs of one host", "HGX H100, H200 and B200", whole=True)
    d2h_bytes_per_second: float = _figure(
        55e9, "copy from one GPU to pinned host memory", "H200: DeepSpeed pull request 8283, 54.8 to 54.9 GB/s"
    )
    disk_write_bytes_per_second: float = _figure(
        11e9,
        "writing from one host: its disks, or its link to storage",
        "four Gen5 NVMe drives: DeepNVMe blog, June 2025",
    )
    disk_read_bytes_per_second: float = _figure(
        27e9, "reading to one host", "four Gen5 NVMe drives: DeepNVMe blog, June 2025"
    )
    shared_bytes_per_second: float | None = _figure(
        None, "limit of storage that all hosts share, writing or reading", "none: storage local to the hosts"
    )
    fabric_bytes_per_second: float = _figure(
        46e9, "one host's link to the others", "one NIC of 400 Gbit/s: nccl-tests issue 290, 46 to 48 GB/s"
    )
    step_seconds: float = _figure(
        6.2,
        "one training step",
        "Llama 3 405B: 6 x 405e9 x 16.8e6 tokens at 400e12 FLOP/s on each of 16,384 GPUs (arXiv 2407.21783)",
    )
    overlap_share: float = _figure(
        0.9, "part of a step in which parameters do not change: forward, backward", "assumption"
    )
    mtbf_gpu_hours: float = _figure(
        50_000.0, "GPU-hours per failure of the run", "419 unexpected interruptions of Llama 3 405B give 50,676"
    )
    restart_seconds: float = _figure(
        300.0, "from a failure until the load begins: noticed, replaced, started", "assumption"
    )
    load_seconds: float | None = _figure(None, "loading, instead of what bytes and rates give", "none")
    load_strategy: str = _figure(
        "direct", "direct: every host reads what it needs; scatter: each byte is read once and sent on", "plain readers"
    )

    def __post_init__(self) -> None:
        for figure in fields(self):
            value = getattr(self, figure.name)
            if figure.name == "load_strategy":
                if value not in ("direct", "scatter"):
                    raise ValueError(f"load_strategy={value!r}: direct or scatter")
            elif value is None:
                if figure.default is not None:
                    raise ValueError(f"{figure.name}: a number is needed")
            else:
                self._check(figure.name, value)

    def _check(self, name: str, value: float) -> None:
        zero_is_fine = name in ("restart_seconds", "load_seconds", "overlap_share")
        if not math.isfinite(value) or value < 0 or (value == 0 and not zero_is_fine):
            raise ValueError(f"{name}={value}: must be {'0 or more' if zero_is_fine else 'more than 0'} and finite")
        if value > _MOST or (value < _LEAST and not zero_is_fine):
            raise ValueError(f"{name}={value}: must be between {_LEAST:g} and {_MOST:g}")
        if name == "overlap_share" and value > 1:
            raise ValueError(f"overlap_share={value}: a part of a step, at most 1")

    def hosts(self, gpus: int) -> int:
        return -(-gpus // self.gpus_per_host)

    def bytes_per_gpu(self, gpus: int) -> float:
        """State in the memory of each GPU."""
        return self.state_bytes_per_gpu if self.state_bytes is None else self.state_bytes * self.replicas / gpus

    def bytes_per_host(self, gpus: int) -> float:
        return self.bytes_per_gpu(gpus) * min(gpus, self.gpus_per_host)

    def mtbf_seconds(self, gpus: int) -> float:
        """Mean time between failures of a run that every failure of any GPU ends."""
        return self.mtbf_gpu_hours * 3600 / gpus

    def write_seconds(self, gpus: int, host_bytes_per_second: float | None = None) -> float:
        """Writing each byte of the state once, the work divided evenly; `host_bytes_per_second` caps a host's disk."""
        rate = min(self.disk_write_bytes_per_second, host_bytes_per_second or math.inf)
        each = self.bytes_per_host(gpus) / self.replicas / rate
        return max(each, self._shared_seconds(self.bytes_per_gpu(gpus) * gpus / self.replicas))

    def read_seconds(self, gpus: int, host_bytes_per_second: float | None = None) -> float:
        """Loading the state into every GPU, or `load_seconds` where that is given."""
        if self.load_seconds is not None:
            return self.load_seconds
        rate = min(self.disk_read_bytes_per_second, host_bytes_per_second or math.inf)
        wanted = self.bytes_per_host(gpus)
        if self.load_strategy == "direct":
            return max(wanted / rate, self._shared_seconds(self.bytes_per_gpu(gpus) * gpus))
        read = wanted / self.replicas
        fabric = (wanted - read) / self.fabric_bytes_per_second
        return max(read / rate, fabric, self._shared_seconds(self.bytes_per_gpu(gpus) * gpus / self.replicas))

    def _shared_seconds(self, nbytes: float) -> float:
        return nbytes / self.shared_bytes_per_second if self.shared_bytes_per_second else 0.0

    def values(self) -> dict[str, Any]:
        return {figure.name: getattr(self, figure.name) for figure in fields(self)}

    def sources(self, known: Mapping[str, str]) -> dict[str, str]:
        """Where each figure is from: what `known` says, else where the default is from."""
        return {figure.name: known.get(figure.name, f"default: {figure.metadata['source']}") for figure in fields(self)}


def mtbf_gpu_hours(interruptions: int, days: float, gpus: int) -> float:
    """GPU-hours per failure of a run of `days` days on `gpus` GPUs that was interrupted `interruptions` times."""
    return gpus * days * 24 / interruptions
