"""What trainers do around saves, recorded: retention, directories that they fill, files of DeepSpeed's names, DCP."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as stock

import snapstone as ss
from crash import journal
from crash.explore import save
from crash.judge import Reader, What, engine_holds
from crash.recorder import Recorder, Scenario
from distributed.ranks import run_ranks, values
from durability import small
from durability.chain import CHUNK_BYTES
from snapstone import dcp, manifest
from snapstone.integrations import hf, numbered, publication
from snapstone.integrations.deepspeed_base import stub
from snapstone.integrations.deepspeed_base.files import FOLDER, Collected, Files
from snapstone.integrations.directories import make_directories
from snapstone.integrations.directory_save import DirectorySaves
from snapstone.integrations.step_folder import StepFolder

__all__ = ["TRAINERS"]

RANKS = 2
WITNESS = "trainer_state.json"
FILES = ("mp_rank_00_model_states.pt", "zero/optim_states.pt")


def _steps(run: Path) -> None:
    for step in (1, 2):
        ss.save(small.state(step), checkpoint_id=run / f"step-{step}")


def _prunes(run: Path, recorder: Recorder) -> None:
    """As in torchtitan: the folder is pruned when the save is durable, and somebody removes what is left of it."""
    folder = StepFolder(str(run))
    with recorder.python():
        save(run, "step-3", 3)
        journal.mark("prune step-1 1")
        for trash in folder.prune(2, 3):
            shutil.rmtree(trash)


def _tensors(what: What) -> dict[str, Any]:
    return {name: value for name, value in small.make(what).items() if isinstance(value, torch.Tensor)}


def _stock_step(run: Path) -> None:
    stock.save(_tensors(1), storage_writer=stock.FileSystemWriter(run / "step-5"), no_dist=True)


def _replaces_stock(run: Path, recorder: Recorder) -> None:
    folder = StepFolder(str(run))
    with recorder.python():
        folder.make_room("step-5")
        save(run, "step-5", 2)
        for trash in folder.settle("step-5"):
            shutil.rmtree(trash)


def _resumes_steps(run: Path) -> None:
    StepFolder(str(run)).put_back()


def _step_holds(path: Path, whats: Sequence[What]) -> What | str:
    if (path / manifest.MANIFEST_NAME).exists():
        return engine_holds(path, whats)
    loaded = {name: tensor * 0 for name, tensor in _tensors(1).items()}
    stock.load(loaded, storage_reader=stock.FileSystemReader(path), no_dist=True)
    return next(what for what in whats if small.bits(loaded) == small.bits(_tensors(what)))


def _publish(run: Path, name: str, what: int, *, rank: int = 0, retain: bool = False) -> None:
    """A checkpoint of the engine, a small file of each rank."""
    saves = DirectorySaves(asynchronous=False, timeout_seconds=60)
    one = saves.begin(str(run / name), step=what, leads=rank == 0)
    staging = Path(one.staging)
    journal.mark(f"begin {name} {what}")
    (staging / f"rank-{rank}").write_text(f"{what}")
    one.files.append(f"rank-{rank}")
    if rank == 0:
        (staging / "sub").mkdir()
        (staging / "sub" / "file").write_text(f"{what}")
    ss.save(small.state(what), checkpoint_id=staging / "state")

    def retained() -> None:
        journal.mark(f"done {name} {what}")
        if retain:
            journal.mark("prune checkpoint-1 1")
            numbered.rotate(str(run), "checkpoint-", WITNESS, 1, ())

    saves.submit(one, {}, retained)


def _publishes(run: Path, recorder: Recorder) -> None:
    with recorder.python():
        _publish(run, "checkpoint-1", 1)
        _publish(run, "checkpoint-2", 2, retain=True)
        _publish(run, "checkpoint-2", 3)


def _rank_publishes(rank: int, run: Path, path: Path, rules: str) -> None:
    with Recorder(path, rules).python():
        _publish(run, "checkpoint-1", 1, rank=rank)


def _ranks_publish(run: Path, recorder: Recorder) -> None:
    environment = {"SNAPSTONE_CHUNK_BYTES": str(CHUNK_BYTES)}
    values(run_ranks(RANKS, _rank_publishes, run, recorder.path, recorder.rules, env=environment))


def _resumes_published(run: Path) -> None:
    for name in ("checkpoint-1", "checkpoint-2"):
        publication.put_back(str(run / name))
    publication.recover(str(run))


def _published_holds(path: Path, whats: Sequence[What]) -> What | str:
    if not publication.is_published(str(path)):
        return "there in part"
    if wrong := publication.problems(str(path), "full"):
        return wrong[0]
    what = engine_holds(path / "state", whats)
    texts = {(path / name).read_text() for name in ("sub/file", "rank-0")}
    return what if texts == {f"{what}"} else f"{what}, beside {texts}"


def _deepspeed_files(run: Path) -> None:
    """Of stock DeepSpeed."""
    for name in FILES:
        path = run / "tag1" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save({"w": torch.full((3000,), 1.0)}, path)
    (run / "latest").write_text("tag1")


def _saves_deepspeed(run: Path, recorder: Recorder) -> None:
    with recorder.python():
        for tag, what in (("tag1", 2), ("tag2", 3), ("tag2", 4)):
            directory = run / tag
            make_directories(directory)
            collected = Collected()
            for name in FILES:
                collected.add(name, {"w": torch.full((3000,), float(what))})
            journal.mark(f"begin {tag} {what}")
            ss.save(collected.state(None), checkpoint_id=directory / FOLDER, overwrite=True)
            stub.write_stubs(str(directory))
            journal.mark(f"done {tag} {what}")
        journal.mark("begin latest 2")
        stub.write_latest(str(run), "tag2")
        journal.mark("done latest 2")


def _deepspeed_holds(path: Path, whats: Sequence[What]) -> What | None:
    if path.is_file():
        text = path.read_text()
        return int(text.removeprefix("tag")) if text in ("tag1", "tag2") else f"names {text!r}"
    if not manifest.is_checkpoint(str(path / FOLDER)) and not any((path / name).exists() for name in FILES):
        return None
    stub.mend(str(path))
    found = set()
    for name in FILES:
        engine = stub.is_stub(path / name)
        content = Files(path).load(name) if engine else torch.load(path / name, weights_only=True)
        found.add(int(content["w"][0]))
        assert torch.equal(content["w"], torch.full((3000,), content["w"][0].item()))
    return found.pop() if len(found) == 1 else f"files of saves {found}"


def _trainer_checkpoint(run: Path) -> None:
    ss.save({"optimizer": _tensors(1)}, checkpoint_id=run / "checkpoint-1" / "optimizer")


def _writes_stock_file(run: Path, recorder: Recorder) -> None:
    with recorder.python():
        hf.to_stock(run / "checkpoint-1")
        hf.to_stock(run / "checkpoint-1")


def _stock_file_holds(path: Path, whats: Sequence[What]) -> What | str:
    file = path / "optimizer.pt"
    try:
        is_right = not file.exists() or small.bits(torch.load(file, weights_only=True)) == small.bits(_tensors(1))
    except Exception as error:  # whatever torch makes of bytes that are not its own
        return f"{file.name}: {error!r}"
    return 1 if is_right else f"{file.name} has other bytes"


def _saves_through_dcp(run: Path, recorder: Recorder) -> None:
    with recorder.python():
        for name, what in (("next", 2), ("previous", 3)):
            journal.mark(f"begin {name} {what}")
            stock.save(small.state(what), storage_writer=dcp.StorageWriter(run / name), no_dist=True)
            journal.mark(f"done {name} {what}")
            assert not os.path.lexists(run / f".saving-{name}")


def _previous(run: Path) -> None:
    ss.save(small.state(1), checkpoint_id=run / "previous")


def _nothing(run: Path) -> None:
    pass


_STEPS = Reader(_resumes_steps, _step_holds)
_PUBLISHED = Reader(_resumes_published, _published_holds)
_DEEPSPEED = Reader(None, _deepspeed_holds)
_STOCK_FILE = Reader(None, _stock_file_holds)

TRAINERS = [
    Scenario("prune", _steps, _prunes, {"step-1": 1, "step-2": 2}, (1, 2, 3)),
    Scenario("replace_stock", _stock_step, _replaces_stock, {"step-5": 1}, (1, 2), reader=_STEPS),
    Scenario("publish", _nothing, _publishes, {}, (1, 2, 3), run=("deep", "run"), reader=_PUBLISHED),
    Scenario("publish_ranks", Path.mkdir, _ranks_publish, {}, (1,), clients=True, reader=_PUBLISHED),
    Scenario(
        "deepspeed", _deepspeed_files, _saves_deepspeed, {"tag1": 1, "latest": 1}, (1, 2, 3, 4), reader=_DEEPSPEED
    ),
    Scenario("stock_file", _trainer_checkpoint, _writes_stock_file, {"checkpoint-1": 1}, (1,), reader=_STOCK_FILE),
    Scenario("dcp", _previous, _saves_through_dcp, {"previous": 1}, (1, 2, 3)),
]
