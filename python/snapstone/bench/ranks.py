"""The ranks of a measurement: how they meet, and what they tell each other outside the timed loops."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]

__all__ = ["Ranks", "serve_store"]

GROUP_TIMEOUT_SECONDS = 600


class Ranks:
    """Joins the ranks that torchrun started, or makes a group of one. Talks over a gloo group of its own."""

    def __init__(self, device: str) -> None:
        self.local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        if device == "cuda":
            torch.cuda.set_device(self.local_rank)
        self.backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
        timeout = timedelta(seconds=GROUP_TIMEOUT_SECONDS)
        if "RANK" not in os.environ:
            os.environ.update({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"})
            self._store = serve_store()
            os.environ.update({"MASTER_ADDR": self._store.host, "MASTER_PORT": str(self._store.port)})
            os.environ["TORCHELASTIC_USE_AGENT_STORE"] = str(True)
        dist.init_process_group(self.backend, timeout=timeout)
        self.rank = dist.get_rank()
        self.world = dist.get_world_size()
        local_world = int(os.environ.get("LOCAL_WORLD_SIZE", self.world))
        self.nodes = self.world // local_world
        if device == "cpu":  # engines get the other half: threads that spin for a core would be all that is measured
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_world // 2))
        self._group = self.new_group()

    def new_group(self) -> Any:
        """A gloo group of all ranks."""
        return dist.new_group(backend="gloo", timeout=timedelta(seconds=GROUP_TIMEOUT_SECONDS))

    def gather(self, value: Any) -> list[Any]:
        """The values of all ranks, on all ranks."""
        if self.world == 1:
            return [value]
        found: list[Any] = [None] * self.world
        dist.all_gather_object(found, value, group=self._group)
        return found

    def barrier(self) -> None:
        if self.world > 1:
            dist.barrier(self._group)


def serve_store() -> TCPStore:
    """A store for ranks to meet at, on this host and a port that the kernel picks."""
    host = os.environ.get("MASTER_ADDR", "127.0.0.1")
    return TCPStore(host, 0, is_master=True, wait_for_workers=False)
