"""Joining and leaving the process group of a run that torchrun or `workers.py` started."""

from __future__ import annotations

import os
import sys
from datetime import timedelta
from typing import NoReturn

import torch
import torch.distributed as dist


def join(device_type: str | None = None) -> torch.device:
    """This rank's device, after meeting the peers: CUDA where there is any, unless told otherwise.

    A run that is resumed shall continue bit for bit, so operations are deterministic, and on the CPU one thread gives
    sums one order.
    """
    if device_type is None:
        device_type = "cuda" if torch.cuda.is_available() else "cpu"
    torch.use_deterministic_algorithms(True)
    if device_type == "cpu":
        torch.set_num_threads(1)
        dist.init_process_group("gloo", timeout=timedelta(seconds=60))
        return torch.device("cpu")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # or cuBLAS is not deterministic
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl")
    return device


def leave() -> NoReturn:
    """Ends this process, without the interpreter's teardown once the group is destroyed.

    The model still refers to the group, so gloo's threads live on, and one that drops the last collective's tensors
    during teardown aborts the process (torch 2.13, ProcessGroupGloo::runLoop; about one exit in thirty).
    """
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)
