"""Accelerate with the engine: its FSDP2 functions unchanged, and `save_state` of a real Accelerator, which is complete
or absent, and deletes nothing before.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

import snapstone as ss
import snapstone.dcp
from distributed.ranks import run_ranks, values
from roundtrip.bits import nested_equal
from snapstone.integrations import hf
from snapstone.integrations.numbered import complete

pytestmark = pytest.mark.timeout(300)


def _fsdp(rank: int, run: Path) -> dict[str, Any]:
    from accelerate.utils import (
        ProjectConfiguration,
        load_fsdp_model,
        load_fsdp_optimizer,
        save_fsdp_model,
        save_fsdp_optimizer,
    )

    from trainers import hf_fsdp

    hf_fsdp.pretend_launched(rank, 2)
    plugin, stub = hf_fsdp.plugin(), hf_fsdp.stub()
    model, optimizer = hf_fsdp.sharded(1)
    saved = hf_fsdp.local(model, optimizer)

    def save(name: str) -> None:
        save_fsdp_model(plugin, stub, model, str(run / name))
        save_fsdp_optimizer(plugin, stub, optimizer, model, str(run / name))

    def load(name: str) -> bool:
        other, its_optimizer = hf_fsdp.sharded(2)
        load_fsdp_model(plugin, stub, other, str(run / name))
        load_fsdp_optimizer(plugin, stub, its_optimizer, other, str(run / name))
        return nested_equal(hf_fsdp.local(other, its_optimizer), saved)

    found: dict[str, Any] = {}
    save("stock")
    with snapstone.dcp.installed(asynchronous=True):
        save("ours")
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        found["ours"] = load("ours")  # waits
        found["stock"] = load("stock")
    ss.wait()

    # The whole of save_state and load_state.
    model, optimizer = hf_fsdp.sharded(1)
    project = ProjectConfiguration(str(run / "project"), automatic_checkpoint_naming=True, total_limit=2)
    accelerator = hf_fsdp.accelerator(model, optimizer, project_config=project)
    hf.attach(accelerator)
    for _ in range(3):
        accelerator.save_state()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    accelerator.load_state()
    found["state"] = nested_equal(hf_fsdp.local(model, optimizer), saved)
    accelerator.project_configuration.automatic_checkpoint_naming = False
    for _ in range(2):  # over itself
        accelerator.save_state(str(run / "named"))
    accelerator.load_state(str(run / "named"))
    os.makedirs(run / "precious", exist_ok=True)
    (run / "precious" / "file").touch()
    try:
        accelerator.save_state(str(run / "precious"))
    except Exception as error:
        found["precious"] = type(error).__name__
    hf.detach(accelerator)
    found["left"] = sorted({"save_state", "load_state"} & set(vars(accelerator)))
    accelerator.save_state(str(run / "detached"))
    hf.attach(accelerator)
    accelerator.load_state(str(run / "detached"))
    found["detached"] = nested_equal(hf_fsdp.local(model, optimizer), saved)
    hf.detach(accelerator)
    return found


def test_fsdp2_saves_and_loads_in_two_processes(tmp_path: Path) -> None:
    first, second = values(run_ranks(2, _fsdp, tmp_path, timeout=200))
    assert first.pop("precious") == "FileExistsError"
    assert second.pop("precious") == "RankFailedError"
    assert first == second == {"ours": True, "stock": True, "state": True, "left": [], "detached": True}
    checkpoints = tmp_path / "project" / "checkpoints"
    assert sorted(os.listdir(checkpoints)) == ["checkpoint_1", "checkpoint_2"]
    assert os.listdir(tmp_path / "project") == ["checkpoints"]
    for run in (tmp_path / "ours", tmp_path / "named", checkpoints / "checkpoint_2"):
        for name in ("pytorch_model_fsdp_0", "optimizer_0"):
            assert ss.verify(run / name)
            assert (run / name / ".metadata").exists()
    names = {"snapstone.json", "random_states_0.pkl", "random_states_1.pkl", "optimizer_0", "pytorch_model_fsdp_0"}
    assert set(os.listdir(tmp_path / "named")) == names
    assert not (tmp_path / "detached" / "pytorch_model_fsdp_0" / "MANIFEST.json").exists()


def _deletion(rank: int, run: Path) -> dict[str, Any]:
    torch.set_num_threads(1)
    import accelerate.accelerator
    from accelerate import Accelerator
    from accelerate.utils import ProjectConfiguration

    from trainers import hf_jobs as jobs

    def save_twice(where: Path, attached: bool) -> None:
        """Dies in the second save, when its model is on its way."""
        project = ProjectConfiguration(str(where), automatic_checkpoint_naming=True, total_limit=1)
        accelerator = Accelerator(cpu=True, project_config=project)
        model = torch.nn.Linear(4, 4)
        accelerator.prepare(model, torch.optim.AdamW(model.parameters()))
        if attached:
            hf.attach(accelerator)
        accelerator.save_state()
        ss.wait()
        accelerate.accelerator.save_accelerator_state = jobs.die
        accelerator.save_state()

    found = {}
    for name, attached in (("stock", False), ("ours", True)):
        end = jobs.child(lambda name=name, attached=attached: save_twice(run / name, attached))
        assert end == -signal.SIGKILL
        left = complete(str(run / name / "checkpoints"), "checkpoint_", "random_states_0.pkl")
        found[name] = [os.path.basename(path) for path in left]
    return found


def test_stock_deletes_the_only_checkpoint_before_the_next_is_written_and_this_does_not(tmp_path: Path) -> None:
    (found,) = values(run_ranks(1, _deletion, tmp_path, store="none", timeout=120))
    assert found == {"stock": [], "ours": ["checkpoint_0"]}


def _cut_off(rank: int, run: Path) -> dict[str, Any]:
    torch.set_num_threads(1)
    from accelerate import Accelerator

    from trainers import hf_jobs as jobs

    last = run / "last"

    def attached(value: float) -> tuple[Any, Any]:
        accelerator = Accelerator(cpu=True)
        model = torch.nn.Linear(4, 4)
        torch.nn.init.constant_(model.weight, value)
        model, _ = accelerator.prepare(model, torch.optim.AdamW(model.parameters()))
        hf.attach(accelerator)
        return accelerator, model

    def replace() -> None:
        """Dies when the directory has lost its old name and not got the new one."""
        accelerator, _ = attached(1.0)
        accelerator.save_state(str(last))
        ss.wait()
        rename = os.rename
        os.rename = lambda *names: jobs.die() if names[1] == str(last) else rename(*names)  # type: ignore[assignment]
        accelerator.save_state(str(last))
        ss.wait()

    def load() -> None:
        accelerator, model = attached(2.0)
        accelerator.load_state(str(last))
        assert (model.weight == 1.0).all()

    found = {"end": jobs.child(replace), "there": last.exists()}
    return found | {"load": jobs.child(load), "left": last.exists()}


def test_a_checkpoint_whose_replacement_was_cut_off_is_loaded_by_its_name(tmp_path: Path) -> None:
    (found,) = values(run_ranks(1, _cut_off, tmp_path, store="none", timeout=120))
    assert found == {"end": -signal.SIGKILL, "there": False, "load": 0, "left": True}
