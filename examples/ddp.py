"""DistributedDataParallel: every rank holds the whole model. Saves with snapstone.async_save, behind training.

    torchrun --nproc-per-node 2 examples/ddp.py --dir run --steps 8 --save-every 4
    torchrun --nproc-per-node 4 examples/ddp.py --dir run --steps 16               # resumes, on more ranks

The ranks write equal shares of the replicated state, each tensor once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from group import join, leave
from job import Job, arguments, checkpoint_path, new_model, newest_checkpoint, report
from torch.nn.parallel import DistributedDataParallel

import snapstone as ss


def laid_out(device: torch.device) -> Job:
    # This flag keeps the buckets as they are. Otherwise DDP reorders them after the first step of a process, and with
    # them, on more than two ranks, the order of sums: a resumed run then differs in its last bits from one that was
    # never interrupted. The price is a pass over the graph, and a warning that nothing was unused.
    model = DistributedDataParallel(new_model(device), find_unused_parameters=True)
    return Job(model, device, share=dist.get_rank(), shares=dist.get_world_size())


def main(argv: Sequence[str] | None = None) -> None:
    options = arguments(__doc__).parse_args(argv)
    job = laid_out(join())
    newest = newest_checkpoint(options.dir)
    if newest is not None:
        state = job.state_dict()
        ss.load(state, checkpoint_id=newest)
        job.load_state_dict(state)

    while job.step < options.steps:
        loss = job.train_step()
        report(job.step, loss)
        if job.step % options.save_every == 0:
            path = checkpoint_path(options.dir, job.step)
            ss.async_save(job.state_dict(), checkpoint_id=path, fence=job.optimizer)  # copied before its next step
    ss.wait()  # raises what a save raised


if __name__ == "__main__":
    main()
    leave()
