"""Optimizers, schedulers and GradScaler resume exactly: a run that loads goes on as one that never stopped."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn, optim

import snapstone as ss
from roundtrip.bits import bits_of, nested_equal

Make = Callable[[Iterable[Any]], optim.Optimizer]

OPTIMIZERS: dict[str, Make] = {
    "Adam": lambda parameters: optim.Adam(parameters, lr=0.01, amsgrad=True),
    "AdamW": lambda parameters: optim.AdamW(parameters, lr=0.01, weight_decay=0.1),
    "AdamW foreach": lambda parameters: optim.AdamW(parameters, lr=0.01, foreach=True),
    "AdamW fused": lambda parameters: optim.AdamW(parameters, lr=0.01, fused=True),
    "AdamW tensor lr": lambda parameters: optim.AdamW(parameters, lr=torch.tensor(0.01)),
    "SGD momentum": lambda parameters: optim.SGD(parameters, lr=0.01, momentum=0.9, nesterov=True),
    "SGD": lambda parameters: optim.SGD(parameters, lr=0.01),
    "Adagrad": lambda parameters: optim.Adagrad(parameters, lr=0.01),
    "RMSprop": lambda parameters: optim.RMSprop(parameters, lr=0.01, momentum=0.5, centered=True),
    "Adafactor": lambda parameters: optim.Adafactor(parameters, lr=0.01),
    "Rprop": lambda parameters: optim.Rprop(parameters, lr=0.01),
    "ASGD": lambda parameters: optim.ASGD(parameters, lr=0.01),
    "NAdam": lambda parameters: optim.NAdam(parameters, lr=0.01),
    "Adamax": lambda parameters: optim.Adamax(parameters, lr=0.01),
    "LBFGS": lambda parameters: optim.LBFGS(parameters, lr=0.1, max_iter=4, history_size=3),
}


class Training:
    """A small run whose every step depends on all of its state."""

    def __init__(self, make: Make, seed: int) -> None:
        torch.manual_seed(seed)
        self.model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
        self.optimizer = make(self.model.parameters())
        self.scheduler = optim.lr_scheduler.StepLR(self.optimizer, step_size=2, gamma=0.5)
        self.done = 0

    def state(self) -> dict[str, Any]:
        return {"model": self.model, "optim": self.optimizer, "sched": self.scheduler, "step": self.done}

    def train(self, steps: int) -> None:
        for _ in range(steps):
            data = torch.randn(4, 6, generator=torch.Generator().manual_seed(self.done))

            def closure(data: torch.Tensor = data) -> torch.Tensor:
                self.optimizer.zero_grad()
                loss: torch.Tensor = self.model(data).square().sum()
                loss.backward()
                return loss

            self.optimizer.step(closure)
            self.scheduler.step()
            self.done += 1

    def weights(self) -> list[bytes]:
        return [bits_of(parameter) for parameter in self.model.parameters()]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_goes_on_exactly_from_a_fresh_optimizer(tmp_path: Path, name: str) -> None:
    run = Training(OPTIMIZERS[name], seed=1)
    run.train(3)
    saved_optimizer = run.optimizer.state_dict()
    checkpoint = ss.save(run.state(), checkpoint_id=tmp_path / "c")
    assert checkpoint.step == 3

    fresh = Training(OPTIMIZERS[name], seed=2)
    state = fresh.state()
    ss.load(state, checkpoint_id=tmp_path / "c")
    fresh.done = state["step"]
    assert fresh.weights() == run.weights()
    assert nested_equal(fresh.optimizer.state_dict(), saved_optimizer)
    assert fresh.scheduler.state_dict() == run.scheduler.state_dict()
    run.train(3)
    fresh.train(3)
    assert fresh.weights() == run.weights()
    assert nested_equal(fresh.optimizer.state_dict(), run.optimizer.state_dict())


@pytest.mark.parametrize("name", ["AdamW", "SGD momentum", "LBFGS"])
def test_an_optimizer_that_has_stepped_already_is_overwritten(tmp_path: Path, name: str) -> None:
    run, other = Training(OPTIMIZERS[name], seed=1), Training(OPTIMIZERS[name], seed=2)
    run.train(4)
    other.train(4)
    ss.save(run.state(), checkpoint_id=tmp_path / "c")
    ss.load(other.state(), checkpoint_id=tmp_path / "c")
    other.done = run.done
    run.train(2)
    other.train(2)
    assert other.weights() == run.weights()


def test_an_optimizer_that_never_stepped(tmp_path: Path) -> None:
    run, fresh = Training(OPTIMIZERS["AdamW"], seed=1), Training(OPTIMIZERS["AdamW"], seed=2)
    ss.save(run.state(), checkpoint_id=tmp_path / "c")
    ss.load(fresh.state(), checkpoint_id=tmp_path / "c")
    assert fresh.optimizer.state_dict() == run.optimizer.state_dict()
    run.train(2)
    fresh.train(2)
    assert fresh.weights() == run.weights()


def test_parameter_groups_and_frozen_parameters(tmp_path: Path) -> None:
    def make(seed: int) -> tuple[nn.Module, optim.Optimizer]:
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))
        model[1].requires_grad_(False)
        groups = [
            {"params": model[0].parameters(), "lr": 0.1 * seed, "betas": (0.5, 0.9), "name": "first"},
            {"params": [*model[1].parameters(), *model[2].parameters()], "weight_decay": 0.5 / seed},
        ]
        return model, optim.AdamW(groups, lr=0.01)

    model, optimizer = make(1)
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    assert len(optimizer.state) == 4  # the frozen layer has none
    ss.save({"model": model, "optim": optimizer}, checkpoint_id=tmp_path / "c")
    target, fresh = make(2)
    ss.load({"model": target, "optim": fresh}, checkpoint_id=tmp_path / "c")
    assert nested_equal(fresh.state_dict(), optimizer.state_dict())
    assert fresh.param_groups[0]["betas"] == (0.5, 0.9)
    assert type(fresh.param_groups[0]["betas"]) is tuple


@pytest.mark.parametrize(
    "make",
    [
        lambda o: optim.lr_scheduler.CosineAnnealingLR(o, T_max=10),
        lambda o: optim.lr_scheduler.OneCycleLR(o, max_lr=0.1, total_steps=20),
        lambda o: optim.lr_scheduler.SequentialLR(
            o,
            [optim.lr_scheduler.LinearLR(o, total_iters=3), optim.lr_scheduler.ExponentialLR(o, 0.9)],
            milestones=[3],
        ),
        lambda o: optim.lr_scheduler.MultiStepLR(o, milestones=[2, 3, 3]),
        lambda o: optim.lr_scheduler.ReduceLROnPlateau(o, patience=1),
        lambda o: optim.lr_scheduler.LambdaLR(o, lambda step: 0.95**step),
    ],
    ids=["cosine", "one cycle", "sequential", "multi step", "plateau", "lambda"],
)
def test_schedulers_resume(tmp_path: Path, make: Callable[[optim.Optimizer], Any]) -> None:
    def start() -> tuple[optim.Optimizer, Any]:
        optimizer = optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)
        return optimizer, make(optimizer)

    def run(optimizer: optim.Optimizer, scheduler: Any, steps: int) -> list[float]:
        rates = []
        for _ in range(steps):
            optimizer.step()
            scheduler.step(*([1.0] if isinstance(scheduler, optim.lr_scheduler.ReduceLROnPlateau) else []))
            rates.append(optimizer.param_groups[0]["lr"])
        return rates

    one, other = start(), start()
    run(*one, 4)
    ss.save({"optim": one[0], "sched": one[1]}, checkpoint_id=tmp_path / "c")
    ss.load({"optim": other[0], "sched": other[1]}, checkpoint_id=tmp_path / "c")
    assert run(*other, 6) == run(*one, 6)


def test_grad_scaler(tmp_path: Path) -> None:
    def make() -> Any:
        return torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=2)

    def step(scaler: Any, overflow: bool) -> None:
        parameter = nn.Parameter(torch.ones(2))
        optimizer = optim.SGD([parameter], lr=0.1)
        scaler.scale((parameter * (float("inf") if overflow else 1.0)).sum()).backward()
        scaler.step(optimizer)
        scaler.update()

    scaler = make()
    for overflow in (False, False, True, False):
        step(scaler, overflow)
    saved = scaler.state_dict()
    assert saved["_growth_tracker"] == 1
    ss.save({"scaler": scaler}, checkpoint_id=tmp_path / "c")
    target = make()
    step(target, overflow=True)
    ss.load({"scaler": target}, checkpoint_id=tmp_path / "c")
    assert target.state_dict() == saved
    step(scaler, False)
    step(target, False)
    assert target.get_scale() == scaler.get_scale()


def test_an_averaged_model_and_its_optimizer_in_lists(tmp_path: Path) -> None:
    def make(seed: int) -> dict[str, Any]:
        torch.manual_seed(seed)
        models = [nn.Linear(3, 3), nn.Linear(3, 3)]
        optimizers = [optim.Adam(model.parameters()) for model in models]
        return {"models": models, "optims": optimizers, "ema": optim.swa_utils.AveragedModel(models[0])}

    def step(state: dict[str, Any]) -> None:
        for model, optimizer in zip(state["models"], state["optims"], strict=True):
            model(torch.ones(1, 3)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        state["ema"].update_parameters(state["models"][0])

    run, fresh = make(1), make(2)
    step(run)
    step(run)
    ss.save(run, checkpoint_id=tmp_path / "c")
    ss.load(fresh, checkpoint_id=tmp_path / "c")
    step(run)
    step(fresh)
    for one, other in zip([*run["models"], run["ema"]], [*fresh["models"], fresh["ema"]], strict=True):
        assert nested_equal(dict(other.state_dict()), dict(one.state_dict()))


def test_a_checkpoint_without_optimizer_state_does_not_fit_one_that_has_stepped(tmp_path: Path) -> None:
    run, other = Training(OPTIMIZERS["AdamW"], seed=1), Training(OPTIMIZERS["AdamW"], seed=2)
    other.train(1)
    ss.save(run.state(), checkpoint_id=tmp_path / "c")
    with pytest.raises(ss.IncompatibleCheckpointError, match=r"missing from the checkpoint: optim\.state\.0\.exp_avg"):
        ss.load(other.state(), checkpoint_id=tmp_path / "c")
