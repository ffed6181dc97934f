"""Options of saves and loads, and the environment variables that set their defaults.

Every knob stands in `docs/tuning.md` with its name, default and when to touch it.
"""

from __future__ import annotations

import operator
import os
from dataclasses import dataclass
from datetime import timedelta

from ._native import zstd_compiled_in

__all__ = ["FORMAT_MAJOR", "FORMAT_MINOR", "DeviceOptions", "LoadOptions", "SaveOptions", "seconds_of", "trace_path"]

FORMAT_MAJOR = 1
FORMAT_MINOR = 0

MIB = 1 << 20
CHUNK_SIZES = range(64 << 10, (64 << 20) + 1, 4096)
HOST_MEMORY_BUDGET_DEFAULT = 1 << 30
TIMEOUT_SECONDS_DEFAULT = 1800.0
# A save that nobody waits for needs no more slots than the device takes at once.
PIPELINE_SLOTS = 128
ZSTD_LEVEL_DEFAULT = 3
KEYFRAME_EVERY_DEFAULT = 8
KEYFRAME_EVERY_MAX = 64  # records that a chunk may need, by the format
DMA_BYTES = range(1 << 20, (32 << 20) + 1)
DMA_BYTES_DEFAULT = 32 << 20
HBM_FRACTION_DEFAULT = 0.5
DIGEST = ("auto", "host", "device")
ON_UNCHANGED = ("warn", "raise", "ignore")
STRATEGIES = ("auto", "direct", "scatter", "broadcast")


def _integer(name: str, default: int) -> int:
    text = os.environ.get(name)
    if text is None:
        return default
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"{name}={text!r}: not an integer") from None


def _number(name: str, default: float, largest: float) -> float:
    text = os.environ.get(name)
    if text is None:
        return default
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0 <= number <= largest:
        raise ValueError(f"{name}={text!r}: must be a number from 0 to {largest:g}")
    return number


def seconds_of(timeout: timedelta | float | None) -> float:
    """`timeout` in seconds; None is SNAPSTONE_TIMEOUT or 1800 s."""
    if timeout is None:
        return _timeout_of_environment()
    seconds = timeout.total_seconds() if isinstance(timeout, timedelta) else float(timeout)
    if not seconds > 0:
        raise ValueError(f"timeout={timeout!r}: must be positive")
    return seconds


def _timeout_of_environment() -> float:
    text = os.environ.get("SNAPSTONE_TIMEOUT")
    if text is None:
        return TIMEOUT_SECONDS_DEFAULT
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not seconds > 0:
        raise ValueError(f"SNAPSTONE_TIMEOUT={text!r}: must be a positive number of seconds")
    return seconds


def trace_path(rank: int, world_size: int) -> str | None:
    """Where SNAPSTONE_TRACE wants the Chrome trace of this rank, or None."""
    path = os.environ.get("SNAPSTONE_TRACE")
    if not path or world_size == 1:
        return path or None
    stem, extension = os.path.splitext(path)
    return f"{stem}.rank-{rank:05d}{extension}"


def _codec(codec: str | None) -> tuple[int, bool]:
    """The zstd level, 0 for none, and whether chunks are stored as differences from the base's."""
    if codec is None or codec == "none":
        return 0, False
    kind, _, level = codec.partition(":")
    if kind not in ("zstd", "xor-zstd") or not (level == "" or level.lstrip("-").isdigit()):
        raise ValueError(f"codec={codec!r}: use None, 'zstd', 'xor-zstd', or one of these with ':LEVEL'")
    number = int(level) if level else ZSTD_LEVEL_DEFAULT
    if number == 0 or not -7 <= number <= 22:
        raise ValueError(f"codec={codec!r}: zstd levels are -7 to -1 and 1 to 22")
    if not zstd_compiled_in():
        raise ValueError(f"codec={codec!r}: this build of snapstone has no zstd; use None, or build it with libzstd")
    return number, kind == "xor-zstd"


@dataclass(frozen=True, slots=True)
class DeviceOptions:
    """How a save treats tensors in CUDA memory, checked. `dma_gbps` 0 is no limit."""

    dma_bytes: int
    dma_gbps: float
    digest: str
    hbm_fraction: float

    @classmethod
    def of(cls) -> DeviceOptions:
        dma_bytes = _integer("SNAPSTONE_DMA_BYTES", DMA_BYTES_DEFAULT)
        if dma_bytes not in DMA_BYTES:
            raise ValueError(
                f"SNAPSTONE_DMA_BYTES={dma_bytes}: must be between {DMA_BYTES.start} and {DMA_BYTES.stop - 1}"
            )
        digest = os.environ.get("SNAPSTONE_DIGEST", "auto")
        if digest not in DIGEST:
            raise ValueError(f"SNAPSTONE_DIGEST={digest!r}: use 'auto', 'host' or 'device'")
        return cls(
            dma_bytes,
            _number("SNAPSTONE_DMA_GBPS", 0.0, 1e6),
            digest,
            _number("SNAPSTONE_HBM_FRACTION", HBM_FRACTION_DEFAULT, 1.0),
        )


@dataclass(frozen=True, slots=True)
class SaveOptions:
    """Options of one save, checked.

    `zstd_level` 0 stores raw bytes. With `differences` chunks that changed may be stored as differences from the
    base's, of which every `keyframe_every`th at the latest is none. Sizes are in bytes, times in seconds.
    """

    overwrite: bool
    zstd_level: int
    differences: bool
    keyframe_every: int
    allow_pickle: bool
    host_memory_budget: int
    timeout_seconds: float
    chunk_bytes: int
    derive: bool
    base: str | None  # an absolute path, or "auto"
    full_every: int | None
    on_unchanged: str
    dcp_marker: bool
    verify_after_save: bool
    device: DeviceOptions

    @classmethod
    def of(
        cls,
        *,
        overwrite: bool = False,
        codec: str | None = None,
        allow_pickle: bool = False,
        host_memory_budget: int | None = None,
        timeout: timedelta | float | None = None,
        derive: bool = False,
        base: str | os.PathLike[str] | None = None,
        full_every: int | None = None,
        keyframe_every: int = KEYFRAME_EVERY_DEFAULT,
        on_unchanged: str = "warn",
        dcp_marker: bool = False,
        verify_after_save: bool = False,
    ) -> SaveOptions:
        budget = (
            _integer("SNAPSTONE_HOST_MEMORY_BUDGET", HOST_MEMORY_BUDGET_DEFAULT)
            if host_memory_budget is None
            else int(host_memory_budget)
        )
        chunk_bytes = _integer("SNAPSTONE_CHUNK_BYTES", MIB)
        if chunk_bytes not in CHUNK_SIZES:
            raise ValueError(
                f"SNAPSTONE_CHUNK_BYTES={chunk_bytes}: must be a multiple of {CHUNK_SIZES.step} "
                f"between {CHUNK_SIZES.start} and {CHUNK_SIZES.stop - 1}"
            )
        if budget < 8 * chunk_bytes:
            raise ValueError(
                f"host_memory_budget={budget}: too small to overlap copies and writes; "
                f"give at least {8 * chunk_bytes} bytes (8 chunks)"
            )
        zstd_level, differences = _codec(codec)
        return cls(
            overwrite=overwrite,
            zstd_level=zstd_level,
            differences=differences,
            keyframe_every=_count("keyframe_every", keyframe_every, KEYFRAME_EVERY_MAX),
            allow_pickle=allow_pickle,
            host_memory_budget=budget,
            timeout_seconds=seconds_of(timeout),
            chunk_bytes=chunk_bytes,
            derive=derive,
            base=_base(base),
            full_every=None if full_every is None else _count("full_every", full_every),
            on_unchanged=_on_unchanged(on_unchanged),
            dcp_marker=dcp_marker,
            verify_after_save=verify_after_save,
            device=DeviceOptions.of(),
        )


def _base(base: str | os.PathLike[str] | None) -> str | None:
    if base is None:
        return None
    if base == "auto":
        return "auto"
    path = os.fspath(base)
    if not path:
        raise ValueError("base='': use 'auto' or the path of a checkpoint")
    return os.path.abspath(path)


def _count(name: str, value: int, largest: int = 1 << 63) -> int:
    number = operator.index(value)
    if not 1 <= number <= largest:
        raise ValueError(f"{name}={value}: must be at least 1" + (f" and at most {largest}" if number > 1 else ""))
    return number


def _on_unchanged(choice: str) -> str:
    if choice not in ON_UNCHANGED:
        raise ValueError(f"on_unchanged={choice!r}: use 'warn', 'raise' or 'ignore'")
    return choice


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """Options of one load, checked."""

    strict: bool
    cast: bool
    verify: bool
    strategy: str
    allow_pickle: bool
    timeout_seconds: float

    @classmethod
    def of(
        cls,
        *,
        strict: bool = True,
        cast: bool = False,
        verify: bool = True,
        strategy: str = "auto",
        allow_pickle: bool = False,
        timeout: timedelta | float | None = None,
    ) -> LoadOptions:
        if strategy not in STRATEGIES:
            raise ValueError(f"strategy={strategy!r}: use 'auto', 'direct', 'scatter' or 'broadcast'")
        return cls(
            strict=strict,
            cast=cast,
            verify=verify,
            strategy=strategy,
            allow_pickle=allow_pickle,
            timeout_seconds=seconds_of(timeout),
        )
