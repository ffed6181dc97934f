"""Run by test_async: saves through DCP's process executor, which cannot start from a test's own daemon processes.

Prints a line of JSON with what the test asserts.
"""

from __future__ import annotations

import json
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType

import snapstone as ss
from snapstone.dcp import Stager, StorageWriter


def descriptors() -> dict[int, str]:
    found = {}
    for number in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):  # what listed the directory
            found[int(number)] = os.readlink(f"/proc/self/fd/{number}")
    return found


def segments() -> list[int]:
    return [number for number, name in descriptors().items() if "snapstone-staging" in name]


def held(run: Path) -> int:
    """Descriptors that a save can leave behind; torch's sockets and pipes close when its threads get to it."""
    return sum("snapstone-staging" in name or name.startswith(str(run)) for name in descriptors().values())


def save(state: dict[str, Any], writer: StorageWriter, stager: Stager) -> Any:
    return dcp.async_save(
        state, storage_writer=writer, async_stager=stager, async_checkpointer_type=AsyncCheckpointerType.PROCESS
    )


def main(run: Path) -> None:
    dist.init_process_group("gloo", store=dist.FileStore(str(run / "store"), 1), rank=0, world_size=1)
    state = {"list": [torch.zeros(1000) for _ in range(400)], "big": torch.zeros(3_000_000), "step": 0}
    stager, writer = Stager(timeout=60), StorageWriter(run / "c")
    counts, found = [], []
    for number in range(1, 5):
        for tensor in [*state["list"], state["big"]]:
            tensor.fill_(number)
        state["step"] = number
        response = save(state, writer, stager)
        response.staging_completion.result()
        state["big"].zero_()
        response.upload_completion.result()
        loaded = ss.Checkpoint.open(run / "c").state_dict()
        found.append([number, *(set(loaded["big"].tolist())), loaded["step"], loaded["list"][399][5].item()])
        counts.append(held(run))
    failed = save(state, StorageWriter(run / "c", overwrite=False), stager)
    error = str(failed.upload_completion.exception())  # held, and with it the staged state
    save(state, writer, stager).upload_completion.result()
    copies = [os.dup(number) for number in segments()]
    stager.close()
    left = sum(os.fstat(number).st_blocks for number in copies)
    print(json.dumps({"found": found, "counts": counts, "error": error, "left": left, "segments": len(copies)}))
    del failed
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
