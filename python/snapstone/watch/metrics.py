"""The same facts for Prometheus, in its text format over HTTP.

Names and units follow Prometheus' conventions; `docs/watch.md` lists them. Each scrape looks at the directory anew.
Needs the package `prometheus-client`, of the extra `bench`.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING
from wsgiref.simple_server import WSGIServer

from ..status_page import SaveStatus
from .durable import Durable
from .watcher import Observation, Watcher

if TYPE_CHECKING:
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

__all__ = ["MetricsServer"]

_NOTHING = Durable("", None)
# Names that a page may not add to: each is a time series for as long as Prometheus keeps it.
_STAGES = ("plan", "stage", "write", "sync", "vote", "commit", "derive", "compare", "carry", "other")
_LEFTOVERS = (("staging", "dead"), ("trash", "dead"), ("trash", "unknown"))


class MetricsServer:
    """Serves `http://ADDRESS:PORT/metrics` in threads of its own until closed. Port 0 takes one that is free.

    Raises OSError when the port is taken or the address is not this host's, ImportError without prometheus-client.
    """

    def __init__(self, watcher: Watcher, port: int, address: str = "127.0.0.1") -> None:
        try:
            from prometheus_client import CollectorRegistry, start_http_server
        except ImportError as error:
            raise ImportError(
                f"--metrics-port needs prometheus-client: pip install 'snapstone[bench]' ({error})"
            ) from None
        registry = CollectorRegistry()
        registry.register(_Collector(watcher))
        self.address = address
        self._server: WSGIServer
        self._thread: threading.Thread
        self._server, self._thread = start_http_server(port, addr=address, registry=registry)

    @property
    def port(self) -> int:
        return self._server.server_port

    @property
    def url(self) -> str:
        host = f"[{self.address}]" if ":" in self.address else self.address
        return f"http://{host}:{self.port}/metrics"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Collector:
    def __init__(self, watcher: Watcher) -> None:
        self._watcher = watcher

    def describe(self) -> list[GaugeMetricFamily]:
        """Nothing: registering looks at no directory."""
        return []

    def collect(self) -> Iterator[GaugeMetricFamily | CounterMetricFamily]:
        """A directory that cannot be listed is a fact like others: an alert on it must find a number."""
        try:
            seen = self._watcher.observe()
        except OSError:
            yield _gauge("snapstone_run_up", "Whether the run directory could be read: 1 or 0.", 0)
            return
        yield _gauge("snapstone_run_up", "Whether the run directory could be read: 1 or 0.", 1)
        yield from _of_checkpoints(seen)
        yield from _of_saves(seen)
        yield from _of_processes(seen)
        yield from _of_space(seen)


def _gauge(name: str, text: str, value: float | None) -> GaugeMetricFamily:
    """Without a sample where there is no value: a gap, not a zero."""
    from prometheus_client.core import GaugeMetricFamily

    family = GaugeMetricFamily(name, text)
    if value is not None:
        family.add_metric([], value)
    return family


def _of_checkpoints(seen: Observation) -> Iterator[GaugeMetricFamily]:
    last = seen.last or _NOTHING
    damaged = len(seen.checkpoints) - len(seen.sound)
    yield _gauge("snapstone_checkpoints", "Committed checkpoints without a known problem.", len(seen.sound))
    yield _gauge("snapstone_damaged_checkpoints", "Checkpoints with a damaged manifest or files missing.", damaged)
    yield _gauge("snapstone_last_durable_age_seconds", "Time since the last commit.", seen.age_seconds)
    yield _gauge(
        "snapstone_last_durable_timestamp_seconds",
        "When the last checkpoint was committed, since the epoch.",
        last.committed_at,
    )
    yield _gauge("snapstone_last_durable_step", "Training step of the last checkpoint.", last.step)
    yield _gauge("snapstone_last_durable_size_bytes", "Bytes of all its tensors.", last.nbytes)
    yield _gauge("snapstone_last_durable_stored_bytes", "Bytes that its save wrote.", last.stored_bytes)
    yield _gauge("snapstone_checkpoint_interval_seconds", "Median time between the last commits.", seen.cadence_seconds)
    yield _gauge(
        "snapstone_checkpoint_interval_steps", "Median number of steps between the last commits.", seen.cadence_steps
    )
    yield _gauge(
        "snapstone_next_durable_seconds",
        "Time until the next commit at that interval; negative when overdue.",
        seen.next_in_seconds,
    )


def _of_saves(seen: Observation) -> Iterator[GaugeMetricFamily]:
    from prometheus_client.core import GaugeMetricFamily

    saves = seen.saves
    yield _gauge("snapstone_saves_in_flight", "Saves that have not committed.", len(saves))
    ages = [age for save in saves if (age := save.age_seconds(seen.at)) is not None]
    yield _gauge("snapstone_save_age_seconds", "Time since the oldest of them began.", max(ages, default=None))
    written = sum(save.written_bytes for save in saves)
    size = sum(save.size_bytes for save in saves)
    rates = [save.bytes_per_second for save in saves if save.bytes_per_second is not None]
    yield _gauge("snapstone_save_written_bytes", "Bytes that they have written.", written if saves else None)
    yield _gauge("snapstone_save_size_bytes", "Bytes that they have allocated.", size if saves else None)
    yield _gauge("snapstone_save_bytes_per_second", "Rate of writing.", sum(rates) if rates else None)
    ranks = GaugeMetricFamily("snapstone_save_rank_written_bytes", "The same by rank.", labels=["save", "rank"])
    for save in saves:
        for one in save.ranks:
            ranks.add_metric([save.name.removeprefix(".staging-"), str(one.rank)], one.written_bytes)
    yield ranks
    left = GaugeMetricFamily("snapstone_leftovers", "Directories that saves left behind.", labels=["kind", "state"])
    for kind, state in _LEFTOVERS:
        left.add_metric([kind, state], sum((one.kind, one.state) == (kind, state) for one in seen.leftovers))
    yield left


def _of_processes(seen: Observation) -> Iterator[GaugeMetricFamily | CounterMetricFamily]:
    """Sums over the ranks of this machine; nothing of them where no process tells."""
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

    processes, saving = seen.processes, seen.processes.saving
    told = bool(processes.all)
    yield _gauge("snapstone_processes", "Processes of this machine that tell of their saves.", len(processes.living))
    ranks = GaugeMetricFamily("snapstone_save_stage_ranks", "Ranks that are in a stage of a save.", labels=["stage"])
    seconds = GaugeMetricFamily(
        "snapstone_save_rank_stage_seconds", "Time since a rank came to the stage that it is in.", labels=["rank"]
    )
    for stage in _STAGES if told else ():
        ranks.add_metric([stage], sum(_stage(save) == stage for save in saving))
    for rank, save in {save.rank: save for save in saving}.items():
        seconds.add_metric([str(rank)], max(0.0, seen.at - save.stage_begun_at))
    yield ranks
    yield seconds
    for what in ("staged", "written"):
        nbytes = sum(getattr(save, f"{what}_bytes") for save in saving) if saving else None
        rates = [rate for save in saving if (rate := getattr(save, f"{what}_bytes_per_second")) is not None]
        name = f"snapstone_engine_{what}_bytes"
        yield _gauge(name, f"Bytes that the ranks have {what}, as they say.", nbytes)
        yield _gauge(f"{name}_per_second", "The rate of that, of the last seconds.", sum(rates) if rates else None)
    size = sum(save.size_bytes for save in saving) if saving else None
    yield _gauge("snapstone_engine_size_bytes", "Bytes of the ranks' shares.", size)
    yield _gauge("snapstone_ring_size_bytes", "Staging memory.", processes.ring_bytes if told else None)
    yield _gauge("snapstone_ring_used_bytes", "What of it holds bytes.", processes.ring_used_bytes if told else None)
    failed = CounterMetricFamily("snapstone_save_failures", "Saves of single ranks that failed.")
    ended = CounterMetricFamily("snapstone_save_commits", "Saves of single ranks that were committed.")
    if told:
        failed.add_metric([], processes.failed)
        ended.add_metric([], processes.committed)
    yield failed
    yield ended
    yield _gauge(
        "snapstone_save_failing_ranks",
        "Ranks whose last save failed, or died with its process.",
        len(processes.troubles) if told else None,
    )


def _stage(save: SaveStatus) -> str:
    return save.stage if save.stage in _STAGES else "other"


def _of_space(seen: Observation) -> Iterator[GaugeMetricFamily]:
    yield _gauge("snapstone_filesystem_free_bytes", "Free space for this user.", seen.free_bytes)
    yield _gauge("snapstone_filesystem_size_bytes", "Size of the file system.", seen.total_bytes)
    yield _gauge(
        "snapstone_filesystem_exhausted_seconds",
        "Time until the free space is used up at the present interval if nothing is removed.",
        seen.exhausted_in_seconds,
    )
