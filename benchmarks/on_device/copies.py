"""Bytes between device and host, by size: the engine's copies through its ring, torch's pinned and pageable ones; what
making the ring takes; the digest kernel against a copy of the same bytes within the device.
"""

from __future__ import annotations

import time
from typing import Any

import snapstone as ss
from snapstone import _native

from .bench import Bench, gbps

__all__ = ["measure"]


def measure(bench: Bench) -> None:
    bench.step("engine", lambda: _engine(bench))
    bench.step("digest", lambda: _digest(bench))
    bench.step("prepare", lambda: _prepare(bench), seconds=3)
    bench.step("torch_pinned", lambda: _torch_pinned(bench))
    bench.step("torch_pageable", lambda: _torch_pageable(bench), seconds=3)


def _engine(bench: Bench) -> dict[str, Any]:
    scale = bench.scale
    memory = bench.random(max(scale.copy_sizes))
    bench.settle()
    rates = _native.cuda_rates(
        0, memory.data_ptr(), list(scale.copy_sizes), ring_bytes=scale.ring_bytes, repeat=scale.repeat
    )
    ring_gb = rates["ring_bytes"] / 1e9
    return {
        "registration": {
            "ring_bytes": rates["ring_bytes"],
            "reserve_seconds_per_gb": rates["reserve_seconds"] / ring_gb,
            "register_seconds_per_gb": rates["register_seconds"] / ring_gb,
            "refusal": rates["refusal"],
        },
        "no_kernels": rates["no_kernels"],
        "rows": [
            {
                "nbytes": row["nbytes"],
                "d2h_gbps": gbps(row["nbytes"], row["to_host"]),
                "h2d_gbps": gbps(row["nbytes"], row["to_device"]),
                "digest_gbps": gbps(row["nbytes"], row["digest"]),
                "d2d_gbps": gbps(row["nbytes"], row["on_device"]),
            }
            for row in rates["rows"]
        ],
    }


def _digest(bench: Bench) -> dict[str, Any]:
    """Bytes read per second; a copy within the device reads as many, and writes them."""
    nbytes = bench.scale.digest_bytes
    memory = bench.random(nbytes)
    bench.settle()
    rates = _native.cuda_rates(0, memory.data_ptr(), [nbytes], ring_bytes=1 << 20, repeat=bench.scale.repeat)
    (row,) = rates["rows"]
    if rates["no_kernels"]:
        raise RuntimeError(f"no kernels: {rates['no_kernels']}")
    digest, copy = gbps(nbytes, row["digest"]), gbps(nbytes, row["on_device"])
    return {
        "nbytes": nbytes,
        "digest_gbps": digest,
        "d2d_gbps": copy,
        "digest_of_d2d": digest["median"] / copy["median"] if digest and copy else None,
    }


def _prepare(bench: Bench) -> dict[str, Any]:
    """What a program calls before its first save."""
    nbytes = bench.scale.prepared_bytes
    bench.check_host_memory(nbytes, "prepare")
    begin = time.perf_counter()
    ss.prepare(bench.device, nbytes)
    seconds = time.perf_counter() - begin
    return {"nbytes": nbytes, "seconds": seconds, "seconds_per_gb": seconds / nbytes * 1e9, **_native.ring_facts()}


def _torch_pinned(bench: Bench) -> dict[str, Any]:
    largest = max(bench.scale.copy_sizes)
    device = bench.random(largest)
    begin = time.perf_counter()
    host = bench.pinned(largest)
    pinning = time.perf_counter() - begin
    rows = []
    for nbytes in bench.scale.copy_sizes:
        there, back = host[:nbytes], device[:nbytes]
        d2h = bench.repeated(lambda there=there, back=back: there.copy_(back, non_blocking=True))
        h2d = bench.repeated(lambda there=there, back=back: back.copy_(there, non_blocking=True))
        rows.append({"nbytes": nbytes, "d2h_gbps": gbps(nbytes, d2h), "h2d_gbps": gbps(nbytes, h2d)})
    pinned = {"nbytes": largest, "seconds_per_gb": pinning / largest * 1e9}
    return {"pinned": bool(not bench.fake), "allocation": pinned, "rows": rows}


def _torch_pageable(bench: Bench) -> dict[str, Any]:
    """`.cpu()`, into memory that it allocates, as `torch.save` would; and `.to(device)`."""
    device = bench.random(max(bench.scale.copy_sizes))
    rows = []
    for nbytes in bench.scale.copy_sizes:
        piece = device[:nbytes]
        host = piece.cpu()
        d2h = bench.repeated(lambda piece=piece: piece.cpu(), repeat=3)
        h2d = bench.repeated(lambda host=host: host.to(bench.device), repeat=3)
        rows.append({"nbytes": nbytes, "d2h_gbps": gbps(nbytes, d2h), "h2d_gbps": gbps(nbytes, h2d)})
    return {"rows": rows}
