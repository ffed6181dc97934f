"""FSDP2: model and optimizer sharded over all ranks. Saves with dcp.async_save through snapstone's storage.

torchrun --nproc-per-node 4 examples/fsdp2.py --dir run --steps 8 --save-every 4
torchrun --nproc-per-node 2 examples/fsdp2.py --dir run --steps 16               # resumes, on fewer ranks
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from group import join, leave
from job import Job, arguments, checkpoint_path, new_model, newest_checkpoint, report
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from snapstone.dcp import StorageReader, StorageWriter


def laid_out(device: torch.device) -> Job:
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    model = new_model(device)
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return Job(model, device, share=mesh.get_local_rank(), shares=mesh.size())


def main(argv: Sequence[str] | None = None) -> None:
    options = arguments(__doc__).parse_args(argv)
    job = laid_out(join())
    newest = newest_checkpoint(options.dir)
    if newest is not None:
        state = job.state_dict()
        dcp.load(state, storage_reader=StorageReader(newest))
        job.load_state_dict(state)

    saving: Future[None] | None = None
    saving_group = dist.new_group(backend="gloo")  # of its own: DCP talks on another thread while training goes on
    while job.step < options.steps:
        loss = job.train_step()
        report(job.step, loss)
        if job.step % options.save_every == 0:
            if saving is not None:
                saving.result()  # raises what the save raised
            writer = StorageWriter(checkpoint_path(options.dir, job.step))
            saving = dcp.async_save(job.state_dict(), storage_writer=writer, process_group=saving_group)
    if saving is not None:
        saving.result()


if __name__ == "__main__":
    main()
    leave()
