"""A small DeepSpeed job, run as a script by torchrun: it trains, is killed, and goes on.

Batches and dropout come from the random generators, which DeepSpeed does not save.

    deepspeed_job.py killed --stage 1 --dir D   trains and dies within its second save
    deepspeed_job.py resumed --dir D            goes on from there, both stages, and trains once more in one go
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import random
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed
import numpy as np
import torch
import torch.distributed as dist
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

from snapstone import _native
from snapstone.errors import IncompatibleCheckpointError
from snapstone.integrations.deepspeed import attach, detach, export
from snapstone.integrations.deepspeed_base.stub import is_stub

STEPS = 6
EVERY = 2
FAULT = "renameat2:2:kill"  # in place of the commit of the second save


class Note:
    """Of the job's own, in client_state: needs pickle."""

    def __init__(self, text: str) -> None:
        self.text = text


def seed(value: int) -> None:
    random.seed(value)
    np.random.seed(value)
    torch.manual_seed(value)


def make(stage: int) -> Any:
    seed(7)
    model = torch.nn.Sequential(
        torch.nn.Linear(16, 33),
        torch.nn.Dropout(0.5),
        torch.nn.ReLU(),
        torch.nn.LayerNorm(33),
        torch.nn.Linear(33, 16),
    )
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "optimizer": {"type": "Adam", "params": {"lr": 0.01, "torch_adam": True}},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 10}},
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "steps_per_print": 1000,
    }
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
    seed(70 + dist.get_rank())
    return engine


def train(engine: Any, steps: int, directory: Path | None = None, watch: Callable[[Any], None] | None = None) -> None:
    while engine.global_steps < steps:
        batch = torch.randn(4, 16) + float(np.random.rand()) + random.random()
        loss = engine(batch.bfloat16()).float().square().mean()
        engine.backward(loss)
        engine.step()
        if watch is not None:
            watch(engine)
        if directory is not None and engine.global_steps % EVERY == 0:
            engine.save_checkpoint(str(directory), client_state={"seen": engine.global_steps, "kind": ("a", None)})


def digest(engine: Any) -> str:
    """Of everything that DeepSpeed saves of this rank: parameters, buffers, masters, moments."""
    hashed = hashlib.sha256()
    filled = filled_up(engine)

    def add(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            whole = value.detach().float().flatten()
            hashed.update((whole[~filled] if whole.numel() == filled.numel() else whole).numpy().tobytes())
        elif isinstance(value, dict):
            for key in value:
                hashed.update(str(key).encode())
                add(value[key])
        elif isinstance(value, list | tuple):
            for item in value:
                add(item)

    add(engine.module.state_dict())
    add(engine.optimizer.state_dict())
    add(engine.lr_scheduler.state_dict())
    return hashed.hexdigest()


def filled_up(engine: Any) -> torch.Tensor:
    """Where in this rank's flat tensors ZeRO-3 fills partitions up, with whatever was in that memory."""
    if engine.zero_optimization_stage() < 3:
        return torch.zeros(0, dtype=torch.bool)
    parts = []
    for parameter in engine.module.parameters():
        count = parameter.partition_numel()
        parts.append(dist.get_rank() * count + torch.arange(count) >= parameter.ds_numel)
    return torch.cat(parts)


def killed(stage: int, directory: Path) -> None:
    if dist.get_rank() == 0:
        _native.fault_arm(FAULT)
    engine = make(stage)
    attached = attach(engine)
    train(engine, STEPS, directory / f"run-{stage}")
    attached.wait()


def resumed(stage: int, directory: Path) -> dict[str, Any]:
    run = directory / f"run-{stage}"
    straight = make(stage)
    digests: dict[int, str] = {}
    train(straight, STEPS, watch=lambda engine: digests.update({engine.global_steps: digest(engine)}))

    engine = make(stage)
    attached = attach(engine)
    path, client_state = engine.load_checkpoint(str(run))
    left = [str(one) for one in run.glob("*/.staging-*")]
    found = {
        "left": left,
        "at": digest(engine),
        "seen": client_state["seen"],
        "kind": list(client_state["kind"]),
        "path": path,
    }
    train(engine, STEPS, run)
    attached.wait()
    return {**found, "end": digest(engine), "straight": digests, **others(engine, stage, directory)}


def others(engine: Any, stage: int, directory: Path) -> dict[str, Any]:
    """What is asked of checkpoints that are there now; all of it collective."""
    run = directory / f"run-{stage}"
    expected = digest(engine)
    attached = engine.checkpoint_engine

    # Back to stock: through stubs, and through files that `export` wrote.
    detach(engine)
    restored = {"engine": type(engine.checkpoint_engine).__name__}
    restored["save"] = engine.save_checkpoint == type(engine).save_checkpoint.__get__(engine)
    restored["load"] = engine.load_checkpoint == type(engine).load_checkpoint.__get__(engine)
    if dist.get_rank() == 0:
        export(run / "global_step6", directory / f"back-{stage}" / "global_step6")
    dist.barrier()
    loaded = []
    for source in (run, directory / f"back-{stage}"):
        back = make(stage)
        train(back, 1)
        back.load_checkpoint(str(source), tag="global_step6")
        loaded.append(digest(back) == expected)

    # A stock checkpoint from before the switch, and one saved by stock over a tag of ours.
    engine.save_checkpoint(str(directory / f"stock-{stage}"))
    engine.save_checkpoint(str(run), tag="global_step4", save_latest=False)
    for source, tag in ((directory / f"stock-{stage}", None), (run, "global_step4")):
        after = make(stage)
        attach(after)
        after.load_checkpoint(str(source), tag=tag)
        loaded.append(digest(after) == expected)
    assert attached is not after.checkpoint_engine
    return {"restored": restored, "loaded": loaded, **policies(after, stage, directory)}


def policies(engine: Any, stage: int, directory: Path) -> dict[str, Any]:
    """With an engine that is attached."""
    found: dict[str, Any] = {}
    where = str(directory / f"policy-{stage}")
    engine.save_checkpoint(where, tag="noted", client_state={"note": Note("hello")})
    found["refused"] = raised(lambda: engine.load_checkpoint(where), IncompatibleCheckpointError)
    with torch.serialization.safe_globals([Note]):
        found["note"] = engine.load_checkpoint(where)[1]["note"].text

    # The rename fails on rank 0: every rank hears of it, and `latest` stays.
    if dist.get_rank() == 0:
        _native.fault_arm("renameat2:1:errno=ENOSPC")
    engine.save_checkpoint(where, tag="failed")
    found["failed"] = raised(engine.checkpoint_engine.wait, Exception)
    _native.fault_disarm()
    found["latest"] = Path(where, "latest").read_text()

    # Ranks of which one cannot save, and that do not agree.
    state = {"lock": threading.Lock()} if dist.get_rank() == 0 else {}  # with stage 1 the only one to save it
    found["locked"] = raised(lambda: engine.save_checkpoint(where, tag="locked", client_state=state), Exception)
    found["apart"] = raised(lambda: engine.save_checkpoint(where, tag=f"of-{dist.get_rank()}"), Exception)

    # The commit takes its time, and training does not wait.
    expected = digest(engine)
    if dist.get_rank() == 0:
        _native.fault_arm("renameat2:1:delay=3000")
    engine.save_checkpoint(where, tag="late")
    train(engine, engine.global_steps + 1)
    found["early"] = Path(where, "latest").read_text()
    engine.checkpoint_engine.wait()
    _native.fault_disarm()
    found["in time"] = Path(where, "latest").read_text()
    changed = digest(engine)

    # What a job leaves that is killed between the commit and the names; the next load puts it right.
    dist.barrier()
    if dist.get_rank() == 0:
        for stub in sorted(Path(where, "late").glob("*.pt"))[:2]:
            stub.unlink()
    dist.barrier()
    engine.load_checkpoint(where)
    found["late"] = [changed != expected, digest(engine) == expected]

    # Files of two saves, where stock was killed as it saved over ours.
    if dist.get_rank() == 0:
        stub = min(Path(where, "late").glob("*_optim_states.pt"))
        torch.save(torch.load(stub, weights_only=False), stub)
    dist.barrier()
    found["mixed"] = raised(lambda: engine.load_checkpoint(where, tag="late"), Exception)

    if stage == 1:  # for stage 3 DeepSpeed would have to be told to gather
        engine.save_16bit_model(where, "whole.bin")
        dist.barrier()  # rank 0 writes it
        found["whole"] = not is_stub(Path(where, "whole.bin")) and len(torch.load(Path(where, "whole.bin")))
    found["twice"] = raised(lambda: attach(engine), ValueError)

    if dist.get_rank() == 0:
        weights = get_fp32_state_dict_from_zero_checkpoint(str(directory / f"run-{stage}"), "global_step6")
        back = get_fp32_state_dict_from_zero_checkpoint(str(directory / f"back-{stage}"), "global_step6")
        found["weights"] = bool(weights) and all(torch.equal(weights[name], back[name]) for name in back)
    dist.barrier()
    engine.save_checkpoint(where, tag="last")  # and nobody waits for it
    return found


def raised(call: Callable[[], Any], kind: type[BaseException]) -> str:
    try:
        call()
    except kind as error:
        return f"{type(error).__name__}: {error}"
    return ""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=["killed", "resumed"])
    parser.add_argument("--stage", type=int, choices=[1, 3])
    parser.add_argument("--dir", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    # An extra that DeepSpeed compiles, for half a minute, at its first use.
    vars(importlib.import_module("deepspeed.comm.torch"))["build_shm_op"] = lambda: None
    deepspeed.init_distributed(dist_backend="gloo")
    if options.what == "killed":
        killed(options.stage, options.dir)
        return
    found = {stage: resumed(stage, options.dir) for stage in ((options.stage,) if options.stage else (1, 3))}
    (options.dir / f"result-{dist.get_rank()}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
