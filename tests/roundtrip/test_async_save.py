"""async_save stores the values at the snapshot instant, and tells every error once."""

from __future__ import annotations

import copy
import gc
import pickle
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn, optim

import snapstone as ss
from roundtrip.bits import bits_of, nested_equal, random_bits

MIB = 1 << 20


pytestmark = pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step:UserWarning")


@pytest.fixture(autouse=True)
def nothing_left_in_flight() -> Iterator[None]:
    yield
    ss.wait(30)


def values_at(path: Path) -> dict[Any, Any]:
    return ss.Checkpoint.open(path).state_dict()


def visible(directory: Path) -> list[str]:
    return sorted(entry.name for entry in directory.iterdir())


# ---- fence="now"


@pytest.mark.parametrize("budget", [None, 8 * MIB], ids=["fits the budget", "five times the budget"])
def test_tensors_changed_right_after_the_call_are_stored_as_they_were(tmp_path: Path, budget: int | None) -> None:
    state = {f"t{i}": random_bits(torch.uint8, 10 * MIB + i, seed=i) for i in range(4)}
    state["strided"] = random_bits(torch.float32, 700, 300, seed=9).t()
    state["small"] = torch.arange(10)
    before = {name: bits_of(tensor) for name, tensor in state.items()}
    handle = ss.async_save(state, checkpoint_id=tmp_path / "c", host_memory_budget=budget)
    for tensor in state.values():
        tensor.zero_()
    assert handle.staging_completion.done()
    handle.result(60)
    loaded = ss.Checkpoint.open(tmp_path / "c").load_tensors()
    assert {name: bits_of(tensor) for name, tensor in loaded.items()} == before


def test_tensors_freed_right_after_the_call_are_stored(tmp_path: Path) -> None:
    state = {f"t{i}": random_bits(torch.uint8, 5 * MIB, seed=i) for i in range(4)}
    before = {name: bits_of(tensor) for name, tensor in state.items()}
    handle = ss.async_save(state, checkpoint_id=tmp_path / "c")
    state.clear()
    gc.collect()
    overwrite = [torch.full((5 * MIB,), 0x5A, dtype=torch.uint8) for _ in range(4)]
    handle.result(60)
    del overwrite
    loaded = ss.Checkpoint.open(tmp_path / "c").load_tensors()
    assert {name: bits_of(tensor) for name, tensor in loaded.items()} == before


def test_the_handle_tells_what_was_done(tmp_path: Path) -> None:
    state = {"t": random_bits(torch.uint8, 3 * MIB), "step": 5}
    handle = ss.async_save(state, checkpoint_id=tmp_path / "c")
    assert handle.step == 5
    assert isinstance(handle.staging_completion, Future)
    assert isinstance(handle.upload_completion, Future)
    checkpoint = handle.result(30)
    assert handle.done()
    assert handle.upload_completion.result() is checkpoint
    assert checkpoint.path == str(tmp_path / "c")
    assert (checkpoint.step, checkpoint.nbytes) == (5, 3 * MIB)
    for stage in ("plan", "stage", "write", "sync", "vote", "commit"):
        assert handle.stats[stage]["seconds"] >= 0, stage
    assert handle.stats["stage"]["bytes"] == handle.stats["write"]["bytes"] == 3 * MIB
    assert 0 < handle.stats["stall_seconds"] < handle.stats["seconds"] + 1
    assert handle.stats["rung"] in ("uring-fixed", "uring", "threads-direct", "buffered")
    assert not handle.cancel()


def test_a_timeout_of_result_leaves_the_save_running(tmp_path: Path) -> None:
    slow = threading.Event()
    handle = ss.async_save(
        {"t": torch.ones(4)}, checkpoint_id=tmp_path / "c", progress=lambda *_: slow.wait(20) and None
    )
    with pytest.raises(TimeoutError):
        handle.result(0.2)
    assert not handle.done()
    with pytest.raises(TimeoutError):
        ss.wait(0.1)
    slow.set()
    handle.result(30)


# ---- fence=optimizer


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(64, 256), nn.BatchNorm1d(256), nn.ReLU(), nn.Linear(256, 64))
        self.frozen = nn.Linear(64, 64).requires_grad_(False)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        self.seen += rows.shape[0]
        out: torch.Tensor = self.frozen(self.body(rows))
        return out


def train_step(model: nn.Module, optimizer: optim.Optimizer, seed: int) -> None:
    rows = torch.randn(32, 64, generator=torch.Generator().manual_seed(seed))
    model(rows).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def copy_of(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {key: copy_of(item) for key, item in value.items()}
    return [copy_of(item) for item in value] if isinstance(value, list) else value


@pytest.mark.parametrize("form", ["stateful", "state dicts", "plain dicts"])
@pytest.mark.parametrize("kind", ["AdamW", "SGD", "LBFGS"])
def test_a_training_loop_stores_every_step_as_it_was_at_the_call(tmp_path: Path, kind: str, form: str) -> None:
    torch.manual_seed(0)
    model = Net()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer: Any = {
        "AdamW": lambda: optim.AdamW(trained, lr=torch.tensor(0.1)),
        "SGD": lambda: optim.SGD(trained, lr=0.1, momentum=0.9),
        "LBFGS": lambda: optim.LBFGS(trained, lr=0.1, max_iter=2),
    }[kind]()
    scheduler = optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    wanted, handles = {}, []

    def state(step: int) -> dict[str, Any]:
        extra = {"counter": torch.tensor(step), "list": [step, [step]], "rng": torch.get_rng_state(), "step": step}
        if form == "stateful":
            return {"model": model, "optim": optimizer, "sched": scheduler, **extra}
        if form == "state dicts":
            return {"model": model.state_dict(), "optim": optimizer.state_dict(), **extra}
        return {
            "model": dict(model.named_parameters()) | dict(model.named_buffers()),
            "optim": optimizer.state_dict(),
            **extra,
        }

    for step in range(5):
        rows = torch.randn(32, 64, generator=torch.Generator().manual_seed(step))

        def closure(rows: torch.Tensor = rows) -> torch.Tensor:
            optimizer.zero_grad()
            loss: torch.Tensor = model(rows).square().mean()
            loss.backward()
            return loss

        optimizer.step(closure)
        taken = state(step)
        wanted[step] = copy_of({"model": model.state_dict(), "optim": optimizer.state_dict(), "step": step})
        handles.append(ss.async_save(taken, checkpoint_id=tmp_path / f"step-{step}", fence=optimizer))
        # None of this is the optimizer's: it may change as soon as the call has returned.
        scheduler.step()
        model.seen.fill_(-1.0)
        model.frozen.weight.zero_()
        taken["counter"].fill_(-1)
        taken["list"].append("later")
        taken["list"][1].append("later")
        torch.rand(3)
        taken.clear()
    for handle in handles:
        handle.result(60)
    for step, expected in wanted.items():
        found = values_at(tmp_path / f"step-{step}")
        assert found["counter"].item() == step
        assert found["list"] == [step, [step]]
        assert found["step"] == step
        assert nested_equal(found["model"], dict(expected["model"])), step
        assert nested_equal(found["optim"]["state"], expected["optim"]["state"]), step
        groups = [{**group, "lr": float(group["lr"])} for group in expected["optim"]["param_groups"]]
        assert nested_equal([{**one, "lr": float(one["lr"])} for one in found["optim"]["param_groups"]], groups), step


def test_a_learning_rate_tensor_is_not_the_optimizers_to_guard(tmp_path: Path) -> None:
    parameters = [nn.Parameter(torch.ones(3)) for _ in range(3000)]
    optimizer = optim.AdamW(parameters, lr=torch.tensor(0.5))
    scheduler = optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    for number in range(3):
        rate = float(optimizer.param_groups[0]["lr"])
        state = {"parameters": list(parameters), "optim": optimizer.state_dict()}
        handle = ss.async_save(state, checkpoint_id=tmp_path / str(number), fence=optimizer)
        scheduler.step()  # fills the tensor while the save may still be describing parameters
        handle.result(30)
        groups = values_at(tmp_path / str(number))["optim"]["param_groups"]
        assert float(groups[0]["lr"]) == rate
        assert float(optimizer.param_groups[0]["lr"]) == rate / 2


def test_an_optimizer_with_a_fence_can_still_be_copied(tmp_path: Path) -> None:
    parameter = nn.Parameter(torch.zeros(4))
    optimizer = optim.SGD([parameter], lr=1.0)
    ss.async_save({"w": parameter}, checkpoint_id=tmp_path / "c", fence=optimizer).result(30)
    twin = copy.deepcopy(optimizer)
    twin.step()
    pickle.loads(pickle.dumps(optimizer)).step()


def test_the_next_step_waits_for_staging(tmp_path: Path) -> None:
    parameter = nn.Parameter(torch.zeros(40 * MIB // 4))
    optimizer = optim.SGD([parameter], lr=1.0)
    parameter.grad = torch.ones_like(parameter)
    for number in range(3):
        handle = ss.async_save(
            {"w": parameter}, checkpoint_id=tmp_path / str(number), fence=optimizer, host_memory_budget=8 * MIB
        )
        optimizer.step()  # at once: the hook must hold it
        handle.staging_completion.result(10)  # told by another thread, a moment later
        handle.result(60)
        assert (ss.Checkpoint.open(tmp_path / str(number)).get_tensor("w") == -float(number)).all()
    assert len(optimizer._optimizer_step_pre_hooks) == 1  # one for all saves


def test_two_saves_before_one_step_and_hooks_of_others(tmp_path: Path) -> None:
    parameter = nn.Parameter(torch.zeros(1000))
    optimizer = optim.SGD([parameter], lr=1.0)
    parameter.grad = torch.ones_like(parameter)
    calls: list[int] = []
    handles = [ss.async_save({"w": parameter}, checkpoint_id=tmp_path / "a", fence=optimizer)]
    hook = optimizer.register_step_pre_hook(lambda *_: calls.append(1))
    handles.append(ss.async_save({"w": parameter}, checkpoint_id=tmp_path / "b", fence=[optimizer]))
    optimizer.step()
    optimizer.step()
    assert calls == [1, 1]
    for handle, name in zip(handles, "ab", strict=True):
        handle.result(30)
        assert (ss.Checkpoint.open(tmp_path / name).get_tensor("w") == 0).all()
    hook.remove()
    optimizer.step()
    assert calls == [1, 1]


def test_several_optimizers_each_hold_their_step(tmp_path: Path) -> None:
    parameters = [nn.Parameter(torch.zeros(5 * MIB)) for _ in range(2)]
    optimizers = [optim.SGD([parameter], lr=1.0) for parameter in parameters]
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    state = {"a": parameters[0], "b": parameters[1]}
    handle = ss.async_save(state, checkpoint_id=tmp_path / "c", fence=optimizers, host_memory_budget=8 * MIB)
    optimizers[1].step()
    optimizers[0].step()
    handle.result(60)
    for tensor in ss.Checkpoint.open(tmp_path / "c").load_tensors().values():
        assert (tensor == 0).all()


@pytest.mark.parametrize("fence", ["later", [], None, "", [nn.Linear(1, 1)], 3])
def test_any_other_fence_is_refused(tmp_path: Path, fence: Any) -> None:
    with pytest.raises(TypeError, match=r"fence=.*optimizer"):
        ss.async_save({"t": torch.ones(1)}, checkpoint_id=tmp_path / "c", fence=fence)
    assert visible(tmp_path) == []


def test_a_step_after_a_failed_save_is_not_held(tmp_path: Path) -> None:
    (tmp_path / "c").mkdir()
    parameter = nn.Parameter(torch.zeros(4))
    optimizer = optim.SGD([parameter], lr=1.0)
    handle = ss.async_save({"w": parameter}, checkpoint_id=tmp_path / "c", fence=optimizer)
    optimizer.step()
    with pytest.raises(FileExistsError):
        handle.result(30)
    with pytest.raises(FileExistsError):
        handle.staging_completion.result(0)


# ---- several saves at once


def test_saves_in_flight_at_once_do_not_mix(tmp_path: Path) -> None:
    handles, wanted = [], []
    tensor = torch.zeros(3 * MIB, dtype=torch.uint8)
    for number in range(6):
        tensor.fill_(number)
        wanted.append(number)
        handles.append(ss.async_save({"t": tensor, "n": number}, checkpoint_id=tmp_path / str(number)))
    ss.wait(60)
    assert all(handle.done() for handle in handles)
    for number in wanted:
        found = values_at(tmp_path / str(number))
        assert found["n"] == number
        assert (found["t"] == number).all()
    assert visible(tmp_path) == [str(number) for number in wanted]


def test_saves_and_loads_from_many_threads(tmp_path: Path) -> None:
    def work(number: int) -> bool:
        # Structures of their own, so that the cache of structures is shared and evicted.
        state = {f"t{i}": random_bits(torch.uint8, 1000 * number + i, seed=i) for i in range(number % 3 + 1)}
        for turn in range(4):
            path = tmp_path / f"{number}-{turn}"
            ss.save(state, checkpoint_id=path)
            target = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
            ss.load(target, checkpoint_id=path)
            if not nested_equal(target, state):
                return False
        return True

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(8)))
    assert len(visible(tmp_path)) == 32


# ---- cancel


def test_cancel_before_the_commit_leaves_nothing_visible(tmp_path: Path) -> None:
    go = threading.Event()
    handle = ss.async_save(
        {"t": torch.ones(5 * MIB)}, checkpoint_id=tmp_path / "c", progress=lambda *_: go.wait(20) and None
    )
    assert handle.cancel()
    go.set()
    with pytest.raises(ss.CheckpointError, match="cancelled"):
        handle.result(30)
    assert handle.done()
    assert visible(tmp_path) == []
    ss.save({"t": torch.ones(2)}, checkpoint_id=tmp_path / "c")  # the name is free


def test_cancel_at_any_moment_means_what_it_answers(tmp_path: Path) -> None:
    answers = set()
    for number in range(24):
        handle = ss.async_save({"t": torch.ones(MIB)}, checkpoint_id=tmp_path / str(number))
        time.sleep(0.0015 * number)
        cancelled = handle.cancel()
        answers.add(cancelled)
        if cancelled:
            with pytest.raises(ss.CheckpointError):
                handle.result(30)
        else:
            handle.result(30)
        assert (tmp_path / str(number)).exists() is not cancelled
    assert not any(name.startswith(".") for name in visible(tmp_path))
    assert True in answers


# ---- errors


def failing(tmp_path: Path) -> ss.SaveHandle:
    """A save that fails in the background: its target appears while it writes."""
    go = threading.Event()
    handle = ss.async_save(
        {"t": torch.ones(3)}, checkpoint_id=tmp_path / "taken", progress=lambda *_: go.wait(20) and None
    )
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine").write_text("precious")
    go.set()
    return handle


def settled(handle: ss.SaveHandle) -> None:
    end = time.monotonic() + 30
    while not handle.done() and time.monotonic() < end:
        time.sleep(0.005)
    assert handle.done()


@pytest.mark.parametrize("how", ["save", "async_save", "wait"])
def test_an_error_nobody_saw_is_raised_by_the_next_call_once(tmp_path: Path, how: str) -> None:
    handle = failing(tmp_path)
    settled(handle)
    calls = {
        "save": lambda: ss.save({"t": torch.ones(1)}, checkpoint_id=tmp_path / "next"),
        "async_save": lambda: ss.async_save({"t": torch.ones(1)}, checkpoint_id=tmp_path / "next"),
        "wait": lambda: ss.wait(),
    }
    with pytest.raises(FileExistsError) as caught:
        calls[how]()
    assert any("earlier async_save" in note for note in caught.value.__notes__)
    assert not (tmp_path / "next").exists()
    calls[how]()  # once
    ss.wait(30)
    assert (tmp_path / "taken" / "mine").read_text() == "precious"


@pytest.mark.parametrize("how", ["result", "future result", "future exception"])
def test_an_error_that_was_seen_is_not_raised_again(tmp_path: Path, how: str) -> None:
    handle = failing(tmp_path)
    if how == "future exception":
        assert isinstance(handle.upload_completion.exception(30), FileExistsError)
    else:
        with pytest.raises(FileExistsError):
            handle.result(30) if how == "result" else handle.upload_completion.result(30)
    ss.save({"t": torch.ones(1)}, checkpoint_id=tmp_path / "next")
    ss.wait(30)


def test_wait_waits_for_all_even_when_one_fails(tmp_path: Path) -> None:
    slow = threading.Event()
    handles = []
    for number in range(4):
        path = tmp_path / str(number)
        handles.append(
            ss.async_save({"t": torch.ones(3)}, checkpoint_id=path, progress=lambda *_: slow.wait(20) and None)
        )
    handles.append(failing(tmp_path))
    threading.Timer(0.3, slow.set).start()
    with pytest.raises(FileExistsError):
        ss.wait(60)
    assert all(handle.done() for handle in handles)
    ss.wait(0)


def test_after_wait_the_handles_are_done(tmp_path: Path) -> None:
    for number in range(30):
        handle = ss.async_save({"t": torch.ones(3)}, checkpoint_id=tmp_path / str(number))
        ss.wait(30)
        assert handle.done()


def test_a_state_that_cannot_be_saved_fails_the_call_itself(tmp_path: Path) -> None:
    for fence in ("now", optim.SGD([nn.Parameter(torch.ones(1))])):
        with pytest.raises(TypeError, match=r"^bad: "):
            ss.async_save({"bad": object()}, checkpoint_id=tmp_path / "c", fence=fence)
    ss.wait(5)
    assert visible(tmp_path) == []


# ---- the end of the process


def run_python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_a_save_in_flight_at_interpreter_exit_is_completed(tmp_path: Path) -> None:
    done = run_python(
        """
        import sys, torch, snapstone as ss
        t = torch.arange(20 << 20, dtype=torch.int32)
        p = torch.nn.Parameter(torch.ones(5 << 20))
        ss.async_save({"t": t}, checkpoint_id=sys.argv[1] + "/now", host_memory_budget=8 << 20)
        ss.async_save({"p": p}, checkpoint_id=sys.argv[1] + "/fenced", fence=torch.optim.SGD([p]))
        t.zero_()
        del t
        """,
        str(tmp_path),
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert visible(tmp_path) == ["fenced", "now"]
    assert torch.equal(ss.Checkpoint.open(tmp_path / "now").get_tensor("t"), torch.arange(20 << 20, dtype=torch.int32))
    assert (ss.Checkpoint.open(tmp_path / "fenced").get_tensor("p") == 1).all()
    assert ss.verify(tmp_path / "now")


def test_an_exception_in_the_trainer_does_not_lose_the_save_in_flight(tmp_path: Path) -> None:
    done = run_python(
        """
        import sys, torch, snapstone as ss
        ss.async_save({"t": torch.ones(8 << 20)}, checkpoint_id=sys.argv[1] + "/c")
        raise SystemExit(3)
        """,
        str(tmp_path),
    )
    assert done.returncode == 3
    assert visible(tmp_path) == ["c"]
    assert ss.verify(tmp_path / "c")
