"""The job: trains a small model, saves it in every way there is, prunes, compacts, and is killed by whoever may.

What it holds at a step is the same in every life and for every number of ranks, whatever was killed before: weights and
moments, replicated, and a table of rows that are divided over the ranks, of which each step changes one. So a digest of
a step is one for the whole soak, and a resumed run that differs from the one that was killed is found.

It tells the oracle what it is about to do before it does it, and what has been acknowledged after. A packet that the
kernel has taken is read by the oracle also when its sender is dead.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import socket
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import snapstone as ss
from distributed.ranks import announce
from snapstone import _native
from snapstone.dcp import StorageWriter
from snapstone.integrations.step_folder import StepFolder
from soak.lives import KINDS, Life

__all__ = ["TIMEOUT_S", "digest", "live"]

TIMEOUT_S = float(os.environ.get("SOAK_TIMEOUT_S", "6"))  # of a save; more where other work has the machine
KEEP = 3
ROWS, COLUMNS = 8, 16384  # a row is a chunk, with SNAPSTONE_CHUNK_BYTES=65536
WIDTH = 96


def digest(tensor: torch.Tensor) -> str:
    data = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
    return hashlib.blake2b(data.data, digest_size=16).hexdigest()


class Job:
    """The model, its optimizer and the table, at a step."""

    def __init__(self) -> None:
        torch.manual_seed(1)
        self.model = torch.nn.Sequential(
            torch.nn.Linear(WIDTH, 2 * WIDTH), torch.nn.ReLU(), torch.nn.Linear(2 * WIDTH, WIDTH)
        )
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
        for parameter in self.model.parameters():
            moments = {"exp_avg": torch.zeros_like(parameter), "exp_avg_sq": torch.zeros_like(parameter)}
            self.optimizer.state[parameter] = {"step": torch.tensor(0.0), **moments}
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        self.table = distribute_tensor(torch.zeros(ROWS, COLUMNS), mesh, [Shard(0)], src_data_rank=None)
        self.step = 0

    def train(self) -> None:
        self.step += 1
        generator = torch.Generator().manual_seed(self.step)
        batch = torch.randn(16, WIDTH, generator=generator)
        self.optimizer.zero_grad()
        torch.nn.functional.mse_loss(self.model(batch), batch.flip(1)).backward()
        self.optimizer.step()
        row = self.step % ROWS - self._first_row()
        if 0 <= row < len(self.table.to_local()):
            self.table.to_local()[row] += torch.randn(COLUMNS, generator=generator)

    def state(self) -> dict[str, Any]:
        moments = {
            f"{number}.{name}": tensor
            for number, one in enumerate(self.optimizer.state.values())
            for name, tensor in one.items()
        }
        return {"model": self.model.state_dict(), "moments": moments, "table": self.table, "step": self.step}

    def load(self, path: Path) -> None:
        state = self.state()
        ss.load(state, checkpoint_id=path, timeout=TIMEOUT_S)
        self.step = state["step"]

    def digests(self) -> dict[str, str]:
        """Of this rank's tensors, by name; of the table by row."""
        found = {}
        for group in ("model", "moments"):
            found |= {f"{group}.{name}": digest(tensor) for name, tensor in self.state()[group].items()}
        for number, row in enumerate(self.table.to_local(), self._first_row()):
            found[f"table[{number}]"] = digest(row)
        return found

    def _first_row(self) -> int:
        return -(-ROWS // dist.get_world_size()) * dist.get_rank()


class Oracle:
    """The other end of the socket."""

    def __init__(self, address: str, rank: int) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        self._socket.connect(address)
        self._rank = rank

    def tell(self, what: str, **facts: Any) -> None:
        packet = {"what": what, "rank": self._rank, "at": time.monotonic(), **facts}  # one clock for all processes
        self._socket.send(json.dumps(packet).encode())


def live(rank: int, run: str, address: str, life: Life) -> dict[str, Any]:
    """One life on one rank, until it is killed, another rank was, or its saves are done. How its last save ended."""
    oracle, chosen = Oracle(address, rank), random.Random(life.seed)  # the same choices on every rank
    folder, job = StepFolder(run), Job()
    newest = [folder.newest() if rank == 0 else 0]
    dist.broadcast_object_list(newest, src=0)
    if newest[0] >= 0:
        job.load(Path(run, f"step-{newest[0]}"))
    announce("resumed")
    oracle.tell("resumed", newest=newest[0], step=job.step, digests=job.digests())
    for number in range(1, life.saves + 1):
        for _ in range(chosen.randint(1, 3)):
            job.train()
        if life.ends == "at a call" and rank == life.victim and number == life.save:
            _native.fault_arm(f"*:{life.call}:kill")
        kind = chosen.choice(KINDS)
        name = "last" if kind == "last" else f"step-{job.step}"
        facts = {"kind": kind, "name": name, "step": job.step}
        oracle.tell("about", **facts, digests=job.digests())
        begin = time.monotonic()
        try:
            save(job, Path(run, name), kind, trains_on=chosen.randint(0, 2))
        except Exception as error:
            failed = {"error": type(error).__name__, "failed_ranks": getattr(error, "failed_ranks", None)}
            failed |= {"message": str(error)[:400], "seconds": time.monotonic() - begin, **facts}
            oracle.tell("failed", **failed)
            return failed
        oracle.tell("acknowledged", **facts, **held())
        if rank == 0:
            look_after(oracle, folder, chosen.random() < 0.15)
        else:
            chosen.random()
    return {"error": None}


def save(job: Job, path: Path, kind: str, trains_on: int) -> None:
    """Returns once the save is acknowledged. Training goes on while it is written, except through DCP."""
    state, step = job.state(), job.step
    if kind == "dcp":
        dcp.save(state, storage_writer=StorageWriter(path, overwrite=False, timeout=TIMEOUT_S, step=step))
        return
    if kind == "dcp async":
        dcp.async_save(
            state, storage_writer=StorageWriter(path, overwrite=False, timeout=TIMEOUT_S, step=step)
        ).result()
        return
    options: dict[str, Any] = {
        "full": {},
        "delta": {"base": "auto", "full_every": 6},
        "difference": {"base": "auto", "codec": "xor-zstd", "keyframe_every": 3},
        "last": {"overwrite": True},
    }[kind]
    handle = ss.async_save(state, checkpoint_id=path, step=step, timeout=TIMEOUT_S, **options)
    for _ in range(trains_on):
        job.train()
    handle.result(60)


def look_after(oracle: Oracle, folder: StepFolder, compacts: bool) -> None:
    """Rank 0 prunes, and now and then compacts what it has."""
    goes = [os.path.basename(path) for _, path in folder.committed()[:-KEEP]]
    if goes:
        oracle.tell("prunes", names=goes)
        for trash in folder.prune(KEEP, durable=-1):
            shutil.rmtree(trash)
        oracle.tell("pruned", names=goes)
    kept = folder.committed()
    if compacts and kept:
        _, path = kept[0]
        ss.compact(path, timeout=TIMEOUT_S)
        oracle.tell("compacted", name=os.path.basename(path))


def held() -> dict[str, int]:
    """Descriptors and resident memory of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return {"fds": len(os.listdir("/proc/self/fd")), "rss": pages * os.sysconf("SC_PAGE_SIZE")}
