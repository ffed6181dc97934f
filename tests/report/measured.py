"""Result documents as measurements leave them: seeded, so that a picture of them is the same every time."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from snapstone.bench import results
from snapstone.bench.results import Document

GB = 10**9
# In a report of `write_results`.
CHARTS = [
    "chart-stall-1", "chart-ledger-1", "chart-steps-1", "chart-timeline-1-1", "chart-load-1", "chart-roofline",
    "chart-disk-1", "chart-link-1", "chart-model-1",
]  # fmt: skip

ENVIRONMENT: Any = {
    "hardware": {"cpu": "AMD EPYC 9B45", "cores": 2, "memory_bytes": 25 * GB, "accelerator": None, "device": "cpu"},
    "storage": {"file_system": "ext4", "device": "nvme", "directory": "/mnt/checkpoints"},
    "software": {"python": "3.11.7", "torch": "2.13.0", "snapstone": "0.1.0", "kernel": "6.8.0"},
    "world": {"ranks": 4, "nodes": 1, "backend": "gloo"},
}

# name, title, stall of the relaxed cadence, of the tight one, seconds to durable
SPEEDS = [
    ("snapstone", "snapstone", 0.042, 0.21, 0.81),
    ("moonclip", "moonclip", 0.38, 1.12, 1.9),
    ("dcp-pinned", "DCP, pinned memory", 0.55, 1.61, 2.2),
    ("dcp-async", "DCP, asynchronous", 0.91, 1.74, 2.4),
    ("torch-save", "torch.save", 2.31, 2.35, 2.3),
    ("dcp", "DCP, synchronous", 2.12, 2.2, 2.1),
]


def stall_document(ranks: int = 4, speeds: list[tuple[str, str, float, float, float]] = SPEEDS) -> Document:
    """Six engines that were measured, one that failed its truth check, one that is partial, two that are absent."""
    chance = random.Random(7)
    document = results.new_document("stall", ["snapstone", "bench", "stall", "--model", "llama 1b"], ENVIRONMENT)
    document["date"] = "2026-11-21T12:00:00+00:00"
    document["complete"] = True
    document["seconds"] = 611.0
    document["workload"] = {
        "model": "llama-1b", "parallelism": f"fsdp {ranks}", "state_only": False, "tensors": 438, "nbytes": 2 * GB,
        "nbytes_of_rank": [2 * GB // ranks] * ranks, "step_seconds": {"median": 0.12, "low": 0.117, "high": 0.131},
    }  # fmt: skip
    document["protocol"] = {"pairs": 5, "saves_per_block": 4, "steps_per_block": 80, "seed": 7}
    engines = [_engine(chance, *speed, ranks=ranks) for speed in speeds]
    engines[-1] |= {"status": "partial", "reason": "rank 2 died in pair 4; 3 of 5 pairs are here"}
    failed: Any = _engine(chance, "bytecheckpoint", "ByteCheckpoint", 0.3, 0.5, 1.0, ranks=ranks)
    wrong = "step 24: optim.state.exp_avg.17 holds values of step 25: memory was changed while it was being saved"
    failed |= {"status": "failed", "reason": wrong, "truth": {"checks": 8, "failures": [wrong], "kills": 1}}
    document["engines"] = [*engines, failed, _absent("orbax", "Orbax"), _absent("torchsnapshot", "torchsnapshot")]
    return document


def _absent(name: str, title: str) -> Any:
    return {
        "name": name, "title": title, "version": None, "status": "absent", "reason": f"no module named {name!r}",
        "options": [], "syncs": False, "truth": {"checks": 0, "failures": [], "kills": 0}, "cadences": [],
        "first_save": None, "changed_plan_save": None, "counters": None, "timeline": [], "steps": [],
    }  # fmt: skip


def _engine(
    chance: random.Random, name: str, title: str, relaxed: float, tight: float, durable: float, ranks: int
) -> Any:
    return {
        "name": name, "title": title, "version": "1.2.3", "status": "measured", "reason": None,
        "options": [{"name": "threads", "value": "4", "why": "fastest of 1, 2, 4, 8 on this disk"}],
        "syncs": name == "snapstone", "truth": {"checks": 8, "failures": [], "kills": 2},
        "cadences": [
            _cadence(chance, "relaxed", 20, relaxed, durable, 0),
            _cadence(chance, "tight", 5, tight, durable, 1 if name == "moonclip" else 0),
        ],
        "first_save": {"call": relaxed * 1.6, "durable": durable * 1.4},
        "changed_plan_save": {"call": relaxed * 1.2, "durable": durable * 1.1},
        "counters": {
            "bytes_written": 16 * GB, "bytes_read": 0, "cpu_seconds": 14.2, "peak_rss_bytes": 3_200_000_000,
            "pinned_bytes": 0, "page_cache_bytes": 12_000_000,
            "disk_write_rate": [chance.uniform(0.1, 2.6) * GB for _ in range(40)], "network_rate": [2e5, 3e5],
            "interval_seconds": 0.5,
        },
        "timeline": _timeline(chance, durable, ranks),
        "steps": _steps(chance, relaxed, durable),
    }  # fmt: skip


def _cadence(chance: random.Random, name: str, interval: int, stall: float, durable: float, skipped: int) -> Any:
    pairs = [stall * chance.uniform(0.85, 1.2) for _ in range(5)]
    shares = {"call": 0.55, "wait_previous": 0.2 if name == "tight" else 0.0, "fence": 0.1, "finalize": 0.05}
    ledger = {part: [pair * share for pair in pairs] for part, share in shares.items()}
    ledger["inflation"] = [pair * chance.uniform(0.12, 0.25) for pair in pairs]
    ledger["unexplained"] = [pair - sum(ledger[part][index] for part in ledger) for index, pair in enumerate(pairs)]
    times = [durable * chance.uniform(0.95, 1.1) for _ in range(8)]
    return {
        "name": name, "interval_steps": interval, "stall_seconds": pairs, "ledger": ledger, "durable_seconds": times,
        "skipped": skipped,
    }  # fmt: skip


def _timeline(chance: random.Random, durable: float, ranks: int) -> list[Any]:
    spans: list[Any] = []
    for rank in range(ranks):
        late = chance.uniform(0.85, 1.0) * durable

        def add(lane: str, stage: str, begin: float, end: float, nbytes: int = 0, rank: int = rank) -> None:
            spans.append({"rank": rank, "lane": lane, "stage": stage, "begin": begin, "end": end, "nbytes": nbytes})

        add("snapstone-save", "plan", 0.0, 0.01)
        for chunk in range(24):
            begin = 0.01 + late * 0.8 * chunk / 24
            lane = f"lane {chunk % 2}"
            add(lane, "stage", begin, begin + late * 0.02, 1 << 20)
            add(lane, "write", begin + late * 0.02, begin + late * chance.uniform(0.05, 0.12), 1 << 20)
        add("snapstone-save", "sync", late * 0.94, late * 0.97)
        add("snapstone-save", "vote", late * 0.97, durable * 0.985)
        add("snapstone-save", "commit", durable * 0.985, durable)
    return spans


def _steps(chance: random.Random, stall: float, durable: float) -> list[Any]:
    steps, left = [], 0.0
    for number in range(80):
        saving = number % 20 == 4
        seconds = 0.12 * chance.uniform(0.98, 1.06)
        if saving:
            left = durable
            seconds += stall * 0.8
        elif left > 0:
            seconds *= 1.15
        steps.append({"seconds": seconds, "saving": saving, "in_flight": left > 0})
        left -= seconds
    return steps


def disk_document() -> Document:
    document = results.new_document("disk", ["snapstone", "bench", "disk", "/mnt/checkpoints"], ENVIRONMENT)
    document |= {"date": "2026-11-21T11:00:00+00:00", "complete": True, "seconds": 30.0}

    def probe(tool: str, rung: str, operation: str, rate: float, reason: str | None = None) -> Any:
        samples = [] if reason else [rate * GB * factor for factor in (0.97, 1.0, 1.02)]
        return {
            "tool": tool, "rung": rung, "operation": operation, "bytes_per_second": samples, "nbytes": 4 * GB,
            "reason": reason,
        }  # fmt: skip

    document["probes"] = [
        probe("probe", "buffered", "write", 1.4),
        probe("probe", "uring-fixed", "write", 2.82),
        probe("probe", "threads-direct", "write", 2.4),
        probe("probe", "uring-fixed", "read", 3.1),
        probe("fio", "io_uring", "write", 0, "fio is not installed"),
    ]
    return document


def link_document(nodes: int = 1) -> Document:
    document = results.new_document("link", ["snapstone", "bench", "link"], ENVIRONMENT)
    world = {"ranks": 4, "nodes": nodes, "backend": "gloo"}
    nowhere = {"file_system": "", "device": "", "directory": ""}
    environment: Any = {**ENVIRONMENT, "storage": nowhere, "world": world}
    document |= {"date": "2026-11-21T11:30:00+00:00", "complete": True, "seconds": 9.0, "environment": environment}

    def link(transport: str, operation: str, rate: float, reason: str | None = None) -> Any:
        samples = [] if reason else [rate * GB * factor for factor in (0.9, 1.0, 1.1)]
        return {
            "transport": transport, "operation": operation, "bytes_per_second": samples, "nbytes": GB, "reason": reason,
        }  # fmt: skip

    document["links"] = [
        link("memory", "copy", 6.4),
        link("gloo", "broadcast", 1.6),
        link("gloo", "all_gather", 1.1),
        link("nccl", "broadcast", 0, "no CUDA device was asked for"),
        link("cuda", "d2h", 0, "no CUDA device was asked for"),
    ]
    return document


def load_document() -> Document:
    document = results.new_document("load", ["snapstone", "bench", "load", "--from", "C"], ENVIRONMENT)
    document |= {"date": "2026-11-21T13:00:00+00:00", "complete": True, "seconds": 60.0}
    document["checkpoint"] = {"path": "/mnt/checkpoints/step-8", "nbytes": 2 * GB, "tensors": 438}

    def load(
        engine: str, strategy: str, seconds: float, read: int, status: str = "measured", reason: Any = None
    ) -> Any:
        times = [seconds * factor for factor in (0.96, 1.0, 1.09)] if status == "measured" else []
        return {
            "engine": engine, "strategy": strategy, "seconds": times, "nbytes": 2 * GB, "bytes_read": read,
            "cold_by": "posix_fadvise", "status": status, "reason": reason,
        }  # fmt: skip

    document["loads"] = [
        load("dcp", "direct", 1.9, 2 * GB),
        load("snapstone", "scatter", 0.79, 2 * GB),
        load("snapstone", "direct", 0.74, 2 * GB),
        load("safetensors", "", 0, 0, "failed", "tensor model.embed differs from what was saved"),
        load("fastsafetensors", "", 0, 0, "absent", "no module named 'fastsafetensors'"),
    ]
    return document


def model_document() -> Document:
    document = results.new_document("model", ["snapstone", "bench", "model"], ENVIRONMENT)
    document |= {"date": "2026-11-21T14:00:00+00:00", "complete": True, "seconds": 2.0}
    document["inputs"] = {"disk_bytes_per_second": 2.8e9, "step_seconds": 5.0, "gpu_hours_per_failure": 50_000}
    rows: list[Any] = []
    for engine, stall in (("snapstone", 0.2), ("dcp-async", 4.0), ("dcp", 40.0)):
        for gpus in (8, 64, 512, 4096, 16384, 100_000):
            mtbf = 50_000 * 3600 / gpus
            cadence = (2 * stall * mtbf) ** 0.5
            goodput = max(0.3, 1 - stall / cadence - cadence / 2 / mtbf - 300 / mtbf)
            rows.append(
                {
                    "engine": engine, "gpus": gpus, "hosts": max(1, gpus // 8), "stall_seconds": stall,
                    "durable_seconds": 9.0, "mtbf_seconds": mtbf, "cadence_seconds_young_daly": cadence,
                    "cadence_seconds_exact": cadence * 0.98, "goodput": goodput,
                    "lost_seconds_per_failure": cadence / 2 + 300,
                    "simulated_goodput": {"median": goodput - 0.001, "low": goodput - 0.01, "high": goodput + 0.01},
                }
            )  # fmt: skip
    document["rows"] = rows
    return document


def write_results(directory: Path) -> Path:
    """One document of each kind."""
    results.write(stall_document(), directory, "llama-1b")
    results.write(disk_document(), directory, "checkpoints")
    results.write(link_document(), directory, "4-ranks")
    results.write(load_document(), directory, "step-8")
    results.write(model_document(), directory, "cluster")
    return directory
