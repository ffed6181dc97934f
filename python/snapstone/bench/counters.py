"""What a run costs beside time: bytes, CPU seconds, memory, and the rates of disks and links, sampled by a thread."""

from __future__ import annotations

import threading
import time
from typing import Any, Self

from .results import Counters

__all__ = ["Sampler", "merged"]

INTERVAL_SECONDS = 0.25


def _psutil() -> Any | None:
    """None where the extra `bench` is not installed."""
    try:
        import psutil
    except ImportError:
        return None
    return psutil


class Sampler:
    """Of this process and its children, and of the machine's disks and links. Use as a context manager.

    Without psutil, or where the kernel does not tell, entries are None and lists empty.
    """

    def __init__(self) -> None:
        self._psutil = _psutil()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._peak_rss = 0
        self._disk: list[float] = []
        self._network: list[float] = []
        self.counters: Counters = {
            "bytes_written": None,
            "bytes_read": None,
            "cpu_seconds": None,
            "peak_rss_bytes": None,
            "pinned_bytes": None,
            "page_cache_bytes": None,
            "disk_write_rate": self._disk,
            "network_rate": self._network,
            "interval_seconds": INTERVAL_SECONDS,
        }

    def __enter__(self) -> Self:
        if self._psutil is not None:
            self._before = self._books()
            self._thread = threading.Thread(target=self._sample, name="bench-counters", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._thread is None:
            return
        self._thread.join()
        after = self._books()
        for name in ("bytes_written", "bytes_read"):
            self.counters[name] = max(0, int(after[name] - self._before[name]))
        self.counters["cpu_seconds"] = max(0.0, after["cpu_seconds"] - self._before["cpu_seconds"])
        self.counters["page_cache_bytes"] = int(after["cached"] - self._before["cached"])
        self.counters["peak_rss_bytes"] = max(self._peak_rss, int(after["rss"]))
        self.counters["pinned_bytes"] = _pinned_bytes()

    def _books(self) -> dict[str, float]:
        """Children that ended are in the parent's CPU seconds; their bytes are lost."""
        psutil = self._psutil
        assert psutil is not None
        own = psutil.Process()
        books = dict.fromkeys(("bytes_written", "bytes_read", "cpu_seconds", "rss"), 0.0)
        for process in (own, *own.children(recursive=True)):
            try:
                times, memory = process.cpu_times(), process.memory_info()
                books["cpu_seconds"] += times.user + times.system
                books["rss"] += memory.rss
                moved = process.io_counters()
                books["bytes_written"] += moved.write_bytes
                books["bytes_read"] += moved.read_bytes
            except psutil.Error:
                continue  # it ended meanwhile, or is another user's
        ended = own.cpu_times()
        books["cpu_seconds"] += ended.children_user + ended.children_system
        books["cached"] = float(psutil.virtual_memory().cached)
        return books

    def _sample(self) -> None:
        psutil = self._psutil
        assert psutil is not None
        process = psutil.Process()
        last, disk, network = time.monotonic(), _written(psutil), _sent(psutil)
        while not self._stop.wait(INTERVAL_SECONDS):
            now, disk_now, network_now = time.monotonic(), _written(psutil), _sent(psutil)
            self._disk.append((disk_now - disk) / (now - last))
            self._network.append((network_now - network) / (now - last))
            last, disk, network = now, disk_now, network_now
            self._peak_rss = max(self._peak_rss, process.memory_info().rss)


def _written(psutil: Any) -> int:
    found = psutil.disk_io_counters()
    return int(found.write_bytes) if found else 0


def _sent(psutil: Any) -> int:
    found = psutil.net_io_counters()
    return int(found.bytes_sent) if found else 0


def _pinned_bytes() -> int:
    """Page-locked host memory of torch's own allocator at its peak; engines with another one are not seen."""
    import torch

    if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return 0
    return int(torch.cuda.host_memory_stats().get("allocated_bytes.peak", 0))


def merged(ranks: list[Counters]) -> Counters:
    """Of all ranks: sums of what belongs to processes, and rank 0's view of its machine."""
    total: Counters = {**ranks[0]}
    for name in ("bytes_written", "bytes_read", "cpu_seconds", "peak_rss_bytes", "pinned_bytes"):
        values: list[Any] = [counters[name] for counters in ranks]
        total[name] = None if any(value is None for value in values) else sum(values)
    return total
