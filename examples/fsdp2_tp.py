"""FSDP2 and tensor parallelism on a mesh of two dimensions. Saves with dcp.save through snapstone's storage.

torchrun --nproc-per-node 4 examples/fsdp2_tp.py --tp 2 --dir run --steps 8 --save-every 4
torchrun --nproc-per-node 2 examples/fsdp2_tp.py --tp 1 --dir run --steps 16               # resumes, without TP
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from group import join, leave
from job import Job, arguments, checkpoint_path, new_model, newest_checkpoint, report
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from snapstone.dcp import StorageReader, StorageWriter

BLOCK_PLAN = {
    "attention.project_in": ColwiseParallel(),
    "attention.project_out": RowwiseParallel(),
    "mlp.0": ColwiseParallel(),
    "mlp.2": RowwiseParallel(),
}


def laid_out(device: torch.device, tp: int) -> Job:
    mesh = init_device_mesh(device.type, (dist.get_world_size() // tp, tp), mesh_dim_names=("dp", "tp"))
    model = new_model(device)
    for block in model.blocks:
        parallelize_module(block, mesh["tp"], BLOCK_PLAN)
        fully_shard(block, mesh=mesh["dp"])
    fully_shard(model, mesh=mesh["dp"])
    return Job(model, device, share=mesh.get_local_rank("dp"), shares=mesh["dp"].size())


def main(argv: Sequence[str] | None = None) -> None:
    parser = arguments(__doc__)
    parser.add_argument("--tp", type=int, default=2, help="ranks that share each layer; divides their number")
    options = parser.parse_args(argv)
    job = laid_out(join(), options.tp)
    newest = newest_checkpoint(options.dir)
    if newest is not None:
        state = job.state_dict()
        dcp.load(state, storage_reader=StorageReader(newest))
        job.load_state_dict(state)

    while job.step < options.steps:
        loss = job.train_step()
        report(job.step, loss)
        if job.step % options.save_every == 0:
            path = checkpoint_path(options.dir, job.step)
            dcp.save(job.state_dict(), storage_writer=StorageWriter(path))


if __name__ == "__main__":
    main()
    leave()
