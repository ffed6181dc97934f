"""transformers' real Trainer with the engine: a run that is killed during a save ends as one that is not, and nothing
that a save needs is deleted before the save is durable.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import time
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import snapstone as ss
from distributed.ranks import run_ranks, values
from roundtrip.bits import nested_equal
from snapstone.integrations import hf, safetensors_file, versions
from snapstone.integrations.numbered import complete, newest_valid

pytestmark = pytest.mark.timeout(400)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What all scenarios come to, in one process that forks for each: to import transformers takes longer than they."""
    (value,) = values(run_ranks(1, _scenarios, tmp_path_factory.mktemp("hf"), store="none", timeout=350))
    assert isinstance(value, dict)
    return value


def _scenarios(rank: int, run: Path) -> dict[str, Any]:
    torch.set_num_threads(1)
    from trainers import hf_jobs as jobs

    jobs.trainer(run / "imports")  # what it imports, children need not
    found = {}
    for scenario in (_killed, _replaced, _stock_dies, _best, _other_ways, _pickled):
        found[scenario.__name__] = scenario(run / scenario.__name__)
    return found


def _killed(run: Path) -> dict[str, Any]:
    from trainers import hf_jobs as jobs

    straight = run / "straight"
    assert jobs.child(lambda: jobs.train(straight)) == 0
    found = {"straight": jobs.names(straight), "hidden": os.listdir(straight)}
    for kill in (jobs.die_in_the_engine, jobs.die_before_the_name, jobs.die_while_deleting):
        where = run / kill.__name__
        assert jobs.child(lambda kill=kill, where=where: kill(where)) == -signal.SIGKILL
        left = jobs.names(where)
        valid = newest_valid(str(where), "checkpoint-", "trainer_state.json")
        assert jobs.child(lambda where=where: jobs.train(where, resume=True)) == 0
        same = nested_equal(jobs.state(where), jobs.state(straight))
        found[kill.__name__] = (left, os.path.basename(valid or ""), same, sorted(os.listdir(where)))
    return found


def test_a_run_killed_during_a_save_ends_bit_identical(found: dict[str, Any]) -> None:
    found = found["_killed"]
    assert found["straight"] == found["hidden"] == ["checkpoint-8"]
    assert found["die_in_the_engine"] == (["checkpoint-2"], "checkpoint-2", True, ["checkpoint-8"])
    assert found["die_before_the_name"] == (["checkpoint-2"], "checkpoint-2", True, ["checkpoint-8"])
    assert found["die_while_deleting"] == (["checkpoint-4"], "checkpoint-4", True, ["checkpoint-8"])


def _replaced(run: Path) -> dict[str, Any]:
    from trainers import hf_jobs as jobs

    assert jobs.child(lambda: jobs.die_between_two_renames(run)) == -signal.SIGKILL
    assert jobs.names(run) == []
    aside = run.with_name("aside")
    shutil.copytree(run, aside)
    named = jobs.child(lambda: jobs.train(run.with_name("other"), resume=str(aside / "checkpoint-4")))
    assert jobs.child(lambda: jobs.train(run, resume=True)) == 0
    return {"named": named, "left": jobs.names(run)}


def test_a_checkpoint_that_was_being_replaced_comes_back(found: dict[str, Any]) -> None:
    assert found["_replaced"] == {"named": 0, "left": ["checkpoint-8"]}


def _stock_dies(run: Path) -> dict[str, Any]:
    from trainers import hf_jobs as jobs

    where, straight = run / "stock", run / "straight"
    assert jobs.child(lambda: jobs.die_in_stock(where)) == -signal.SIGKILL
    left = jobs.names(where)
    stock_resumes = jobs.child(lambda: jobs.train_stock(where, resume=True))
    valid = [os.path.basename(path) for path in complete(str(where), "checkpoint-", "trainer_state.json")]
    ours_resumes = jobs.child(lambda: jobs.train(where, resume=True))
    assert jobs.child(lambda: jobs.train_stock(straight)) == 0
    same = nested_equal(jobs.state(where), jobs.state(straight))
    return {"left": left, "stock": stock_resumes, "valid": valid, "ours": ours_resumes, "same": same}


def test_stock_fails_to_resume_from_the_ruin_of_a_save_where_this_goes_on_from_the_one_before(
    found: dict[str, Any],
) -> None:
    found = found["_stock_dies"]
    assert found["left"] == ["checkpoint-2", "checkpoint-4"]
    assert found["stock"] == 1
    assert found["valid"] == ["checkpoint-2"]  # of stock code, from before the switch
    assert found["ours"] == 0
    assert found["same"]


def _best(run: Path) -> dict[str, Any]:
    import transformers

    from snapstone import _native
    from trainers import hf_jobs as jobs

    _native.fault_arm("fsync:1+:delay=30")
    write = safetensors_file.write

    def late(*arguments: Any) -> None:
        time.sleep(0.3)  # when the training has gone on
        write(*arguments)

    safetensors_file.write = late
    metrics = iter([3.0, 1.0, 2.0, 4.0])
    trainer = jobs.trainer(
        run,
        eval_strategy="steps",
        eval_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        save_total_limit=2,
    )
    before = dict(vars(trainer))
    weights: dict[int, Any] = {}

    class Watch(transformers.TrainerCallback):  # type: ignore[misc]
        def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any, **kwargs: Any) -> None:
            weights[state.global_step] = {k: v.clone() for k, v in trainer.model.state_dict().items()}

    def evaluate(*_: Any, **__: Any) -> dict[str, float]:
        found = {"eval_loss": next(metrics)}
        trainer.callback_handler.on_evaluate(trainer.args, trainer.state, trainer.control, found)
        return found

    trainer.evaluate = evaluate
    trainer.add_callback(Watch())
    assert hf.attach(trainer) is trainer
    assert hf.attach(trainer) is trainer
    trainer.train()
    best = nested_equal(dict(trainer.model.state_dict()), weights[4])
    at = json.loads((run / "checkpoint-8" / "trainer_state.json").read_text())["best_model_checkpoint"]
    recorded = json.loads((run / "checkpoint-4" / "trainer_state.json").read_text())["best_model_checkpoint"]
    names = jobs.names(run)
    hf.detach(trainer)
    left = sorted(set(vars(trainer)) - set(before))
    safetensors_file.write = write
    module = transformers.trainer.rotate_checkpoints.__module__, transformers.modeling_utils.safe_save_file.__module__
    _native.fault_disarm()

    # Going back, and damage.
    again = jobs.trainer(run, max_steps=9, save_total_limit=2)
    told = []
    try:
        again.train(resume_from_checkpoint=True)
    except FileNotFoundError as error:
        told.append(str(error))
    hf.to_stock(run / "checkpoint-8")
    again = jobs.trainer(run, max_steps=9, save_strategy="no", save_total_limit=2)
    again.train(resume_from_checkpoint=True)
    path = run / "checkpoint-8" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    damaged = hf.attach(jobs.trainer(run, max_steps=5, save_strategy="no", save_total_limit=2))
    try:
        damaged.train(resume_from_checkpoint=str(run / "checkpoint-8"))
    except ss.CorruptCheckpointError as error:
        told.append(str(error))
    damaged.train(resume_from_checkpoint=True)
    loaded = jobs.GPT2LMHeadModel.from_pretrained(run / "checkpoint-4").state_dict()
    return {
        "best": best,
        "at": [os.path.basename(at), os.path.basename(recorded)],
        "names": names,
        "left": [name for name in left if name != "evaluate"],
        "module": module,
        "told": told,
        "resumed_at": damaged.state.global_step,
        "from_pretrained": nested_equal(dict(loaded), weights[4]),
    }


def test_best_model_retention_detaching_and_damage(found: dict[str, Any]) -> None:
    found = found["_best"]
    assert found["best"]
    assert found["at"] == ["checkpoint-4", "checkpoint-4"]
    assert found["names"] == ["checkpoint-4", "checkpoint-8"]
    assert not {"train", "save_model", "_save_checkpoint"} & set(found["left"])
    assert found["module"] == ("transformers.trainer_utils", "safetensors.torch")
    assert "optimizer.pt" in found["told"][0]  # stock code does not go on with an empty optimizer
    assert "model.safetensors" in found["told"][1]
    assert found["resumed_at"] == 5
    assert found["from_pretrained"]


def _other_ways(run: Path) -> dict[str, Any]:
    import transformers

    from snapstone import _native
    from trainers import hf_jobs as jobs

    class Own(transformers.Trainer):  # type: ignore[misc]
        def save_model(self, output_dir: Any = None, _internal_call: bool = False) -> None:
            super().save_model(output_dir, _internal_call=_internal_call)
            Path(output_dir, "card.md").write_text("mine")

        def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
            super()._save_optimizer_and_scheduler(output_dir)
            Path(output_dir, "ema.pt").touch()

    seen: list[list[str]] = []

    class Look(transformers.TrainerCallback):  # type: ignore[misc]
        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            seen.append(sorted(os.listdir(run / "own" / f"checkpoint-{state.global_step}")))

    plain = jobs.trainer(run / "own", max_steps=4)
    own = Own(plain.model, plain.args, train_dataset=jobs.Tokens(), callbacks=[Look()])
    hf.attach(own, asynchronous=False)
    own.train()
    hf.attach(jobs.trainer(run / "own", max_steps=5)).train(resume_from_checkpoint=True)  # from stock's files

    failing = hf.attach(jobs.trainer(run / "failing"))
    failing.add_callback(jobs.Before(4, lambda: (ss.wait(), _native.fault_arm("renameat2:1:errno=EIO"))))
    told = []
    try:
        failing.train()
    except OSError as error:
        told = [error.errno, failing.state.global_step]
    _native.fault_disarm()
    ss.wait()  # told once
    last = hf.attach(jobs.trainer(run / "own", max_steps=5))
    last.train(resume_from_checkpoint=True)
    ruin = run / "own" / f"checkpoint-{last.state.global_step}"
    ruin.mkdir(exist_ok=True)
    sentinel = ruin / "checkpoint-is-incomplete.txt"
    sentinel.write_text("as transformers' just-in-time checkpoints do")
    last._save_checkpoint(last.model, None)
    return {
        "seen": seen,
        "told": told,
        "failing": jobs.names(run / "failing"),
        "hidden": [one for one in os.listdir(run / "failing") if one.startswith(".")],
        "sentinel": sentinel.exists(),
        "own": jobs.names(run / "own") == [ruin.name],
    }


def test_subclasses_synchronous_saves_and_saves_that_fail(found: dict[str, Any]) -> None:
    found = found["_other_ways"]
    assert len(found["seen"]) == 2
    for names in found["seen"]:
        assert {"card.md", "ema.pt", "optimizer.pt", "model.safetensors", "snapstone.json"} <= set(names)
    assert found["told"] == [errno.EIO, 6]  # by the next save
    assert found["failing"] == ["checkpoint-2"]
    assert found["hidden"] == []
    assert not found["sentinel"]
    assert found["own"]


class _Note:
    """In an optimizer's state: what only pickle can store."""


def _pickled(run: Path) -> dict[str, Any]:
    from trainers import hf_jobs as jobs

    class Noting(torch.optim.AdamW):
        loaded: Any = None

        def state_dict(self) -> dict[str, Any]:
            return {**super().state_dict(), "note": _Note()}

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            Noting.loaded = state_dict["note"]
            super().load_state_dict(state_dict)

    def attached(steps: int) -> Any:
        trainer = jobs.trainer(run, max_steps=steps)
        trainer.optimizer = Noting(trainer.model.parameters())
        return hf.attach(trainer, allow_pickle=True)

    attached(2).train()
    last = attached(4)
    last.train(resume_from_checkpoint=True)
    checkpoint = run / "checkpoint-4"
    path = hf.to_stock(checkpoint, allow_pickle=True)
    refused = ""
    try:
        hf.to_stock(checkpoint)
    except ss.IncompatibleCheckpointError as error:
        refused = str(error)
    return {
        "resumed": [last.state.global_step, type(Noting.loaded).__name__],
        "back": type(torch.load(path, weights_only=False)["note"]).__name__,
        "refused": "allow_pickle=True" in refused,
    }


def test_what_was_saved_with_pickle_is_resumed_from(found: dict[str, Any]) -> None:
    assert found["_pickled"] == {"resumed": [4, "_Note"], "back": "_Note", "refused": True}


def _two_ranks(rank: int, run: Path) -> dict[str, Any]:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank), ACCELERATE_USE_CPU="true")
    os.environ.update(LOCAL_WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT="1")  # nobody goes there
    os.environ.update(GLOO_SOCKET_IFNAME="lo", SNAPSTONE_TIMEOUT="12")
    from snapstone import _native
    from trainers import hf_jobs as jobs

    def train(where: Path, phase: str, kill: bool = False, resume: bool = False) -> None:
        store = dist.FileStore(str(run / f"store-{phase}"), 2)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=20))
        if kill and rank == 0:
            _native.fault_arm("renameat2:2:kill")
        jobs.train(where, resume=resume, ddp_backend="gloo", max_steps=4)
        dist.barrier()

    killed = run / "killed"
    straight = jobs.child(lambda: train(run / "straight", "straight"))
    interrupted = jobs.child(lambda: train(killed, "killed", kill=True))
    left = jobs.names(killed)
    resumed = jobs.child(lambda: train(killed, "resumed", resume=True))
    return {"ends": [straight, interrupted, resumed], "left": left}


def test_two_ranks_killed_and_resumed(tmp_path: Path) -> None:
    results = run_ranks(2, _two_ranks, tmp_path, store="none", timeout=200)
    first, second = values(results)
    print(*(one.output for one in results))
    assert first == {"ends": [0, -signal.SIGKILL, 0], "left": ["checkpoint-2"]}
    assert second == {"ends": [0, 1, 0], "left": ["checkpoint-2"]}
    straight, killed = tmp_path / "straight" / "checkpoint-4", tmp_path / "killed" / "checkpoint-4"
    assert nested_equal(*(ss.Checkpoint.open(one / "optimizer").state_dict() for one in (straight, killed)))
    for name in ("model.safetensors", "scheduler.pt", "rng_state_0.pth", "rng_state_1.pth"):
        assert (straight / name).read_bytes() == (killed / name).read_bytes()


def test_what_is_not_supported_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TypeError, match="attach takes a transformers"):
        hf.attach(object())
    with pytest.raises(ValueError, match="overwrite: not an option here"):
        hf.attach(object(), overwrite=True)
    from accelerate import Accelerator

    for options in ({"codec": "zstd"}, {"allow_pickle": True}, {"host_memory_budget": 1 << 30}):
        with pytest.raises(ValueError, match=f"{next(iter(options))}: not an option here"):
            hf.attach(Accelerator(cpu=True), **options)
    for package, range_ in (("accelerate", ">= 1.15, < 2"), ("transformers", ">= 5.23, < 6")):
        with monkeypatch.context() as patch:
            patch.setattr(versions, "version", lambda name, p=package: "0.9.1" if name == p else version(name))
            with pytest.raises(versions.UnsupportedVersionError, match=f"{package} {range_}"):
                hf.attach(object())
