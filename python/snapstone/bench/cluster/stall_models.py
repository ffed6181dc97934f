"""What a save of an engine costs on a cluster: how long training stands still, and when the save is durable."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Final, Literal, Protocol

from .figures import Cluster
from .renewal import Timing

__all__ = ["KINDS", "Given", "Kind", "Measured", "Modelled", "StallModel", "described", "timing_of"]

Kind = Literal["blocking", "staged", "hidden"]
KINDS: Final[tuple[Kind, ...]] = ("blocking", "staged", "hidden")


class StallModel(Protocol):
    """One engine. It has one save in flight: the next one waits until this one is durable."""

    @property
    def name(self) -> str: ...

    def stall_seconds(self, cluster: Cluster, gpus: int) -> float:
        """From the call, training stands still."""

    def durable_seconds(self, cluster: Cluster, gpus: int) -> float:
        """From the call until no failure takes the save away; not less than the stall."""

    def load_seconds(self, cluster: Cluster, gpus: int) -> float: ...


@dataclass(frozen=True, slots=True)
class Modelled:
    """An engine as its kind and the cluster's figures have it: copy to host memory, then write.

    blocking: training stands still until the write is durable. staged: until the copy is made. hidden: the copy runs
    while forward and backward leave the state alone, and only what is longer than they are is waited for.
    """

    name: str
    kind: Kind
    fixed_seconds: float = 0.0  # planning and agreement, in each save's call

    def __post_init__(self) -> None:
        if not 0 <= self.fixed_seconds < math.inf:
            raise ValueError(f"fixed_seconds={self.fixed_seconds}: must be a number of seconds, 0 or more")

    def stall_seconds(self, cluster: Cluster, gpus: int) -> float:
        if self.kind == "blocking":
            return self.durable_seconds(cluster, gpus)
        copy = self._copy_seconds(cluster, gpus)
        if self.kind == "hidden":
            copy = max(0.0, copy - cluster.overlap_share * cluster.step_seconds)
        return self.fixed_seconds + copy

    def durable_seconds(self, cluster: Cluster, gpus: int) -> float:
        return self.fixed_seconds + self._copy_seconds(cluster, gpus) + cluster.write_seconds(gpus)

    def load_seconds(self, cluster: Cluster, gpus: int) -> float:
        return cluster.read_seconds(gpus)

    def _copy_seconds(self, cluster: Cluster, gpus: int) -> float:
        return cluster.bytes_per_gpu(gpus) / cluster.replicas / cluster.d2h_bytes_per_second


@dataclass(frozen=True, slots=True)
class Measured:
    """An engine as `snapstone bench stall` found it: both times are lines over the bytes that are saved.

    It is not taken to be faster on another disk than where it was measured: its rates are caps.
    """

    name: str
    stall_seconds_per_byte: float  # of what one rank saves
    write_bytes_per_second: float  # of one host: bytes of a save over its time to durable
    load_bytes_per_second: float | None = None  # of one host, where loads were measured
    fixed_stall_seconds: float = 0.0  # known where several sizes were measured
    fixed_durable_seconds: float = 0.0
    largest_bytes: float | None = None  # that a rank saved while it was measured

    def stall_seconds(self, cluster: Cluster, gpus: int) -> float:
        return self.fixed_stall_seconds + self.stall_seconds_per_byte * cluster.bytes_per_gpu(gpus) / cluster.replicas

    def durable_seconds(self, cluster: Cluster, gpus: int) -> float:
        written = self.fixed_durable_seconds + cluster.write_seconds(gpus, self.write_bytes_per_second)
        return max(self.stall_seconds(cluster, gpus), written)

    def load_seconds(self, cluster: Cluster, gpus: int) -> float:
        return cluster.read_seconds(gpus, self.load_bytes_per_second)

    def extrapolation(self, cluster: Cluster, gpus: int) -> float:
        """How many times what was measured a rank would save; 1 where that is not known."""
        return cluster.bytes_per_gpu(gpus) / cluster.replicas / self.largest_bytes if self.largest_bytes else 1.0


@dataclass(frozen=True, slots=True)
class Given:
    """An engine whose stall and time to durable are known, the same at every size."""

    name: str
    stall: float
    durable: float

    def __post_init__(self) -> None:
        if not 0 <= self.stall <= self.durable < math.inf:
            raise ValueError(
                f"{self.name}: stall {self.stall} s, durable {self.durable} s: needs 0 <= stall <= durable"
            )

    def stall_seconds(self, cluster: Cluster, gpus: int) -> float:
        return self.stall

    def durable_seconds(self, cluster: Cluster, gpus: int) -> float:
        return self.durable

    def load_seconds(self, cluster: Cluster, gpus: int) -> float:
        return cluster.read_seconds(gpus)


def timing_of(engine: StallModel, cluster: Cluster, gpus: int) -> Timing:
    """What the renewal form and the simulation need of an engine on `gpus` GPUs."""
    return Timing(
        stall_seconds=engine.stall_seconds(cluster, gpus),
        durable_seconds=engine.durable_seconds(cluster, gpus),
        recovery_seconds=cluster.restart_seconds + engine.load_seconds(cluster, gpus),
        mtbf_seconds=cluster.mtbf_seconds(gpus),
    )


def described(engine: Modelled | Measured | Given) -> dict[str, Any]:
    """An engine for the document: its parameters, and what kind of model it is."""
    kind = engine.kind if isinstance(engine, Modelled) else type(engine).__name__.lower()
    return {**asdict(engine), "kind": kind}
