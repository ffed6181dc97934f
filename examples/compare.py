"""The worker behind the table: one sharded state, saved and loaded by each engine in turns, in one pair of processes.

Every round takes the engines in alternating order, each into a directory of its own that is removed afterwards, and the
first round is not counted: engines allocate buffers in it. Times are those of the slowest rank.

    stall      training blocked: the call of async_save plus the wait before the next optimizer step
    step       forward, backward and optimizer step with the save in flight, beside the same step without one
    durable    from the call to committed and synced: of async_save with a step at its side, and of save alone
    load       into the live state, page cache dropped before, bytes compared with those saved
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import time
from collections import defaultdict
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from backends import ENGINES, Engine, State, directory_bytes, drop_page_cache
from gpt import VOCABULARY, Gpt
from group import join, leave
from scale import SCALES
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from trainer import TimedAdamW, local_digest, sharded_gpt

Times = dict[str, float]


class Bench:
    def __init__(self, model: Gpt, run: Path, rank: int) -> None:
        self.model = model
        self.optimizer = TimedAdamW.of(model, 1e-4)
        self.hook_s = 0.0
        self.run = run
        self.rank = rank
        self.tokens = torch.randint(VOCABULARY, (1, model.config.context))
        self.train_step()  # makes the Adam state
        weights, moments = get_state_dict(model, self.optimizer)
        self.state: State = {"model": weights, "optimizer": moments}

    def train_step(self) -> float:
        """Seconds of one forward, backward and update."""
        started = time.perf_counter()
        loss = F.cross_entropy(self.model(self.tokens).flatten(0, 1), self.tokens.flatten())
        torch.autograd.backward(loss)
        hooks = time.perf_counter()
        self.optimizer.step()
        self.hook_s = self.optimizer.began - hooks
        self.optimizer.zero_grad()
        return time.perf_counter() - started

    def measure(self, engine: Engine, round_name: str) -> Times:
        paths = [self.run / f"{engine.name}-{round_name}-{kind}" for kind in ("async", "sync")]
        times = self.measure_async(engine, paths[0])
        times |= self.measure_save(engine, paths[1])
        times |= self.measure_load(engine, paths[1])
        times["stored_bytes"] = directory_bytes(paths[1])
        self.settle()
        if self.rank == 0:
            for path in paths:
                shutil.rmtree(path)
        return times

    def measure_async(self, engine: Engine, path: Path) -> Times:
        self.settle()
        plain_step_s = self.train_step()
        self.settle()
        saving = engine.async_save(self.state, path, self.optimizer)
        step_s = self.train_step()
        saving.finish()
        return {
            "stall_s": saving.call_s + self.hook_s,
            "step_s": step_s,
            "plain_step_s": plain_step_s,
            "async_durable_s": saving.durable_s,
        }

    def measure_save(self, engine: Engine, path: Path) -> Times:
        self.settle()
        started = time.perf_counter()
        engine.save(self.state, path)
        return {"save_durable_s": time.perf_counter() - started}

    def measure_load(self, engine: Engine, path: Path) -> Times:
        saved = local_digest(self.state)
        clear(self.state)
        self.settle()
        if self.rank == 0:
            drop_page_cache(path)
        dist.barrier()
        started = time.perf_counter()
        engine.load(self.state, path)
        load_s = time.perf_counter() - started
        if local_digest(self.state) != saved:
            raise SystemExit(f"{engine.name}: rank {self.rank} loaded other bytes than it saved")
        return {"load_s": load_s}

    def settle(self) -> None:
        """Nothing of what came before is measured with what comes next: all ranks are here, the disk is idle."""
        dist.barrier()
        if self.rank == 0:
            os.sync()
        dist.barrier()


def clear(state: object) -> None:
    """Zeroes every tensor in nested dicts."""
    if isinstance(state, dict):
        for value in state.values():
            clear(value)
    elif isinstance(state, torch.Tensor):
        local = state.to_local() if isinstance(state, DTensor) else state
        local.detach().zero_()


def slowest(times: Times) -> Times:
    """The largest of all ranks' times, name by name."""
    names = sorted(times)
    values = torch.tensor([times[name] for name in names], dtype=torch.float64)
    dist.all_reduce(values, dist.ReduceOp.MAX)
    return dict(zip(names, values.tolist(), strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--log", type=Path, required=True, help="prefix of the log files")
    parser.add_argument("--engines", required=True, help="names, joined by commas")
    parser.add_argument("--scale", choices=SCALES, default="full")
    options = parser.parse_args()
    scale = SCALES[options.scale]
    join("cpu")
    rank, world_size = dist.get_rank(), dist.get_world_size()
    engines = [ENGINES[name]() for name in options.engines.split(",")]
    bench = Bench(sharded_gpt(scale.compared_model, init_device_mesh("cpu", (world_size,))), options.run, rank)

    measured: dict[str, list[Times]] = defaultdict(list)
    for round_index in range(1 + scale.compared_rounds):
        for engine in engines if round_index % 2 == 0 else reversed(engines):
            times = slowest(bench.measure(engine, str(round_index)))
            if round_index > 0:
                measured[engine.name].append(times)
    Path(f"{options.log}.rank-{rank}.json").write_text(json.dumps(measured))
    leave()


if __name__ == "__main__":
    main()
