"""The worker: one of the processes that train together. `demo.py` starts it; torchrun can too.

Every few steps it saves its state while training goes on. Losses go to LOG.rank-R.losses as they happen, as exact
hexadecimal floats; measured facts go to LOG.rank-R.json at the end.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch.distributed as dist
from backends import ENGINES, InFlight
from corpus import Batches, read_corpus
from group import join, leave
from scale import SCALES
from torch.distributed.device_mesh import init_device_mesh
from trainer import Trainer, local_digest, sharded_gpt, weights_digest

STEP_NAME = "step-{:08d}"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, required=True, help="directory of this run's checkpoints")
    parser.add_argument("--log", type=Path, required=True, help="prefix of the log files")
    parser.add_argument("--resume", type=Path, help="checkpoint to continue from")
    parser.add_argument("--engine", choices=ENGINES, default="snapstone")
    parser.add_argument("--scale", choices=SCALES, default="full")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    scale = SCALES[options.scale]
    join("cpu")
    rank, world_size = dist.get_rank(), dist.get_world_size()
    engine = ENGINES[options.engine]()
    trainer = Trainer(
        sharded_gpt(scale.model, init_device_mesh("cpu", (world_size,))),
        Batches(
            read_corpus(scale.corpus_bytes),
            rows=scale.rows,
            context=scale.model.context,
            rank=rank,
            world_size=world_size,
        ),
        steps=scale.steps,
        warmup_steps=scale.warmup_steps,
        learning_rate=scale.learning_rate,
        rank=rank,
    )
    if options.resume is not None:
        state = trainer.state()
        engine.load(state, options.resume)
        trainer.adopt(state)

    saves: list[dict[str, float]] = []
    in_flight: InFlight | None = None
    with open(f"{options.log}.rank-{rank}.losses", "w", buffering=1) as losses:
        while trainer.step < scale.steps:
            loss = trainer.train_step()
            losses.write(f"{trainer.step} {loss.hex()}\n")
            if in_flight is not None and "hook_s" not in saves[-1]:
                saves[-1]["hook_s"] = trainer.hook_s
            if trainer.step % scale.save_every == 0:
                if in_flight is not None:
                    in_flight.finish()
                in_flight = engine.async_save(
                    trainer.state(), options.run / STEP_NAME.format(trainer.step), trainer.optimizer
                )
                saves.append({"step": trainer.step, "call_s": in_flight.call_s})
    if in_flight is not None:
        in_flight.finish()

    state = trainer.state()
    facts = {
        "saves": saves,
        "shards": local_digest({"model": state["model"], "optimizer": state["optimizer"]}),
        "weights": weights_digest(trainer.model),
    }
    Path(f"{options.log}.rank-{rank}.json").write_text(json.dumps(facts))
    leave()


if __name__ == "__main__":
    main()
