"""The real Lightning Trainer in this process, with CheckpointIO: what ModelCheckpoint promises stays promised."""

from __future__ import annotations

import functools
import importlib
import os
import time
from collections import Counter, OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.plugins.io import AsyncCheckpointIO

import snapstone as ss
from roundtrip.bits import nested_equal
from snapstone import _native
from snapstone.errors import IncompatibleCheckpointError
from snapstone.integrations import lightning as integration
from snapstone.integrations import versions
from snapstone.integrations.lightning import CheckpointIO
from snapstone.integrations.lightning_base.hooks import Hooks
from snapstone.integrations.lightning_base.saves import Saves
from snapstone.integrations.packing import pack, unpack
from trainers.lightning_job import Batches, Module, digest


@pytest.fixture(autouse=True)
def no_faults() -> Iterator[None]:
    yield
    _native.fault_disarm()


def fitted(io: Any, callback: Callback | list[Callback], steps: int = 4, resume: Any = None, **options: Any) -> Any:
    """A module after `steps`; `module.trainer` is what trained it. `make` makes it, after the seed."""
    data = options.pop("data", None) or Batches(100)
    pl.seed_everything(3, verbose=False)
    module = options.pop("make", Module)()
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=steps,
        logger=False,
        plugins=[io],
        callbacks=callback,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    trainer.fit(module, data, ckpt_path=resume)
    return module


def every_step(directory: Path, **options: Any) -> ModelCheckpoint:
    return ModelCheckpoint(dirpath=directory, every_n_train_steps=1, **{"filename": "{step}", **options})


def names(directory: Path) -> dict[str, str]:
    """What is there, links with their targets; without what saves left behind."""
    found = [path for path in directory.iterdir() if not path.name.startswith(".")]
    return {path.name: os.readlink(path) if path.is_symlink() else "checkpoint" for path in found}


class Descent(Module):
    """Logs what a test wants ModelCheckpoint to see."""

    scores = (5.0, 3.0, 4.0, 1.0, 2.0, 1.5)

    def training_step(self, batch: torch.Tensor, index: int) -> torch.Tensor:
        loss = super().training_step(batch, index)
        self.log("score", self.scores[index])
        return loss

    def test_step(self, batch: torch.Tensor, index: int) -> None:
        self.log("tested", 1.0)


def test_a_link_to_an_earlier_save_does_not_come_in_place_of_one_to_a_later(tmp_path: Path) -> None:
    saves = Saves()
    _native.fault_arm("renameat2:1:delay=700")  # the earlier save is committed after the later one
    for name in ("earlier", "later"):
        saves.save({"a": torch.zeros(10)}, tmp_path / name, step=1, no_dist=True, lead=True)
        saves.link(tmp_path / name, tmp_path / "last")
    saves.wait()
    assert (tmp_path / "earlier").is_dir()
    assert os.readlink(tmp_path / "last") == "later"


CASES: dict[str, dict[str, Any]] = {
    "newest": {"save_top_k": 1},
    "best-2": {"save_top_k": 2, "monitor": "score"},
    "best-1-of-one-name": {"save_top_k": 1, "monitor": "score", "filename": "best"},
    "best-3-of-one-name": {"save_top_k": 3, "monitor": "score", "filename": "best"},
    "last": {"save_top_k": 1, "monitor": "score", "save_last": True},
    "linked": {"save_top_k": 2, "monitor": "score", "save_last": "link"},
    "only-last": {"save_top_k": 0, "save_last": True},
    "all-linked": {"save_top_k": -1, "save_last": "link"},
}


@pytest.mark.parametrize("case", CASES)
def test_what_stands_in_the_directory_is_what_lightning_would_leave(tmp_path: Path, case: str) -> None:
    """With every commit late, so that names are chosen and removals asked for while saves are in flight."""
    callbacks = {kind: every_step(tmp_path / kind, **CASES[case]) for kind in ("stock", "ours")}
    fitted(TorchCheckpointIO(), callbacks["stock"], 6, make=Descent)
    _native.fault_arm("renameat2:1+:delay=40")
    fitted(CheckpointIO(), callbacks["ours"], 6, make=Descent)
    assert names(tmp_path / "ours") == names(tmp_path / "stock")
    for kind in ("best_model_path", "last_model_path", "kth_best_model_path"):
        stock, ours = (getattr(callbacks[name], kind) for name in ("stock", "ours"))
        assert Path(ours).name == Path(stock).name
    for name in names(tmp_path / "ours"):
        assert ss.verify(tmp_path / "ours" / name)
        expected = torch.load(tmp_path / "stock" / name, weights_only=True)
        found = CheckpointIO().load_checkpoint(tmp_path / "ours" / name)
        assert found["global_step"] == expected["global_step"]
        assert all(torch.equal(found["state_dict"][key], value) for key, value in expected["state_dict"].items())


def test_a_removal_waits_until_a_newer_checkpoint_is_durable(tmp_path: Path) -> None:
    """The only durable checkpoint is never removed: neither while the next is in flight, nor when it fails."""
    saves = Saves()
    state = {"a": torch.ones(8)}

    def save(name: str) -> None:
        saves.save(state, tmp_path / name, step=None, no_dist=True, lead=True)

    save("1")
    saves.wait()
    _native.fault_arm("renameat2:1:delay=700")
    save("2")
    saves.remove(tmp_path / "1")
    assert names(tmp_path) == {"1": "checkpoint"}
    assert not saves.exists(tmp_path / "1", True)
    assert saves.exists(tmp_path / "2", False)
    saves.wait()
    assert names(tmp_path) == {"2": "checkpoint"}

    _native.fault_arm("renameat2:1:errno=EIO")
    save("3")
    saves.link(tmp_path / "3", tmp_path / "last")
    saves.remove(tmp_path / "2")
    with pytest.raises(OSError, match="rename"):
        saves.wait()
    assert names(tmp_path) == {"2": "checkpoint"}
    save("4")
    saves.wait()
    assert names(tmp_path) == {"4": "checkpoint"}

    _native.fault_arm("renameat2:1:delay=300")
    save("5")
    saves.remove(tmp_path / "4")
    save("4")  # which takes the removal back
    saves.wait()
    assert names(tmp_path) == {"4": "checkpoint", "5": "checkpoint"}


def test_what_is_in_the_way_is_put_back_when_the_save_fails(tmp_path: Path) -> None:
    saves = Saves()
    (tmp_path / "last.ckpt").write_text("a stock file")
    _native.fault_arm("renameat2:1:errno=EIO")
    saves.save({"a": torch.ones(8)}, tmp_path / "last.ckpt", step=None, no_dist=True, lead=True)
    with pytest.raises(OSError, match="rename"):
        saves.wait()
    assert (tmp_path / "last.ckpt").read_text() == "a stock file"
    saves.save({"a": torch.ones(8)}, tmp_path / "last.ckpt", step=None, no_dist=True, lead=True)
    saves.wait()
    assert names(tmp_path) == {"last.ckpt": "checkpoint"}
    assert ss.verify(tmp_path / "last.ckpt")


def test_an_error_surfaces_at_the_next_save_and_at_the_end_of_fit(tmp_path: Path) -> None:
    _native.fault_arm("renameat2:1:errno=ENOSPC")
    module = Module()
    with pytest.raises(OSError, match="No space left"):
        fitted(CheckpointIO(), every_step(tmp_path / "a", save_top_k=-1), steps=200, make=lambda: module)
    assert module.trainer.global_step < 200
    _native.fault_arm("renameat2:1:errno=ENOSPC")
    with pytest.raises(OSError, match="No space left"):
        fitted(CheckpointIO(), ModelCheckpoint(dirpath=tmp_path / "b", every_n_train_steps=4), steps=4)


def test_the_snapshot_is_taken_before_a_save_returns(tmp_path: Path) -> None:
    io = CheckpointIO()
    tensor = torch.zeros(1 << 20)
    _native.fault_arm("renameat2:1:delay=300")
    begin = time.monotonic()
    io.save_checkpoint({"state_dict": {"a": tensor}, "global_step": 1}, tmp_path / "a.ckpt")
    assert time.monotonic() - begin < 0.25
    tensor.fill_(1)
    assert torch.equal(io.load_checkpoint(tmp_path / "a.ckpt")["state_dict"]["a"], torch.zeros(1 << 20))
    with pytest.raises(TypeError, match="storage_options"):
        io.save_checkpoint({}, tmp_path / "b.ckpt", storage_options={})
    with pytest.raises(TypeError, match="save_options: overwrite"):
        CheckpointIO(save_options={"overwrite": False})


def test_a_synchronous_save_and_one_outside_of_fit_are_durable_at_once(tmp_path: Path) -> None:
    seen: list[bool] = []

    class Watch(Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, index: int) -> None:
            seen.append(Path(trainer.checkpoint_callback._last_checkpoint_saved or "none").is_dir())

    _native.fault_arm("renameat2:1+:delay=100")
    callback = every_step(tmp_path, save_top_k=-1)
    module = fitted(CheckpointIO(asynchronous=False, save_options={"codec": "zstd:1"}), [callback, Watch()])
    assert seen[1:] == [True] * 3  # callbacks that save come last, so the first sees none
    module.trainer.strategy.checkpoint_io = CheckpointIO()
    module.trainer.save_checkpoint(tmp_path / "final.ckpt")
    assert ss.verify(tmp_path / "final.ckpt")


def test_a_stock_checkpoint_from_before_the_switch_resumes_and_is_replaced(tmp_path: Path) -> None:
    def callback() -> ModelCheckpoint:
        return ModelCheckpoint(dirpath=tmp_path, every_n_train_steps=2, save_top_k=0, save_last=True)

    stock = fitted(TorchCheckpointIO(), callback(), steps=4)
    assert (tmp_path / "last.ckpt").is_file()

    class Seen(Callback):
        state = ""

        def on_train_start(self, trainer: Any, module: Any) -> None:
            Seen.state = digest(module)

    resumed = fitted(CheckpointIO(), [callback(), Seen()], steps=6, resume="last")
    assert Seen.state == digest(stock)
    assert resumed.trainer.global_step == 6
    assert names(tmp_path) == {"last.ckpt": "checkpoint"}
    assert CheckpointIO().load_checkpoint(tmp_path / "last.ckpt")["global_step"] == 6


def test_going_back_is_a_file_that_stock_lightning_resumes_from(tmp_path: Path) -> None:
    ours = fitted(CheckpointIO(), every_step(tmp_path / "ours"), steps=4)
    integration.export(ours.trainer.checkpoint_callback.best_model_path, tmp_path / "back.ckpt")
    back = fitted(TorchCheckpointIO(), every_step(tmp_path / "stock"), steps=5, resume=tmp_path / "back.ckpt")
    on = fitted(CheckpointIO(), every_step(tmp_path / "on"), 5, ours.trainer.checkpoint_callback.best_model_path)
    assert back.trainer.global_step == on.trainer.global_step == 5
    states = [one.trainer.optimizers[0].state_dict()["state"][0]["step"] for one in (back, on)]
    assert states == [torch.tensor(5.0)] * 2


@pytest.mark.parametrize("validated", [False, True])
def test_a_shuffling_loader_goes_on_exactly_from_the_end_of_an_epoch(tmp_path: Path, validated: bool) -> None:
    """Its order comes from the generators when an epoch begins. With validation the save comes after that."""

    class Validated(Module):
        def validation_step(self, batch: torch.Tensor, index: int) -> None:
            self.log("seen", self.net(batch).mean())

        def val_dataloader(self) -> Any:
            return torch.utils.data.DataLoader(torch.randn(8, 16), batch_size=4)

    def loader() -> Any:
        rows = torch.randn(24, 16, generator=torch.Generator().manual_seed(5))
        return torch.utils.data.DataLoader(rows, batch_size=4, shuffle=True)

    make = Validated if validated else Module

    def callback(name: str) -> ModelCheckpoint:
        return ModelCheckpoint(dirpath=tmp_path / name, filename="{epoch}", save_top_k=-1)

    straight = fitted(CheckpointIO(), callback("straight"), -1, data=loader(), make=make, max_epochs=3)
    resume = tmp_path / "straight" / "epoch=1.ckpt"
    resumed = fitted(CheckpointIO(), callback("resumed"), -1, resume, data=loader(), make=make, max_epochs=3)
    assert digest(resumed) == digest(straight)


def test_best_last_and_load_from_checkpoint_find_directories(tmp_path: Path) -> None:
    callback = every_step(tmp_path, save_top_k=1, monitor="score", save_last=True)
    module = fitted(CheckpointIO(), callback, 6, make=lambda: Descent(width=24, name="mine"))
    best = Descent.load_from_checkpoint(callback.best_model_path)
    assert (best.hparams.width, best.hparams.name) == (24, "mine")
    assert digest(Descent.load_from_checkpoint(tmp_path / "last.ckpt")) == digest(module) != digest(best)
    assert Descent.load_from_checkpoint(callback.best_model_path, name="other").hparams.name == "other"
    for which, expected in (("best", best), ("last", module)):
        other = Descent(width=24)
        trainer = pl.Trainer(accelerator="cpu", devices=1, logger=False, plugins=[CheckpointIO()], callbacks=callback)
        trainer.test(other, Batches(1), ckpt_path=which, verbose=False)
        assert digest(other) == digest(expected)


def test_a_checkpoint_is_saved_on_an_exception_and_the_exception_stays(tmp_path: Path) -> None:
    class Failing(Module):
        def training_step(self, batch: torch.Tensor, index: int) -> torch.Tensor:
            if index == 3:
                raise RuntimeError("of the model")
            return super().training_step(batch, index)

    callback = ModelCheckpoint(dirpath=tmp_path, filename="{step}", every_n_train_steps=50, save_on_exception=True)
    with pytest.raises(RuntimeError, match="of the model"):
        fitted(CheckpointIO(), callback, 10, make=Failing)
    assert CheckpointIO().load_checkpoint(tmp_path / "step=3.ckpt")["global_step"] == 3


class Plain:
    def __init__(self) -> None:
        self.a = 1


def test_a_packed_checkpoint_comes_back_as_it_was() -> None:
    state_dict = OrderedDict(w=torch.randn(3, 2), b=torch.arange(4, dtype=torch.bfloat16))
    state_dict._metadata = OrderedDict([("", {"version": 2})])  # type: ignore[attr-defined]
    checkpoint = {
        "state_dict": state_dict,
        "optimizer_states": [{"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"betas": (0.9, 0.99)}]}],
        "lr_schedulers": [{"milestones": Counter({3: 1}), "best": float("inf")}],
        "callbacks": {"A{'monitor': 'loss'}": {"best": {"a/b.ckpt": torch.tensor(1.5)}, "pair": (torch.ones(2), None)}},
        "$odd": {"$at": "not a reference", "ü": {1, 2}, ("a", 1): np.float64(0.5)},
        "numpy": np.arange(6, dtype=np.int16).reshape(2, 3),
        "a.b": torch.zeros(1),
        "a": {"b": torch.ones(1)},
        "sparse": torch.eye(3).to_sparse(),
        "empty": {"list": [], "dict": {}, "tuple": ()},
    }
    for embed_bytes in (0, 1 << 20):
        packed = pack(checkpoint, embed_bytes=embed_bytes)
        assert bool(packed.tensors) == (embed_bytes == 0)
        found = unpack(packed.text, packed.tensors)
        assert list(found) == list(checkpoint)
        sparse, numpy = found.pop("sparse"), found.pop("numpy")
        assert torch.equal(sparse.to_dense(), torch.eye(3))
        assert numpy.dtype == np.int16
        assert np.array_equal(numpy, checkpoint["numpy"])
        expected = {key: value for key, value in checkpoint.items() if key not in ("sparse", "numpy")}
        assert same(found, expected)
        assert found["state_dict"]._metadata == state_dict._metadata  # type: ignore[attr-defined]


def same(found: Any, expected: Any) -> bool:
    if type(found) is not type(expected):
        return False
    if isinstance(expected, torch.Tensor):
        return found.dtype == expected.dtype and torch.equal(found, expected)
    if isinstance(expected, dict):
        return list(found) == list(expected) and all(same(found[key], expected[key]) for key in expected)
    if isinstance(expected, list | tuple):
        return len(found) == len(expected) and all(map(same, found, expected))
    return bool(found == expected)


def test_tensors_at_the_top_may_have_any_name(tmp_path: Path) -> None:
    checkpoint = {name: torch.full((2,), float(at)) for at, name in enumerate(("lightning", "lightning'", "", "a.b"))}
    checkpoint["a"] = {"b": torch.full((2,), 9.0)}
    io = CheckpointIO(asynchronous=False)
    io.save_checkpoint(checkpoint, tmp_path / "a.ckpt")
    assert nested_equal(io.load_checkpoint(tmp_path / "a.ckpt"), checkpoint)


def test_a_wrapper_around_the_plugin_is_an_error_before_anything_is_trained(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"AsyncCheckpointIO\(CheckpointIO\(\)\): give the Trainer"):
        fitted(AsyncCheckpointIO(CheckpointIO()), every_step(tmp_path))
    assert list(tmp_path.iterdir()) == []
    fitted(AsyncCheckpointIO(), every_step(tmp_path))  # of Lightning's own plugin
    assert next(tmp_path.glob("step=4*.ckpt")).is_file()


def test_what_needs_pickle_loads_only_when_the_checkpoint_is_trusted(tmp_path: Path) -> None:
    checkpoint = {"state_dict": {"a": torch.ones(2)}, "hyper_parameters": {"plain": Plain(), "part": functools.partial}}
    io = CheckpointIO()
    io.save_checkpoint(checkpoint, tmp_path / "a.ckpt")
    with pytest.raises(IncompatibleCheckpointError, match=r"hyper_parameters.plain.*weights_only=False"):
        io.load_checkpoint(tmp_path / "a.ckpt")
    found = io.load_checkpoint(tmp_path / "a.ckpt", weights_only=False)["hyper_parameters"]
    assert (found["plain"].a, found["part"]) == (1, functools.partial)
    with torch.serialization.safe_globals([Plain, functools.partial]):
        assert io.load_checkpoint(tmp_path / "a.ckpt")["hyper_parameters"]["plain"].a == 1
    torch.save(checkpoint, tmp_path / "stock.ckpt")
    with pytest.raises(Exception, match="weights_only"):
        io.load_checkpoint(tmp_path / "stock.ckpt")
    with pytest.raises(TypeError, match=r"bad: cannot store a function"):
        io.save_checkpoint({"bad": lambda: None}, tmp_path / "b.ckpt")


def test_another_version_is_an_error_that_names_the_range(monkeypatch: pytest.MonkeyPatch) -> None:
    modules = [importlib.import_module(f"snapstone.integrations.{name}") for name in ("lightning", "pytorch_lightning")]
    monkeypatch.setattr(versions, "version", lambda package: "2.7.0")
    for module in modules:
        with pytest.raises(versions.UnsupportedVersionError, match=r"2\.7\.0 .* supports .*lightning >= 2\.6, < 2\.7"):
            importlib.reload(module)


@pytest.mark.parametrize("package", ["lightning.pytorch", "pytorch_lightning"])
def test_uninstalling_restores_every_name(package: str) -> None:
    integration.uninstall()
    hooks = Hooks(package)
    places = {
        "callbacks.model_checkpoint": ("ModelCheckpoint", "file_exists", "_link_checkpoint"),
        "trainer.connectors.checkpoint_connector": (
            *("_CheckpointConnector", "_select_ckpt_path", "dump_checkpoint", "resume_end"),
        ),
        "loops.fit_loop": ("_FitLoop", "on_run_start"),
    }

    def everything() -> dict[str, Any]:
        found = {"pl_load": importlib.import_module(f"{package}.core.saving").pl_load}
        for module, (owner, *attributes) in places.items():
            members = vars(getattr(importlib.import_module(f"{package}.{module}"), owner))
            found.update({name: members[name] for name in attributes})
        return found

    before = everything()
    hooks.install()
    hooks.install()
    assert all(everything()[name] is not stock for name, stock in before.items())
    hooks.uninstall()
    assert all(everything()[name] is stock for name, stock in before.items())


def test_the_other_package_of_that_name_works_too(tmp_path: Path) -> None:
    import pytorch_lightning as other

    from snapstone.integrations import pytorch_lightning as others

    class Other(other.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(16, 16)

        def training_step(self, batch: torch.Tensor, index: int) -> torch.Tensor:
            return self.layer(batch).square().mean()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    callback = other.callbacks.ModelCheckpoint(dirpath=tmp_path, every_n_train_steps=2)
    module = Other()
    trainer = other.Trainer(
        accelerator="cpu", max_steps=2, logger=False, plugins=[others.CheckpointIO()], callbacks=[callback]
    )
    trainer.fit(module, Batches(4))
    assert digest(Other.load_from_checkpoint(callback.best_model_path)) == digest(module)
    others.uninstall()
